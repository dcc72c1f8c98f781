"""The list of dropped rows, and the budget."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools import shard_file
from data_tools.cli import main
from data_tools.dropped import LIST_NAME, Budget, DroppedListError, DroppedRow, read_list, write_list
from data_tools.images import REASONS
from data_tools.merge import merge
from data_tools.sources import Row
from data_tools.writer import ConversionError, convert
from tests.helpers.conversion import job, make_rows, picture, tree


def test_the_list_says_which_rows_and_why(tmp_path: Path) -> None:
    rows = make_rows([("val", 8), ("train", 3)])
    rows[1] = Row("val", "one", ((tmp_path / "raw" / "1.jpg",),), {"captions": ["a"]}, "rows[1]", {})
    rows[2] = Row("val", "two", (picture(2),), {"captions": []}, f"{tmp_path}/x.json: entry 2", {})
    rows[9] = Row("train", "n" * 999, (b"",), {"captions": ["a"]}, "rows[9]", {"empty_text": 1})
    convert(job(rows, tmp_path), tmp_path / "out")
    listed = [(row.split, row.row, row.id, row.reason, row.detail) for row in read_list(tmp_path / "out")]
    assert listed == [
        ("train", 1, "n" * 300, "empty_file", "rows[9]"),
        ("val", 1, "one", "missing_file", "raw/1.jpg"),
        ("val", 2, "two", "no_text", "x.json: entry 2"),
        ("val", 6, "6", "not_an_image", "begins with b'no picture'"),
    ]


def test_no_list_of_nothing(tmp_path: Path) -> None:
    convert(job(make_rows([("train", 3)]), tmp_path), tmp_path / "out")
    assert not (tmp_path / "out" / LIST_NAME).exists()


def test_texts_are_the_same_in_every_run(tmp_path: Path) -> None:
    detail = f"<_io.BytesIO object at 0x7f00deadbeef> of {tmp_path}/a/b.jpg"
    row = DroppedRow.of("train", 3, "id", "damaged", detail, tmp_path)
    assert row.detail == "<_io.BytesIO object at 0x...> of a/b.jpg"


def test_bounded_and_equal_for_workers_parts_and_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_file, "ROWS_PER_SHARD", 20)
    monkeypatch.setattr("data_tools.writer.MAX_LISTED", 12)
    monkeypatch.setattr("data_tools.dropped.MAX_LISTED", 12)
    rows = make_rows([("val", 130), ("train", 90)], bad=2)
    for number in (40, 41, 42):
        rows[number] = Row("val", "x", ((),), {"captions": ["a"]}, "rows", {})
    whole = convert(job(rows, tmp_path), tmp_path / "whole")
    convert(job(rows, tmp_path), tmp_path / "workers", workers=2)
    with pytest.raises(IndexError):
        convert(
            job((row if i != 120 else rows[999] for i, row in enumerate(rows)), tmp_path),
            tmp_path / "stopped",
        )
    convert(job(rows, tmp_path), tmp_path / "stopped")
    for number in (1, 2, 3):
        convert(job(rows, tmp_path, part=(number, 3)), tmp_path / str(number))
    merge([tmp_path / "3", tmp_path / "1", tmp_path / "2"], tmp_path / "merged")
    expected = tree(tmp_path / "whole")
    for name in ("workers", "stopped", "merged"):
        assert tree(tmp_path / name) == expected, name
    listed = [(row.split, row.reason) for row in read_list(tmp_path / "whole")]
    assert {kind: listed.count(kind) for kind in listed} == {
        ("train", "not_an_image"): 12,
        ("val", "not_an_image"): 12,
        ("val", "missing_file"): 3,
    }
    assert whole.dropped == {"missing_file": 3, "not_an_image": 64 + 45}


def test_a_broken_list_is_named(tmp_path: Path) -> None:
    write_list(tmp_path, [DroppedRow("train", 0, "a", "damaged", "")])
    with (tmp_path / LIST_NAME).open("a") as file:
        file.write('{"split": "train"}\n')
    with pytest.raises(DroppedListError, match=r"dropped\.jsonl: line 2"):
        read_list(tmp_path)


def test_what_weighs_on_the_budget() -> None:
    dropped = {"damaged": 2, "missing_file": 50, "no_text": 30, "no_split": 10, "duplicate_text": 99}
    assert Budget(0.2, 0.9).excess(100, dropped) == ""  # 10 are there
    message = Budget(0.19).excess(100, dropped)
    assert message.startswith("2 of 10 pictures that are there were refused (damaged 2)")
    assert "--max-dropped-share 0.19" in message
    assert Budget(1, 0.8).excess(100, dropped).startswith("50 of 60 pictures are not there")
    assert Budget(0, 0).excess(100, {"no_text": 100, "empty_text": 5}) == ""
    for budget in (Budget(-0.1), Budget(1, 1.1), Budget(float("nan"))):
        with pytest.raises(ValueError, match=r"expected a number from 0 to 1"):
            budget.check()


@given(st.dictionaries(st.sampled_from(sorted(REASONS)), st.integers(0, 50)), st.integers(0, 50))
def test_all_may_be_dropped_unless_said_otherwise(dropped: dict[str, int], kept: int) -> None:
    rows = sum(dropped.values()) + kept
    assert Budget().excess(rows, dropped) == ""
    bad = sum(number for reason, number in dropped.items() if reason != "missing_file")
    assert bool(Budget(0.0).excess(rows, dropped)) == (bad > 0)
    assert bool(Budget(1.0, 0.0).excess(rows, dropped)) == (dropped.get("missing_file", 0) > 0)


def test_the_budget_stops_early_and_a_larger_one_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_file, "ROWS_PER_SHARD", 20)
    monkeypatch.setattr("data_tools.writer._JUDGED_FROM", 50)
    rows = make_rows([("train", 200)], bad=4)
    seen: list[int] = []
    small = Budget(max_dropped_share=0.2)
    with pytest.raises(ConversionError, match=r"15 of 60 .*not_an_image 15.* image '3': not_an_image"):
        convert(job(rows, tmp_path, budget=small), tmp_path / "out", report=lambda n, *_: seen.append(n))
    assert seen == [20, 40, 60]
    with pytest.raises(ConversionError, match="15 of 60"):  # at once: the work so far is kept
        convert(job(rows, tmp_path, budget=small), tmp_path / "out")
    convert(job(rows, tmp_path, budget=Budget(0.25)), tmp_path / "out")
    convert(job(rows, tmp_path), tmp_path / "whole")
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_few_pictures_are_judged_at_the_end(tmp_path: Path) -> None:
    rows = make_rows([("train", 20)], bad=10)
    with pytest.raises(ConversionError, match="2 of 20"):
        convert(job(rows, tmp_path, budget=Budget(0.09)), tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_policy_error_passes_over_rows_without_texts(tmp_path: Path) -> None:
    rows = [Row("train", "a", (picture(1),), {"captions": []}, "rows[0]", {"empty_text": 1})]
    convert(job(rows, tmp_path, "error"), tmp_path / "out")
    rows = [Row("train", "a", ((),), {"captions": ["a"]}, "rows[0]", {})]
    with pytest.raises(ConversionError, match=r"rows\[0\].*missing_file"):
        convert(job(rows, tmp_path, "error"), tmp_path / "other")


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    for number in range(6):
        good = number % 2
        (raw / f"{number}.png").write_bytes(picture(number) if good else b"<html>")
        (raw / f"{number}.txt").write_text("a caption", "utf-8")
    command = ["convert", "pairs", "--raw", str(raw), "--workers", "1", "--out", str(tmp_path / "out")]
    assert main([*command, "--max-dropped-share", "0.4"]) == 1
    assert "3 of 6 pictures that are there were refused (not_an_image 3)" in capsys.readouterr().err
    assert main([*command, "--policy", "error"]) == 1
    assert main(command) == 0
    capsys.readouterr()
    for more in (["--policy", "error"], ["--max-dropped-share", "0.4"]):
        assert main([*command, *more]) == 1
        assert "finished data set: 3 of 6 pictures" in capsys.readouterr().err
    lines = (tmp_path / "out" / LIST_NAME).read_text("utf-8").splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["0.png", "2.png", "4.png"]
