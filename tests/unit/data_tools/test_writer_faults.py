"""Conversions that end in the middle: a full disk, a killed process; and the files they leave."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_tools import shard_file
from data_tools.cli import main
from data_tools.sources import Row
from data_tools.writer import ConversionError, convert
from tests.helpers.conversion import job, make_rows, picture, tree

ROOT = Path(__file__).resolve().parents[3]
SMALL_SHARDS = "from data_tools import shard_file; shard_file.ROWS_PER_SHARD = 64; "
SMALL_FILES = (
    "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)); "
)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    arguments = ["--layout", "vg", "webdataset", "--num-images", "600", "--image-size", "32"]
    assert main(["synth", "--out", str(folder), "--workers", "1", *arguments]) == 0
    return folder


def start(raw: Path, out: Path, workers: int, before: str = "") -> "subprocess.Popen[str]":
    code = f"import sys; {SMALL_SHARDS}{before}from data_tools.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "convert", raw.name, "--raw", str(raw), "--out", str(out)]
    return subprocess.Popen(
        [*command, "--workers", str(workers)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="needs limits on file sizes")
def test_a_disk_that_takes_no_more_is_named(raw: Path, tmp_path: Path) -> None:
    """A limit on the size of files makes writing fail as a full disk does."""
    for workers in (1, 2):
        process = start(raw / "vg", tmp_path / "out", workers, SMALL_FILES)
        _, message = process.communicate(timeout=120)
        assert process.returncode == 1
        assert f"File too large: '{tmp_path / 'out'}'" in message
        assert "Traceback" not in message
        assert sorted(tree(tmp_path / "out")) == [".progress.jsonl"]
    assert start(raw / "vg", tmp_path / "out", 1).wait(120) == 0
    assert start(raw / "vg", tmp_path / "whole", 1).wait(120) == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
@pytest.mark.parametrize("layout", ["vg", "webdataset"])
def test_workers_end_with_a_killed_parent(layout: str, raw: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start(raw / layout, out, 2)
    end = time.monotonic() + 120
    while not list(out.glob("train-0000[1-9].arrow")) and time.monotonic() < end:
        time.sleep(0.002)
    process.kill()
    process.communicate()
    while time.monotonic() < end:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.05)
    else:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail("worker processes went on")
    assert start(raw / layout, out, 1).wait(120) == 0
    assert start(raw / layout, tmp_path / "whole", 1).wait(120) == 0
    assert tree(out) == tree(tmp_path / "whole")


def test_nothing_temporary_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_file, "ROWS_PER_SHARD", 10)
    rows = make_rows([("train", 30)])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".train-000000000000-0.77.tmp").write_bytes(b"of a killed run")
    rows[25] = Row("train", "x", ((tmp_path / "none.jpg",),), {"captions": ["a"]}, "rows[25]")
    with pytest.raises(ConversionError, match=r"rows\[6\]"):
        convert(job(rows, tmp_path, "error"), tmp_path / "out")
    assert sorted(tree(tmp_path / "out")) == [".progress.jsonl"]
    convert(job(rows, tmp_path), tmp_path / "out")
    assert not list((tmp_path / "out").glob(".*"))


def test_links_in_the_output_folder_are_replaced_not_followed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in ("manifest.json", "dropped.jsonl"):
        (tmp_path / name).write_bytes(b"mine")
    (out / "dropped.jsonl").symlink_to(tmp_path / "dropped.jsonl")
    (out / ".manifest.json.tmp").symlink_to(tmp_path / "manifest.json")
    convert(job([*make_rows([("train", 7)])], tmp_path), out)
    assert (tmp_path / "manifest.json").read_bytes() == b"mine"
    assert (tmp_path / "dropped.jsonl").read_bytes() == b"mine"


def test_pictures_that_come_as_bytes_do_not_stay_in_memory_or_on_disk(tmp_path: Path) -> None:
    rows = (Row("train", f"{i}", (picture(i),), {"captions": ["a"]}, "rows") for i in range(50))
    manifest = convert(job(rows, tmp_path), tmp_path / "out")
    assert manifest.splits["train"].rows == 50
    assert sorted(tree(tmp_path / "out")) == ["manifest.json", "train-00000.arrow"]
