import threading
import time
from collections import Counter

import pytest

from data_tools.fetch.schedule import Politeness, run_in_order


def test_schedule() -> None:
    """In order; a host's limit holds; a blocked host does not keep others waiting; errors come through."""
    lock, active, most = threading.Lock(), Counter[str](), Counter[str]()
    others_done = threading.Event()

    def work(task: tuple[int, str]) -> int:
        number, host = task
        with lock:
            active[host] += 1
            most[host] = max(most[host], active[host])
        if host == "blocked":
            assert others_done.wait(60)
        if number == 99:
            others_done.set()
        with lock:
            active[host] -= 1
        return number

    tasks = [(i, "blocked" if i % 10 == 0 else f"host{i % 3}") for i in range(100)]
    found = list(run_in_order(((host, (i, host)) for i, host in tasks), work, 4, Politeness(2, 0)))
    assert found == [((i, host), i) for i, host in tasks]
    assert max(most.values()) <= 2
    with pytest.raises(ZeroDivisionError):
        list(run_in_order((("h", i) for i in range(9)), lambda i: 1 // (i - 4), 2, Politeness(2, 0)))
    assert list(run_in_order((), lambda task: task, 2, Politeness())) == []
    with pytest.raises(ValueError, match="--workers 0"):
        list(run_in_order((), lambda task: task, 0, Politeness()))


def test_hosts_rest_between_two_starts() -> None:
    """However fast the machine is, the starts at one host take their time; a slow machine only takes longer."""
    begin = time.monotonic()
    found = run_in_order((("host", i) for i in range(11)), lambda i: i, 4, Politeness(4, 0.03))
    assert [i for i, _ in found] == list(range(11))
    assert time.monotonic() - begin >= 10 * 0.03
