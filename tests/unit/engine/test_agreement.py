"""One rank fails: all ranks stop, with one message."""

from pathlib import Path

import pytest

from mt_deepspeed.engine.agreement import RanksFailedError, together
from mt_deepspeed.engine.launch import Place
from tests.helpers.ranks import run_ranks


def disagree(place: Place, folder: Path) -> list[str]:
    messages = []
    for failing in ([], [1], [0, 1]):

        def work(failing: list[int] = failing) -> int:
            if place.rank in failing:
                raise ValueError("shard 7 is missing")
            return place.rank

        try:
            messages.append(str(together(work, "opening the data")))
        except RanksFailedError as error:
            messages.append(str(error))
    return messages


def test_all_ranks_learn_of_a_failure_on_one(tmp_path: Path) -> None:
    first, second = run_ranks(2, disagree, tmp_path)
    assert (first[0], second[0]) == ("0", "1")
    assert first[1] == second[1]
    assert "rank 1 on" in first[1]
    assert "opening the data failed" in first[1]
    assert first[2] == "opening the data failed: shard 7 is missing"


def test_our_own_bugs_are_not_hidden(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="division"):
        run_ranks(1, divide, tmp_path)


def divide(place: Place, folder: Path) -> float:
    return together(lambda: 1 / (place.rank * 0), "dividing")
