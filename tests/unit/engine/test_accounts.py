"""What a run says about itself: where its time went, who is slow, which steps jumped, how often to save."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mt_deepspeed.engine import goodput, records
from mt_deepspeed.engine.goodput import Goodput
from mt_deepspeed.engine.saving import LONGEST_S, SHORTEST_S, save_interval_s
from mt_deepspeed.engine.spikes import robust_z
from mt_deepspeed.engine.stragglers import slow_ranks


class Clock:
    now = 1000.0

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(goodput.time, "time", clock.time)
    return clock


def train(account: Goodput, clock: Clock, steps: range, save_at: int) -> float:
    """10 s a step, 1 s of it waiting; returns the productive seconds at the save, which takes 5 s."""
    account.switch("productive")
    kept = 0.0
    for step in steps:
        with account.time("data_wait"):
            clock.now += 1
        clock.now += 9
        if step == save_at:
            with account.time("checkpoint"):
                kept = account.seconds["productive"]
                clock.now += 5
        account.write(step)
    return kept


def test_every_second_is_counted_once_and_lost_steps_are_found(tmp_path: Path, clock: Clock) -> None:
    first = Goodput(tmp_path, True, started=clock.now - 20)
    kept = train(first, clock, range(1, 9), save_at=6)
    clock.now += 100  # it dies after step 8, and is started again 100 s later; its start takes 30 s
    second = Goodput(tmp_path, True, started=clock.now)
    clock.now += 30
    second.resume(6, kept)
    train(second, clock, range(7, 11), save_at=10)
    assert second.seconds == {
        "productive": 9 * (6 + 4),
        "data_wait": 8 + 4,
        "checkpoint": 10,
        "evaluation": 0,
        "restart": 20 + 100 + 30,
        "lost": 9 * 2,
    }
    assert sum(second.seconds.values()) == clock.now - 980
    assert (second.starts, second.lost_steps) == (2, 2)
    assert second.line().startswith("goodput 32% (data 4, checkpoints 4, evaluation 0, starting 54, lost 6)")


def test_time_between_a_finished_run_and_its_extension_does_not_count(tmp_path: Path, clock: Clock) -> None:
    first = Goodput(tmp_path, True, started=clock.now)
    kept = train(first, clock, range(1, 3), save_at=2)
    first.write(2, ended=True)
    clock.now += 1e6
    second = Goodput(tmp_path, True, started=clock.now)
    second.resume(2, kept)
    assert second.seconds["restart"] == 0
    assert second.lost_steps == 0


def test_a_broken_account_starts_anew(tmp_path: Path, clock: Clock) -> None:
    (tmp_path / "goodput.json").write_text('{"seconds": ')
    assert Goodput(tmp_path, True, started=clock.now).starts == 1


def test_records_that_cannot_be_written_do_not_end_a_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records.append(tmp_path / "new" / "file.jsonl", {"step": 1})
    assert json.loads((tmp_path / "new" / "file.jsonl").read_text()) == {"step": 1}
    (tmp_path / "file").touch()
    records.append(tmp_path / "file" / "below.jsonl", {"step": 1})
    assert "a record is lost" in caplog.text


def row(data_wait_s: float, forward_s: float) -> dict[str, float]:
    times = {"step_s": 1.0, "data_wait_s": data_wait_s, "forward_s": forward_s}
    return {f"{kind}/p{p}": value for kind, value in times.items() for p in (50, 95)}


def test_slow_ranks_are_named_with_their_host() -> None:
    hosts = ["a", "a", "b", "b"]
    assert slow_ranks([row(0.01, 0.3)] * 4, hosts) == []
    assert slow_ranks([row(0.01, 0.3), row(0.03, 0.3), row(0.01, 0.3), row(0.01, 0.31)], hosts) == []
    (line,) = slow_ranks([row(0.01, 0.3), row(0.01, 0.3), row(0.01, 0.6), row(0.01, 0.3)], hosts)
    assert "rank 2 on b is slow: computes forward 0.6 s" in line
    (line,) = slow_ranks([row(0.01, 0.3), row(0.5, 0.3)], ["a", "b"])
    assert "rank 1 on b is slow: waits for data 0.5 s" in line


@given(st.lists(st.floats(1.0, 2.0), min_size=32, max_size=64))
def test_spikes_stand_out_and_ordinary_values_do_not(history: list[float]) -> None:
    assert robust_z(sorted(history)[len(history) // 2], history)[0] < 1.0
    assert robust_z(1e6, history)[0] > 10
    assert robust_z(0.0, history)[0] < 0  # a fall is none


def test_a_loss_that_stands_still_has_no_spikes() -> None:
    assert robust_z(1.0005, [1.0] * 40)[0] < 1.0


def test_the_interval_follows_young_and_daly_between_its_bounds() -> None:
    assert save_interval_s(2.0, 4.0, 100_000.0) == pytest.approx(math.sqrt(2 * 2.0 * 100_000.0))
    assert save_interval_s(0.0, 0.0, 1e6) == SHORTEST_S  # none was measured: soon
    assert save_interval_s(30.0, 60.0, 1e9) == LONGEST_S
    assert save_interval_s(30.0, 600.0, 1e4) == 6000.0
