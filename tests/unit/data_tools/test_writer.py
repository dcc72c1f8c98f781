import hashlib
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_tools import shard_file
from data_tools.cli import main
from data_tools.journal import JOURNAL_NAME
from data_tools.shard_format import CAPTION_SCHEMA, ROWS_PER_BATCH, read_manifest
from data_tools.sources import Row
from data_tools.writer import ConversionError, convert
from tests.helpers.conversion import faults, job, make_rows, picture, tree

ROOT = Path(__file__).resolve().parents[3]


def test_shards_hold_the_rows(tmp_path: Path) -> None:
    rows = make_rows([("train", 700), ("val", 20)])
    rows[5] = Row("train", "5", ((tmp_path / "nothing.jpg",),), {"captions": ["a"]}, "rows[5]", {})
    rows[4] = Row("train", "4", ((),), {"captions": ["a"]}, "rows[4]", {})
    rows[3] = Row("train", "3", (picture(3),), {"captions": []}, "rows[3]", {"empty_text": 2})
    (tmp_path / "4.png").write_bytes(picture(4))
    candidates = (tmp_path / "4.jpg", tmp_path / "4.png")
    rows[2] = Row("train", "2", (candidates,), {"captions": ["found by its second name"]}, "rows[2]", {})
    manifest = convert(job(rows, tmp_path), tmp_path / "out")
    assert manifest == read_manifest(tmp_path / "out")
    assert manifest.dropped == {"empty_text": 2, "missing_file": 2, "no_text": 1, "not_an_image": 102}
    assert faults(tmp_path / "out") == []
    reader = pa.ipc.open_file(str(tmp_path / "out" / "train-00000.arrow"))
    assert reader.schema.equals(CAPTION_SCHEMA)
    sizes = [reader.get_batch(i).num_rows for i in range(reader.num_record_batches)]
    assert sizes[:-1] == [ROWS_PER_BATCH] * (len(sizes) - 1)
    kept = [row for i, row in enumerate(rows[:700]) if i % 7 != 6 and i not in (3, 4, 5)]
    table = reader.read_all().to_pylist()
    assert [row["image_id"] for row in table] == [row.image_id for row in kept]
    assert [row["captions"] for row in table] == [row.columns["captions"] for row in kept]
    assert [row["image"] for row in table[3:]] == [row.images[0] for row in kept[3:]]
    assert [row["width"] for row in table[3:]] == [16 + int(row.image_id) % 5 for row in kept[3:]]
    shard = manifest.splits["train"].shards[0]
    assert (shard.rows, shard.texts) == (len(kept), sum(len(row.columns["captions"]) for row in kept))
    data = (tmp_path / "out" / shard.file).read_bytes()
    assert (shard.bytes, shard.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert sorted(tree(tmp_path / "out")) == [
        "dropped.jsonl",
        "manifest.json",
        "train-00000.arrow",
        "val-00000.arrow",
    ]


def test_same_bytes_for_any_number_of_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_file, "ROWS_PER_SHARD", 150)
    rows = make_rows([("train", 500), ("val", 80)])
    for workers in (1, 2, 3):
        convert(job(iter(rows), tmp_path), tmp_path / str(workers), workers)
    assert tree(tmp_path / "1") == tree(tmp_path / "2") == tree(tmp_path / "3")
    assert len(read_manifest(tmp_path / "1").splits["train"].shards) == 4


def test_shards_end_when_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = len(picture(0))
    monkeypatch.setattr(shard_file, "MAX_SHARD_BYTES", 100 * size + (1 << 20))
    manifest = convert(job(make_rows([("train", 400)], bad=1000), tmp_path), tmp_path / "out")
    shards = manifest.splits["train"].shards
    assert len(shards) > 4
    assert sum(shard.rows for shard in shards) == 400
    assert max(shard.rows for shard in shards) < 110
    assert faults(tmp_path / "out") == []


class Killed(Exception):
    pass


def dying(rows: Sequence[Row], at: int) -> Iterator[Row]:
    for number, row in enumerate(rows):
        if number == at:
            raise Killed
        yield row


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)  # folders are named anew
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=3),
    deaths=st.lists(st.integers(0, 120), max_size=3),
    rows_per_shard=st.integers(5, 40),
    damage=st.booleans(),
)
def test_killed_and_resumed_gives_the_same_bytes(
    sizes: list[int],
    deaths: list[int],
    rows_per_shard: int,
    damage: bool,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shard_file, "ROWS_PER_SHARD", rows_per_shard)
    folder = tmp_path_factory.mktemp("resume")
    rows = make_rows([(f"s{i}", size) for i, size in enumerate(sizes)], bad=4)
    convert(job(rows, folder), folder / "whole")
    for at in deaths:
        try:
            convert(job(dying(rows, at), folder), folder / "out")
        except Killed:
            assert not (folder / "out" / "manifest.json").exists()
    shards = sorted((folder / "out").glob("*.arrow"))
    if damage and shards and not (folder / "out" / "manifest.json").exists():
        shards[0].write_bytes(shards[0].read_bytes()[:-1])
    if damage and (folder / "out" / JOURNAL_NAME).exists():
        with (folder / "out" / JOURNAL_NAME).open("a") as file:
            file.write('{"split": "s0", "sta')  # a line cut short
    convert(job(rows, folder), folder / "out")
    assert tree(folder / "out") == tree(folder / "whole")


def test_finished_shards_are_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_file, "ROWS_PER_SHARD", 100)
    rows = make_rows([("train", 300)])
    with pytest.raises(Killed):
        convert(job(dying(rows, 290), tmp_path), tmp_path / "out")
    first = tmp_path / "out" / "train-00000.arrow"
    before = first.stat().st_mtime_ns
    looked_at: list[int] = []
    convert(job(rows, tmp_path), tmp_path / "out", report=lambda done, *_: looked_at.append(done))
    assert first.stat().st_mtime_ns == before
    assert looked_at == [300]
    again: list[int] = []
    convert(job(rows, tmp_path), tmp_path / "out", report=lambda done, *_: again.append(done))
    assert again == []


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_kill_9_and_resume(tmp_path: Path) -> None:
    """The real thing: the process group is killed between two shards, then run again with other workers."""
    raw = tmp_path / "raw"
    main(["synth", "--out", str(raw), "--layout", "vg", "--num-images", "700", "--image-size", "32"])
    code = (
        "import sys; from data_tools import shard_file; shard_file.ROWS_PER_SHARD = 64; "
        "from data_tools.cli import main; sys.exit(main(sys.argv[1:]))"
    )

    def start(out: Path, workers: int) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-c", code, "convert", "vg", "--raw", str(raw / "vg"), "--out", str(out)]
        command += ["--workers", str(workers)]
        quiet = subprocess.DEVNULL
        return subprocess.Popen(command, cwd=ROOT, stdout=quiet, stderr=quiet, start_new_session=True)

    assert start(tmp_path / "whole", 1).wait(60) == 0
    process = start(tmp_path / "out", 1)
    end = time.monotonic() + 60
    while not list((tmp_path / "out").glob("train-0000[2-9].arrow")) and time.monotonic() < end:
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(60)
    assert start(tmp_path / "out", 2).wait(60) == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_policy_error_stops_at_the_first_bad_picture(tmp_path: Path) -> None:
    rows = make_rows([("train", 20)])
    with pytest.raises(ConversionError, match=r"rows\[6\].*'6'.*not_an_image"):
        convert(job(rows, tmp_path, "error"), tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_output_folders_are_not_mixed_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_file, "ROWS_PER_SHARD", 10)
    rows = make_rows([("train", 30)])
    with pytest.raises(Killed):
        convert(job(dying(rows, 25), tmp_path), tmp_path / "out")
    (tmp_path / "annotations.txt").write_text("changed", "utf-8")
    with pytest.raises(ValueError, match="unfinished conversion that differs in sources"):
        convert(job(rows, tmp_path), tmp_path / "out")
    convert(job(rows, tmp_path), tmp_path / "done")
    (tmp_path / "annotations.txt").write_text("changed again", "utf-8")
    with pytest.raises(ConversionError, match="finished data set that differs in sources"):
        convert(job(rows, tmp_path), tmp_path / "done")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "train-00000.arrow").write_bytes(b"mine")
    with pytest.raises(ConversionError, match="holds shards of something else"):
        convert(job(rows, tmp_path), tmp_path / "other")
    assert (tmp_path / "other" / "train-00000.arrow").read_bytes() == b"mine"


def test_a_source_that_changes_meanwhile_is_noticed(tmp_path: Path) -> None:
    def rows() -> Iterator[Row]:
        yield from make_rows([("train", 3)])
        (tmp_path / "annotations.txt").write_text("longer than before", "utf-8")

    with pytest.raises(ConversionError, match=r"annotations\.txt: changed while it was read"):
        convert(job(rows(), tmp_path), tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_splits_must_stand_together(tmp_path: Path) -> None:
    rows = make_rows([("train", 2), ("val", 2), ("train", 2)])
    with pytest.raises(ConversionError, match="do not stand together"):
        convert(job(rows, tmp_path), tmp_path / "out")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_unreadable_files_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture(0))
    (tmp_path / "a.png").chmod(0)
    rows = [Row("train", "a", ((tmp_path / "a.png",),), {"captions": ["a"]}, "rows[0]", {})]
    assert convert(job(rows, tmp_path), tmp_path / "out").dropped == {"unreadable_file": 1}


def test_folders_and_large_files_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_tools.checking.MAX_FILE_BYTES", 1000)
    (tmp_path / "large.png").write_bytes(b"x" * 1001)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    files = [tmp_path, tmp_path / "large.png", tmp_path / "large.png" / "below"]
    files += [tmp_path / "loop", tmp_path / ("x" * 5000)]
    rows = [Row("train", "a", ((file,),), {"captions": ["a"]}, "rows[0]", {}) for file in files]
    dropped = convert(job(rows, tmp_path), tmp_path / "out").dropped
    assert Counter(dropped) == Counter(unreadable_file=2, file_too_large=1, missing_file=2)
