import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_tools import shard_file
from data_tools.cli import main
from data_tools.merge import MergeError, merge, parse_part
from data_tools.options import BadOption
from data_tools.shard_format import MANIFEST_NAME
from data_tools.sources import Row
from data_tools.writer import Job, convert
from tests.helpers.conversion import faults, job, make_rows, tree


def part_job(rows: Sequence[Row], folder: Path, part: tuple[int, int]) -> Job:
    whole = job(rows, folder)
    return Job(**{**whole.__dict__, "part": part})


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(1, 80), min_size=1, max_size=3),
    parts=st.integers(2, 5),
    rows_per_shard=st.integers(5, 30),
    bad=st.integers(1, 9),
)
def test_parts_and_merge_give_the_bytes_of_one_run(
    sizes: list[int],
    parts: int,
    rows_per_shard: int,
    bad: int,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shard_file, "ROWS_PER_SHARD", rows_per_shard)
    folder = tmp_path_factory.mktemp("merge")
    rows = make_rows([(f"s{i}", size) for i, size in enumerate(sizes)], bad)
    convert(job(rows, folder), folder / "whole")
    for number in range(1, parts + 1):
        convert(part_job(rows, folder, (number, parts)), folder / str(number))
        convert(part_job(rows, folder, (number, parts)), folder / str(number))  # is finished: nothing happens
    folders = [folder / str(number) for number in range(parts, 0, -1)]
    for _ in range(2):
        merge(folders, folder / "out")
        assert tree(folder / "out") == tree(folder / "whole")
    assert faults(folder / "1") == []


def test_parts_that_do_not_fit_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_file, "ROWS_PER_SHARD", 10)
    rows = make_rows([("train", 40)])
    one, two, other = tmp_path / "one", tmp_path / "two", tmp_path / "other"
    for folder, part in ((one, (1, 2)), (two, (2, 2)), (other, (1, 3))):
        convert(part_job(rows, tmp_path, part), folder)
    convert(job(rows, tmp_path), tmp_path / "whole")
    for parts, message in (
        ([one], "parts 2 of 2 are missing"),
        ([one, two, one], "is part 1, and so is"),
        ([one, other], "is part 1 of 3"),
        ([tmp_path / "whole"], "is no part"),
    ):
        with pytest.raises(MergeError, match=message):
            merge(parts, tmp_path / "out")
    with pytest.raises(MergeError, match="holds another data set"):
        merge([one, two], other)
    manifest = json.loads((two / MANIFEST_NAME).read_text("utf-8"))
    manifest["tool_version"] = "other"
    (two / MANIFEST_NAME).write_text(json.dumps(manifest), "utf-8")
    with pytest.raises(MergeError, match=r"differs from .* in tool_version"):
        merge([one, two], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = tmp_path / "raw"
    common = ["--num-images", "60", "--image-size", "32", "--workers", "1"]
    assert main(["synth", "--out", str(raw), "--layout", "coco", *common]) == 0
    convert_coco = ["convert", "coco", "--raw", str(raw / "coco"), "--workers", "1", "--out"]
    assert main([*convert_coco, str(tmp_path / "whole")]) == 0
    for part in ("1/2", "2/2"):
        assert main([*convert_coco, str(tmp_path / part[0]), "--part", part]) == 0
    assert main(["merge", str(tmp_path / "1"), str(tmp_path / "2"), "--out", str(tmp_path / "out")]) == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert main([*convert_coco, str(tmp_path / "3"), "--part", "3/2"]) == 2
    assert "1 <= I <= N" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "1", "0/2", "3/2", "a/2", "1/²", "1/2/3", "-1/2"])
def test_part_texts(text: str) -> None:
    with pytest.raises(BadOption, match="--part"):
        parse_part(text)
