import json
from pathlib import Path
from typing import Any

import pytest

from data_tools.shard_format import (
    MANIFEST_NAME,
    SCHEMAS,
    TEXT_COLUMNS,
    Manifest,
    ShardFormatError,
    ShardInfo,
    SourceInfo,
    SplitInfo,
    check_split_name,
    read_manifest,
    shard_name,
    write_manifest,
)


def example() -> Manifest:
    train = (
        ShardInfo("train-00000.arrow", 3, 15, 1000, "a" * 64),
        ShardInfo("train-00001.arrow", 1, 5, 400, "b" * 64),
    )
    return Manifest(
        dataset="coco",
        task="caption",
        tool_version="0.1.0",
        options={"policy": "skip"},
        splits={"train": SplitInfo.of(train), "val-x": SplitInfo.of(())},
        dropped={"truncated": 2},
        sources=(SourceInfo("dataset_coco.json", 10, "c" * 64),),
    )


def test_round_trip_and_bytes(tmp_path: Path) -> None:
    write_manifest(tmp_path, example())
    first = (tmp_path / MANIFEST_NAME).read_bytes()
    assert read_manifest(tmp_path) == example()
    write_manifest(tmp_path, read_manifest(tmp_path))
    assert (tmp_path / MANIFEST_NAME).read_bytes() == first
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST_NAME]


def test_the_manifest_is_the_documented_json(tmp_path: Path) -> None:
    write_manifest(tmp_path, example())
    text = (tmp_path / MANIFEST_NAME).read_text("utf-8")
    tree = json.loads(text)
    assert set(tree) == {
        "format_version",
        "dataset",
        "task",
        "tool_version",
        "options",
        "splits",
        "dropped",
        "sources",
    }
    assert set(tree["splits"]["train"]["shards"][0]) == {"file", "rows", "texts", "bytes", "sha256"}
    assert text == json.dumps(tree, indent=1, sort_keys=True) + "\n"


def test_digest_depends_on_hashes_counts_and_order_only() -> None:
    base = example()
    one, two = base.splits["train"].shards

    def digest(*shards: ShardInfo, **changes: Any) -> str:
        fields = {**base.__dict__, "splits": {"train": SplitInfo.of(shards)}, **changes}
        return Manifest(**fields).digest()

    same = digest(one, two)
    assert digest(one, two, dropped={}, options={}, tool_version="9") == same
    assert digest(two, one) != same
    assert digest(one) != same
    assert digest(ShardInfo(one.file, 4, 15, 1000, one.sha256), two) != same


def corrupt(path: Path, change: Any) -> None:
    tree = json.loads(path.read_text("utf-8"))
    change(tree)
    path.write_text(json.dumps(tree), "utf-8")


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda t: t.update(format_version=2), ["format_version", "found 2", "expected 1"]),
        (lambda t: t.pop("dropped"), ["top level", "exactly the keys"]),
        (lambda t: t.update(extra=1), ["top level", "extra"]),
        (lambda t: t.update(task="poetry"), ["task", "poetry", "caption"]),
        (lambda t: t["splits"]["train"].update(rows=5), ["splits.train.rows", "found 5", "expected 4"]),
        (lambda t: t["splits"]["train"].update(rows=True), ["splits.train.rows", "found True"]),
        (lambda t: t["splits"].update({"../x": t["splits"]["train"]}), ["../x", "split name"]),
        (
            lambda t: t["splits"]["train"]["shards"][1].update(file="/etc/passwd"),
            ["splits.train.shards[1].file", "/etc/passwd", "train-00001.arrow"],
        ),
        (
            lambda t: t["splits"]["train"]["shards"][0].update(sha256="A" * 64),
            ["splits.train.shards[0].sha256", "64 hexadecimal"],
        ),
        (lambda t: t["splits"]["train"]["shards"][0].update(bytes=-1), ["shards[0].bytes", "found -1"]),
        (lambda t: t["dropped"].update(x=1.5), ["dropped.x", "1.5"]),
        (lambda t: t.update(sources={}), ["sources", "a list"]),
    ],
)
def test_broken_manifests_are_named(tmp_path: Path, change: Any, parts: list[str]) -> None:
    write_manifest(tmp_path, example())
    corrupt(tmp_path / MANIFEST_NAME, change)
    with pytest.raises(ShardFormatError) as caught:
        read_manifest(tmp_path)
    for part in [str(tmp_path / MANIFEST_NAME), *parts]:
        assert part in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b"\xff\xfe", b'{"a":1,"a":2}', b"NaN", b"[" * 100000])
def test_files_that_are_no_manifest(tmp_path: Path, data: bytes) -> None:
    (tmp_path / MANIFEST_NAME).write_bytes(data)
    with pytest.raises(ShardFormatError, match=r"manifest\.json"):
        read_manifest(tmp_path)


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(ShardFormatError, match="not found"):
        read_manifest(tmp_path)


def test_names() -> None:
    assert shard_name("train", 7) == "train-00007.arrow"
    assert set(SCHEMAS) == set(TEXT_COLUMNS)
    for task, column in TEXT_COLUMNS.items():
        assert column in SCHEMAS[task].names
    for good in ("train", "val", "test-dev", "unbalanced_dev"):
        check_split_name(good)
    for bad in ("", "../x", "a/b", "-a", "a-", ".a", "a b"):
        with pytest.raises(ShardFormatError):
            check_split_name(bad)
