"""Rows of benchmarks: written only when asked for, and where."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import pytest

from benchmarks.record import IMAGES, RESULTS, add_save, append, measured, picture_folder


@pytest.mark.parametrize(
    ("arguments", "file", "pictures"),
    [
        (["--save"], RESULTS / "some.csv", IMAGES),
        (["--save", "other/own.csv"], Path("other/own.csv"), Path("other")),
    ],
)
def test_pictures_go_with_the_rows(arguments: list[str], file: Path, pictures: Path) -> None:
    parser = argparse.ArgumentParser()
    add_save(parser, "some.csv")
    assert parser.parse_args([]).save is None
    assert parser.parse_args(arguments).save == file
    assert picture_folder(file) == pictures
    assert IMAGES.is_dir()


def test_rows_are_added_to_equal_columns_only(tmp_path: Path) -> None:
    file = tmp_path / "new" / "some.csv"
    append(file, [{"way": "a", "seconds": 1}])
    append(file, [{"way": "b", "seconds": 2}])
    assert measured(file, ("way", "seconds")) == {("a", "1"), ("b", "2")}
    assert measured(tmp_path / "none.csv", ("way",)) == set()
    with file.open(newline="") as rows:
        assert {"date", "commit", "hardware", "versions", "command"} < next(csv.DictReader(rows)).keys()
    with pytest.raises(ValueError, match=r"found columns .*; move the old file away"):
        append(file, [{"way": "a"}])
