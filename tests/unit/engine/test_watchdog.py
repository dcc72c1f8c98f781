"""Who is late, told from heartbeat files alone."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from mt_deepspeed.engine.watchdog import Beat, heartbeat_file, late_ranks


def write(run_dir: Path, *beats: Beat) -> None:
    for beat in beats:
        file = heartbeat_file(run_dir, beat.rank)
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(asdict(beat)))


def at(rank: int, beats: int, doing: str = "agreeing", time: float = 1000.0) -> Beat:
    return Beat(rank, f"node{rank}", 100 + rank, 7, doing, beats, 30.0, time)


def test_the_rank_with_the_fewest_beats_is_late(tmp_path: Path) -> None:
    write(tmp_path, at(0, 50), at(1, 48, "reading samples"), at(2, 50))
    found = late_ranks(tmp_path, 3, at(0, 50))
    assert found == "late: rank 1 on node1 (pid 101): step 7, reading samples for 30 s"


def test_a_process_that_is_gone_is_late_before_all_others(tmp_path: Path) -> None:
    write(tmp_path, at(0, 50), at(1, 48), at(2, 50, time=900.0))
    found = late_ranks(tmp_path, 3, at(0, 50))
    assert found.startswith("late: rank 2 on node2 (pid 102): step 7, agreeing, silent for 100 s")
    assert "rank 1" not in found


def test_missing_and_torn_heartbeats_are_named(tmp_path: Path) -> None:
    write(tmp_path, at(0, 50))
    heartbeat_file(tmp_path, 1).write_text('{"rank": 1, "ho')
    found = late_ranks(tmp_path, 3, at(0, 50))
    assert "late: rank 1: no heartbeat" in found
    assert "late: rank 2: no heartbeat" in found


def test_ranks_that_wait_at_one_point_are_not_blamed(tmp_path: Path) -> None:
    write(tmp_path, at(0, 50), at(1, 50))
    assert late_ranks(tmp_path, 2, at(0, 50)).startswith("all ranks are at the same point: agreeing")
