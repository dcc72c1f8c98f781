import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_tools.lock import LOCK_NAME, FolderInUse, folder_lock
from data_tools.merge import merge
from data_tools.sources import Row
from data_tools.writer import convert
from tests.helpers.conversion import job, make_rows, tree

pytest.importorskip("fcntl")
ROOT = Path(__file__).resolve().parents[3]


def test_one_at_a_time(tmp_path: Path) -> None:
    in_use = pytest.raises(FolderInUse, match=r"is being written by process \d+ on ")
    with folder_lock(tmp_path), in_use, folder_lock(tmp_path):
        pass
    assert not list(tmp_path.iterdir())
    with pytest.raises(KeyError), folder_lock(tmp_path):
        raise KeyError
    with folder_lock(tmp_path):
        assert (tmp_path / LOCK_NAME).exists()


def test_a_killed_run_leaves_no_lock(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from data_tools.lock import folder_lock\n"
        "with folder_lock(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(FolderInUse, match=f"process {process.pid} on"), folder_lock(tmp_path):
            pass
        process.kill()
    assert (tmp_path / LOCK_NAME).exists()
    with folder_lock(tmp_path):
        pass
    assert not (tmp_path / LOCK_NAME).exists()


def test_two_conversions_into_one_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def rows() -> Iterator[Row]:
        with pytest.raises(FolderInUse, match="out: is being written by"):
            convert(job(make_rows([("train", 3)]), tmp_path), out)
        yield from make_rows([("train", 3)])

    convert(job(rows(), tmp_path), out)
    assert sorted(tree(out)) == ["manifest.json", "train-00000.arrow"]


def test_merge_waits_for_nobody(tmp_path: Path) -> None:
    convert(job(make_rows([("train", 3)]), tmp_path, part=(1, 2)), tmp_path / "1")
    convert(job(make_rows([("train", 3)]), tmp_path, part=(2, 2)), tmp_path / "2")
    (tmp_path / "out").mkdir()
    with folder_lock(tmp_path / "out"), pytest.raises(FolderInUse):
        merge([tmp_path / "1", tmp_path / "2"], tmp_path / "out")
