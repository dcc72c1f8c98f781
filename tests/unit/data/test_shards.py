"""Reading shard folders: every pair and image by number, and every fault of a folder named."""

import contextlib
import multiprocessing
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_tools.shard_format import CAPTION_SCHEMA, ShardFormatError, ShardInfo, read_manifest, write_manifest
from mt_deepspeed.data import mapped_shard, shards
from mt_deepspeed.data.mapped_shard import IMAGE_OFFSETS, LIST_OFFSETS, TEXT_OFFSETS
from mt_deepspeed.data.shards import (
    CaptionDataset,
    ShardReadError,
)
from tests.helpers.datasets import make_rows, write_dataset
from tests.helpers.task_datasets import entailment_rows, nlvr2_rows, vqa_rows


def expected_pairs(rows: list[dict[str, Any]]) -> list[tuple[int, str]]:
    return [(i, caption) for i, row in enumerate(rows) for caption in row["captions"]]


def read_pairs(dataset: CaptionDataset) -> list[tuple[int, str]]:
    pairs = [dataset.pair(index) for index in range(dataset.num_pairs)]
    return [(pair.row, pair.caption) for pair in pairs]


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    captions=st.lists(st.lists(st.text(min_size=1, max_size=6), max_size=4), min_size=1, max_size=30),
    rows_per_shard=st.integers(1, 12),
    rows_per_batch=st.integers(1, 5),
)
def test_every_pair_and_image_is_found(
    captions: list[list[str]],
    rows_per_shard: int,
    rows_per_batch: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    rows = [
        {"image": bytes([i]) * i, "captions": texts, "image_id": f"é{i}", "width": 1, "height": 1}
        for i, texts in enumerate(captions)
    ]
    folder = tmp_path_factory.mktemp("data")
    dataset = CaptionDataset(
        write_dataset(folder, {"train": rows}, rows_per_shard, rows_per_batch), ["train"]
    )
    dataset.check()
    assert dataset.num_rows == len(rows)
    assert read_pairs(dataset) == expected_pairs(rows)
    assert [dataset.image(i).data.tobytes() for i in range(len(rows))] == [row["image"] for row in rows]
    lengths = dataset.caption_bytes(np.arange(dataset.num_pairs)[::-1])
    assert lengths.tolist()[::-1] == [len(text.encode()) for _, text in expected_pairs(rows)]
    assert f"é{len(rows) - 1}" in dataset.image(len(rows) - 1).where


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    splits = {"train": make_rows(23), "restval": make_rows(8, seed=100), "val": make_rows(5, seed=200)}
    return write_dataset(tmp_path_factory.mktemp("data") / "set", splits)


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "set", {"train": make_rows(23), "val": make_rows(5, seed=200)})


def test_splits_follow_each_other(folder: Path) -> None:
    dataset = CaptionDataset(folder, ["restval", "train"])
    assert read_pairs(dataset) == expected_pairs(make_rows(8, seed=100) + make_rows(23))
    assert dataset.digest == CaptionDataset(folder, ["val"]).digest


def test_images_are_views_of_the_file(folder: Path) -> None:
    data = CaptionDataset(folder, ["train"]).image(3).data
    assert not data.flags.owndata
    assert not data.flags.writeable


def test_shards_open_when_touched(folder: Path) -> None:
    dataset = CaptionDataset(folder, ["train"])
    assert not dataset._open
    dataset.image(12)
    assert list(dataset._open) == [1]


def test_a_check_can_be_shared_out(folder: Path) -> None:
    parts = [CaptionDataset(folder, ["train"]) for _ in range(2)]
    for i, dataset in enumerate(parts):
        dataset.check(i, 2)
    assert [sorted(dataset._open) for dataset in parts] == [[0, 2], [1]]


def test_threads_forks_and_pickles_read_the_same(folder: Path) -> None:
    dataset = CaptionDataset(folder, ["train"])
    expected = read_pairs(CaptionDataset(folder, ["train"]))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(read_pairs, [dataset] * 8)) == [expected] * 8
    with multiprocessing.get_context("fork").Pool(1) as processes:
        assert processes.apply(read_pairs, (dataset,)) == expected
    copy = pickle.loads(pickle.dumps(dataset))
    assert not copy._open
    assert read_pairs(copy) == expected


def test_unknown_split_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"'test'.*choose from \['restval', 'train', 'val'\]"):
        CaptionDataset(folder, ["train", "test"])
    with pytest.raises(ValueError, match="each once"):
        CaptionDataset(folder, ["train", "train"])


def test_missing_shard_is_refused(copied: Path) -> None:
    (copied / "train-00001.arrow").unlink()
    with pytest.raises(ShardFormatError, match=r"train-00001\.arrow: missing"):
        CaptionDataset(copied, ["train"])
    CaptionDataset(copied, ["val"])


def test_extra_and_renamed_shards_are_refused(copied: Path) -> None:
    (copied / "train-00002.arrow").rename(copied / "train-00003.arrow")
    with pytest.raises(ShardFormatError, match=r"train-00003\.arrow: not named"):
        CaptionDataset(copied, ["train"])


def test_cut_shard_is_refused(copied: Path) -> None:
    path = copied / "train-00000.arrow"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ShardFormatError, match=r"train-00000\.arrow: \d+ bytes, but"):
        CaptionDataset(copied, ["train"])


def test_wrong_counts_are_refused(copied: Path) -> None:
    manifest = read_manifest(copied)
    shards = manifest.splits["train"].shards
    wrong = ShardInfo(shards[1].file, shards[1].rows + 1, shards[1].texts, shards[1].bytes, shards[1].sha256)
    split = type(manifest.splits["train"]).of((shards[0], wrong, *shards[2:]))
    write_manifest(copied, type(manifest)(**vars(manifest) | {"splits": {"train": split}}))
    (copied / "val-00000.arrow").unlink()
    with pytest.raises(ShardFormatError, match=r"train-00001\.arrow: 10 rows and .* says 11"):
        CaptionDataset(copied, ["train"]).check()


def replace_shard(folder: Path, data: bytes) -> None:
    """Puts other content under the name of train-00000 and fits the manifest to its size."""
    (folder / "train-00000.arrow").write_bytes(data)
    manifest = read_manifest(folder)
    first, *others = manifest.splits["train"].shards
    info = ShardInfo(first.file, first.rows, first.texts, len(data), first.sha256)
    splits = {**manifest.splits, "train": type(manifest.splits["train"]).of((info, *others))}
    write_manifest(folder, type(manifest)(**vars(manifest) | {"splits": splits}))


def arrow_file(table: pa.Table, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table, 4)
    return sink.getvalue().to_pybytes()


def test_other_content_is_refused(copied: Path) -> None:
    table = pa.Table.from_pylist(make_rows(10), schema=CAPTION_SCHEMA)
    contents = {
        "not a readable Arrow": b"nothing of the kind",
        "schema": arrow_file(table.drop_columns(["width"])),
        "compressed": arrow_file(table, compression="lz4"),
    }
    for message, data in contents.items():
        replace_shard(copied, data)
        with pytest.raises(ShardFormatError, match=message):
            CaptionDataset(copied, ["train"]).check()


def test_damaged_offsets_and_texts_are_named(copied: Path) -> None:
    path = copied / "train-00000.arrow"
    data = path.read_bytes()
    caption = make_rows(23)[2]["captions"][0].encode()
    path.write_bytes(data.replace(caption, b"\xff" * len(caption), 1))
    dataset = CaptionDataset(copied, ["train"])
    index = [row for row, _ in expected_pairs(make_rows(23))].index(2)
    with pytest.raises(ShardReadError, match=r"train-00000\.arrow: row 2: captions: .*utf-8"):
        dataset.pair(index)

    first = dataset._shard(0)._spans[0]
    parts = ((IMAGE_OFFSETS, dataset.image), (TEXT_OFFSETS, dataset.pair), (LIST_OFFSETS, dataset.pair))
    for buffer, read in parts:
        start = int(first[buffer, 0])
        path.write_bytes(data[: start + 4] + b"\x7f" * 8 + data[start + 12 :])
        damaged = CaptionDataset(copied, ["train"])
        damaged.check()
        with pytest.raises(ShardReadError, match=r"train-00000\.arrow.*damaged"):
            getattr(damaged, read.__name__)(0)


def test_the_first_pair_of_every_image_with_texts(tmp_path: Path) -> None:
    rows = make_rows(23)
    for empty in (0, 7, 22):
        rows[empty]["captions"] = []
    dataset = CaptionDataset(write_dataset(tmp_path / "set", {"train": rows}), ["train"])
    pairs = expected_pairs(rows)
    first = {row: index for index, (row, _) in reversed(list(enumerate(pairs)))}
    assert dataset.first_pairs().tolist() == sorted(first.values())


def test_rows_of_every_task_are_read(tmp_path: Path) -> None:
    questions = vqa_rows(11, num_answers=6)
    folder = write_dataset(tmp_path / "vqa", {"train": questions}, task="vqa")
    dataset = CaptionDataset(folder, ["train"], "vqa")
    wanted = [(row, k) for row in questions for k in range(len(row["questions"]))]
    assert dataset.num_pairs == len(wanted)
    for index, (row, k) in enumerate(wanted):
        assert dataset.pair(index).caption == row["questions"][k]
        columns = ("question_ids", "answers", "labels", "scores")
        assert dataset.annotations(index) == {name: row[name][k] for name in columns}

    pairs = nlvr2_rows(5)
    dataset = CaptionDataset(
        write_dataset(tmp_path / "nlvr2", {"dev": pairs}, task="nlvr2"), ["dev"], "nlvr2"
    )
    for number, row in enumerate(pairs):
        for image in (0, 1):
            assert dataset.image(number, image).data.tobytes() == row[f"image_{image}"]
    assert dataset.annotations(1) == {
        "identifiers": pairs[0]["identifiers"][1],
        "labels": pairs[0]["labels"][1],
    }
    with pytest.raises(ShardFormatError, match=r"task 'nlvr2', expected 'entailment'"):
        CaptionDataset(tmp_path / "nlvr2", ["dev"], "entailment")

    sentences = entailment_rows(3)
    sentences[1]["labels"] = sentences[1]["labels"][:-1]
    folder = write_dataset(tmp_path / "snli", {"dev": sentences}, task="entailment")
    dataset = CaptionDataset(folder, ["dev"], "entailment")
    assert dataset.annotations(0)["premises"] == sentences[0]["premises"][0]
    with pytest.raises(ShardReadError, match=r"dev-00000\.arrow: row 1: labels: found 2 entries, expected 3"):
        dataset.annotations(len(sentences[0]["hypotheses"]))


def anonymous_bytes() -> int:
    """Memory of this process that is no file."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) * 1024


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's memory figures")
def test_reading_everything_keeps_nothing(tmp_path: Path) -> None:
    rows = [
        {"image": bytes(200_000), "captions": ["a", "b"], "image_id": str(i), "width": 1, "height": 1}
        for i in range(400)
    ]
    dataset = CaptionDataset(write_dataset(tmp_path / "large", {"train": rows}, 100, 50), ["train"])
    del rows
    dataset.check()
    before = anonymous_bytes()
    total = 0
    for index in range(dataset.num_pairs):
        total += int(dataset.image(dataset.pair(index).row).data.max()) + 200_000
    assert total == 160_000_000
    assert anonymous_bytes() - before < 10_000_000


@settings(max_examples=60, deadline=None)
@given(changes=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4))
def test_altered_shards_are_told_or_read_but_never_crash(
    changes: list[tuple[int, int]], altered: Path
) -> None:
    path = altered / "train-00000.arrow"
    intact = path.read_bytes()
    data = bytearray(intact)
    for place, value in changes:
        data[-1 - place % len(data)] = value  # from the end, where the structure is
    path.write_bytes(data)
    dataset = CaptionDataset(altered, ["train"])
    with contextlib.suppress(ShardFormatError):
        dataset.check()
        dataset.caption_bytes(np.arange(dataset.num_pairs))
        dataset.read_ahead(0, dataset.num_pairs)
        for index in range(dataset.num_pairs):
            with contextlib.suppress(ShardReadError):
                dataset.image(dataset.pair(index).row)
    path.write_bytes(intact)


@pytest.fixture(scope="module")
def altered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("altered") / "set", {"train": make_rows(9)})


def test_only_so_many_shards_stay_open(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "MAX_OPEN_SHARDS", 2)
    dataset = CaptionDataset(folder, ["train"])
    rows = make_rows(23)
    for row in (0, 11, 22, 0, 12, 1, 21):
        assert dataset.image(row).data.tobytes() == rows[row]["image"]
        assert len(dataset._open) <= 2
    kept = dataset.image(5).data
    dataset.image(15), dataset.image(22)
    assert kept.tobytes() == rows[5]["image"]


def test_sizes_of_images_are_those_of_the_shard(folder: Path) -> None:
    dataset = CaptionDataset(folder, ["train"])
    for number, row in enumerate(make_rows(23)):
        image = dataset.image(number)
        assert (image.width, image.height) == (row["width"], row["height"])


def test_read_ahead_covers_the_images_of_the_pairs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = CaptionDataset(folder, ["train", "val"])
    asked: list[tuple[str, int, int]] = []
    monkeypatch.setattr(
        mapped_shard.MappedShard,
        "read_ahead",
        lambda self, first, last: asked.append((self.path.name, first, last)),
    )
    dataset.read_ahead(0, dataset.num_pairs)
    texts = [sum(len(row["captions"]) for row in make_rows(23)[i : i + 10]) for i in (0, 10, 20)]
    texts.append(sum(len(row["captions"]) for row in make_rows(5, seed=200)))
    names = ["train-00000.arrow", "train-00001.arrow", "train-00002.arrow", "val-00000.arrow"]
    assert asked == [(name, 0, count) for name, count in zip(names, texts, strict=True)]
    asked.clear()
    dataset.read_ahead(texts[0] - 2, texts[0] + 3)
    assert asked == [(names[0], texts[0] - 2, texts[0]), (names[1], 0, 3)]
    monkeypatch.undo()
    dataset.read_ahead(0, dataset.num_pairs)
    for first in range(dataset.num_pairs):
        dataset.read_ahead(first, first + 1)
