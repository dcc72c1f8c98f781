"""The map over processes."""

import multiprocessing
import time
from collections.abc import Iterator

import pytest

from data_tools.options import BadOption
from data_tools.pool import map_in_order

HOUR = 3600.0


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_order(workers: int) -> None:
    assert list(map_in_order(abs, range(-50, 0), workers)) == list(range(50, 0, -1))


def test_few_tasks_are_taken_ahead() -> None:
    taken = []

    def tasks() -> Iterator[int]:
        for number in range(100):
            taken.append(number)
            yield number

    results = map_in_order(abs, tasks(), 2)
    next(results)
    assert len(taken) <= 2 * 2 + 1
    results.close()


@pytest.mark.timeout(120)
def test_who_stops_waits_for_no_task() -> None:
    before = set(multiprocessing.active_children())
    results = map_in_order(time.sleep, [0.0, HOUR, HOUR, HOUR], 2)
    next(results)
    results.close()
    with pytest.raises(ValueError, match="non-negative"):
        list(map_in_order(time.sleep, [-1.0, HOUR, HOUR, HOUR], 2))
    assert set(multiprocessing.active_children()) == before


def test_no_workers() -> None:
    with pytest.raises(BadOption, match="--workers 0"):
        list(map_in_order(abs, [1], 0))
