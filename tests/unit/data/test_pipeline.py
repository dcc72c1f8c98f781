"""Streams: one for every number of ranks and workers, exact resume, clear errors at the start."""

import dataclasses
import itertools
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mt_deepspeed.config.model import ModelConfig, TextTowerConfig, VisionTowerConfig
from mt_deepspeed.config.run import DataConfig, DatasetConfig, ObjectivesConfig, RunConfig, TrainConfig
from mt_deepspeed.data.collate import Batch, MicroBatch
from mt_deepspeed.data.pipeline import PretrainStream, eval_batches
from mt_deepspeed.data.shards import ShardReadError
from mt_deepspeed.data.text import train_tokenizer

VOCABULARY = 320
Rows = Callable[..., list[dict[str, Any]]]
Writer = Callable[..., Path]


@pytest.fixture(scope="module")
def root(rows: Rows, dataset_writer: Writer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("root")
    dataset_writer(root / "one", {"train": rows(23), "val": rows(7, seed=50)})
    dataset_writer(root / "two", {"train": rows(11, seed=100), "extra": rows(3, seed=150)})
    captions = [caption for row in rows(40) for caption in row["captions"]]
    train_tokenizer(captions, root / "tokenizer", VOCABULARY)
    return root


def configuration(root: Path, **changes: Any) -> RunConfig:
    """A small run; `changes` name fields of the data, objectives and train sections."""
    sections: dict[str, Any] = {
        "data": DataConfig(
            root=str(root),
            train=(DatasetConfig(path="one"), DatasetConfig(path="two", splits=("train", "extra"))),
            eval=(DatasetConfig(path="one", splits=("val",)),),
            tokenizer="tokenizer",
            max_text_len=12,
            num_workers=0,
            train_transform="albef_randaug",
        ),
        "objectives": ObjectivesConfig(),
        "train": TrainConfig(global_batch_size=8, micro_batch_size=2, seed=3),
    }
    for name, section in sections.items():
        fields = {field.name for field in dataclasses.fields(section)}
        own = {key: value for key, value in changes.items() if key in fields}
        sections[name] = dataclasses.replace(section, **own)
    model = ModelConfig(
        text=TextTowerConfig(vocab_size=VOCABULARY, max_positions=40),
        vision=VisionTowerConfig(image_size=16, patch_size=8),
    )
    return RunConfig(model=model, **sections)


def take(
    config: RunConfig, first_step: int, steps: int, rank: int = 0, world_size: int = 1
) -> list[list[Batch]]:
    stream = PretrainStream(config, rank, world_size)
    result = list(itertools.islice(stream.steps(first_step), steps))
    stream.close()
    return result


def merged(ranks: list[list[list[Batch]]]) -> list[list[Batch]]:
    """What one rank would see: the micro-batches of all ranks, accumulation step by accumulation step."""
    return [
        [micro for group in zip(*step, strict=True) for micro in group] for step in zip(*ranks, strict=True)
    ]


def assert_equal(a: list[list[Batch]], b: list[list[Batch]]) -> None:
    assert [len(step) for step in a] == [len(step) for step in b]
    for one, other in zip(itertools.chain(*a), itertools.chain(*b), strict=True):
        assert one.keys() == other.keys()
        for key in one:
            assert torch.equal(one[key], other[key]), key


STREAMS = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**40),
        "padding": st.sampled_from(["longest", "max_length"]),
        "itm_negatives": st.sampled_from(["dataset", "in_batch"]),
        "train": st.sampled_from(
            [
                (DatasetConfig(path="one"), DatasetConfig(path="two", splits=("train", "extra"))),
                (DatasetConfig(path="one", weight=1.0), DatasetConfig(path="two", weight=3.0)),
            ]
        ),
    }
)


@settings(max_examples=12)
@given(
    changes=STREAMS, micro=st.integers(2, 3), accumulation=st.integers(1, 2), first_step=st.integers(0, 40)
)
def test_ranks_and_workers_share_one_stream(
    root: Path, changes: dict[str, Any], micro: int, accumulation: int, first_step: int
) -> None:
    size = {"global_batch_size": micro * accumulation * 4, "micro_batch_size": micro}
    config = configuration(root, **changes, **size)
    alone = take(config, first_step, 2)
    for world_size in (2, 4):
        assert_equal(alone, merged([take(config, first_step, 2, r, world_size) for r in range(world_size)]))
    for workers in (1, 3):
        assert_equal(alone, take(configuration(root, **changes, **size, num_workers=workers), first_step, 2))


@settings(max_examples=10)
@given(
    changes=STREAMS,
    stops=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    workers=st.sampled_from([0, 3]),
)
def test_kill_and_resume_change_nothing(
    root: Path, changes: dict[str, Any], stops: list[int], workers: int
) -> None:
    config = configuration(root, **changes)
    start = 8  # an epoch ends about here
    whole = take(config, start, sum(stops))
    parts, done = [], 0
    for steps in stops:
        resumed = dataclasses.replace(config, data=dataclasses.replace(config.data, num_workers=workers))
        parts += take(resumed, start + done, steps)
        done += steps
    assert_equal(whole, parts)


def test_worker_processes_give_the_same_stream(root: Path) -> None:
    whole = take(configuration(root), 5, 3)
    assert_equal(whole, take(configuration(root, num_workers=2, worker_kind="process"), 5, 3))


def test_an_epoch_holds_every_pair_once(root: Path) -> None:
    config = configuration(root, global_batch_size=8)
    stream = PretrainStream(config, 0, 1)
    steps = stream.num_pairs // 8
    seen = np.concatenate([micro.samples for step in range(steps) for micro in stream.plan(step)])
    assert len(set(seen)) == len(seen) == steps * 8
    positions = np.concatenate([micro.positions for step in range(steps) for micro in stream.plan(step)])
    assert np.array_equal(np.sort(positions), np.arange(steps * 8))


def test_batches_are_what_the_contract_says(root: Path, rows: Rows) -> None:
    captions = [
        caption for row in [*rows(23), *rows(11, seed=100), *rows(3, seed=150)] for caption in row["captions"]
    ]
    config = configuration(root, micro_batch_size=4)
    stream = PretrainStream(config, 0, 1)
    for batch in itertools.chain(*itertools.islice(stream.steps(0), 4)):
        labels = batch["itm_labels"]
        false_images = int((labels == 0).sum())
        length = batch["text_ids"].shape[1]
        assert batch["pixels"].shape == (4 + false_images, 3, 16, 16)
        assert batch["pixels"].dtype == torch.float32
        for key in ("text_ids", "text_mask", "mlm_ids", "mlm_labels"):
            assert batch[key].shape == (4, length)
            assert batch[key].dtype == torch.int64
        assert length == batch["text_mask"].sum(1).max() <= 12
        assert torch.equal(batch["text_mask"], (batch["text_ids"] != 1).long())
        chosen = batch["mlm_labels"] != -100
        assert chosen.any(1).all()
        assert torch.equal(batch["mlm_labels"][chosen], batch["text_ids"][chosen])
        assert torch.equal(batch["mlm_ids"][~chosen], batch["text_ids"][~chosen])
        index = batch["itm_image_index"]
        assert torch.equal(index[labels == 1], torch.arange(4)[labels == 1])
        assert torch.equal(index[labels == 0], torch.arange(4, 4 + false_images))
        for row, sample in enumerate(batch["sample_ids"].tolist()):
            ids = stream._maker.tokenizer.encode(captions[sample]).ids
            assert batch["text_ids"][row, : len(ids)].tolist() == ids.tolist()
    stream.close()


def test_texts_of_like_length_meet(root: Path) -> None:
    def tokens(padding: str) -> int:
        steps = take(configuration(root, padding=padding, global_batch_size=16), 0, 3)
        return sum(batch["text_ids"].numel() for step in steps for batch in step)

    assert tokens("longest") < 0.8 * tokens("max_length")
    batch = take(configuration(root, padding="max_length"), 0, 1)[0][0]
    assert batch["text_ids"].shape[1] == 12


def test_half_of_the_pairs_match_and_the_others_never_do(root: Path) -> None:
    config = configuration(root, seed=11)
    stream = PretrainStream(config, 0, 1)
    labels: list[tuple[int, int]] = []
    for step in range(20):
        for plan in stream.plan(step):
            batch = stream._maker(plan)
            labels += zip(plan.positions.tolist(), batch["itm_labels"].tolist(), strict=True)
            samples = [stream._corpus.sample(i) for i in plan.samples.tolist()]
            positions = plan.positions.tolist()
            itm, index = batch["itm_labels"].numpy(), np.arange(len(samples))
            for i, (dataset, row, _, _) in zip(
                np.flatnonzero(itm == 0),
                stream._maker._false_images(samples, positions, itm, index),
                strict=True,
            ):
                assert dataset == samples[i].dataset
                assert row != samples[i].row
                assert 0 <= row < stream._corpus.datasets[dataset].num_rows
    found = [label for _, label in sorted(labels)]
    assert all(found[2 * k] + found[2 * k + 1] == 1 for k in range(80))
    assert 20 < sum(found[::2]) < 60


def test_in_batch_negatives_show_another_image(root: Path) -> None:
    config = configuration(root, itm_negatives="in_batch", micro_batch_size=8, global_batch_size=32)
    stream = PretrainStream(config, 0, 1)
    for batch in itertools.chain(*itertools.islice(stream.steps(0), 3)):
        assert len(batch["pixels"]) == 8
        images = [stream._corpus.sample(i) for i in batch["sample_ids"].tolist()]
        for row, (index, label) in enumerate(
            zip(batch["itm_image_index"].tolist(), batch["itm_labels"].tolist(), strict=True)
        ):
            same = (images[row].dataset, images[row].row) == (images[index].dataset, images[index].row)
            assert same == bool(label)
            assert label == 0 or index == row


def test_in_batch_without_another_image_counts_as_matched(
    root: Path, rows: Rows, dataset_writer: Writer, tmp_path: Path
) -> None:
    row = rows(1)[0] | {"captions": ["red ball", "blue ball", "red cube", "blue cube"]}
    dataset_writer(tmp_path / "same", {"train": [row]})
    data = {"train": (DatasetConfig(path=str(tmp_path / "same")),), "eval": ()}
    config = configuration(root, **data, itm_negatives="in_batch", global_batch_size=4)
    for batch in take(config, 0, 2)[0]:
        assert batch["itm_labels"].tolist() == [1, 1]
        assert batch["itm_image_index"].tolist() == [0, 1]


def test_objectives_that_are_off_leave_their_keys_out(root: Path) -> None:
    keys = {"pixels", "text_ids", "text_mask", "sample_ids"}
    off = take(configuration(root, mlm_weight=0.0, itm_weight=0.0), 0, 1)[0][0]
    assert off.keys() == keys
    assert len(off["pixels"]) == 2
    assert take(configuration(root, itm_weight=0.0), 0, 1)[0][0].keys() == keys | {"mlm_ids", "mlm_labels"}
    only_itm = take(configuration(root, mlm_weight=0.0), 0, 1)[0][0].keys()
    assert only_itm == keys | {"itm_image_index", "itm_labels"}


def test_seed_changes_order_masks_and_crops(root: Path) -> None:
    one, other = take(configuration(root, seed=1), 0, 1)[0], take(configuration(root, seed=2), 0, 1)[0]
    assert [b["sample_ids"].tolist() for b in one] != [b["sample_ids"].tolist() for b in other]


def test_a_pair_looks_different_at_each_position(root: Path) -> None:
    stream = PretrainStream(configuration(root, itm_weight=0.0), 0, 1)
    batch = stream._maker(MicroBatch(np.arange(12), np.zeros(12, dtype=np.int64)))
    assert len(batch["text_ids"].unique(dim=0)) == 1
    assert len(batch["mlm_ids"].unique(dim=0)) > 3
    assert len(batch["pixels"].unique(dim=0)) == 12


def test_loader_threads_leave_the_trainer_its_threads(root: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        take(configuration(root, num_workers=2), 0, 2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("max_samples", [0, 5, 12, 1000])
def test_evaluation_takes_every_pair_once(root: Path, rows: Rows, world_size: int, max_samples: int) -> None:
    all_pairs = [caption for row in rows(7, seed=50) for caption in row["captions"]]
    config = configuration(root, micro_batch_size=2, itm_negatives="in_batch")
    ranks = [list(eval_batches(config, rank, world_size, max_samples)) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    whole = list(eval_batches(configuration(root, micro_batch_size=100, seed=9), 0, 1, max_samples))
    assert len(whole) == 1
    found = [
        (int(batch["sample_ids"][i]), int(batch["itm_labels"][i]), batch["mlm_labels"][i].unique().tolist())
        for batches in ranks
        for batch in batches
        for i in range(len(batch["sample_ids"]))
    ]
    expected = [
        (
            int(whole[0]["sample_ids"][i]),
            int(whole[0]["itm_labels"][i]),
            whole[0]["mlm_labels"][i].unique().tolist(),
        )
        for i in range(len(whole[0]["sample_ids"]))
    ]
    taken = [ids for ids, _, _ in expected]
    assert taken == sorted(set(taken))
    gaps = np.diff([*taken, len(all_pairs)])
    assert gaps.max() - gaps.min() <= 1
    assert {ids: rest for ids, *rest in found} == {ids: rest for ids, *rest in expected}
    assert len(found) == len(expected)
    assert len(expected) == (
        max_samples if 0 < max_samples < 1000 else sum(len(c) for c in val_captions(root))
    )


def val_captions(root: Path) -> list[list[str]]:
    stream = PretrainStream(configuration(root, train=(DatasetConfig(path="one", splits=("val",)),)), 0, 1)
    by_row: dict[int, list[str]] = {}
    for index in range(stream.num_pairs):
        sample = stream._corpus.sample(index)
        by_row.setdefault(sample.row, []).append(sample.caption)
    return list(by_row.values())


def test_empty_evaluation_batches_have_shapes(root: Path) -> None:
    batches = list(eval_batches(configuration(root), 3, 4, 2))
    assert [len(batch["sample_ids"]) for batch in batches] == [0]
    assert batches[0]["pixels"].shape == (0, 3, 16, 16)
    assert batches[0]["text_ids"].shape[0] == batches[0]["itm_labels"].shape[0] == 0
    assert batches[0]["text_ids"].dtype == batches[0]["itm_image_index"].dtype == torch.int64


@pytest.mark.parametrize("num_workers", [0, 2])
def test_unreadable_image_names_file_row_and_reason(
    root: Path, rows: Rows, dataset_writer: Writer, tmp_path: Path, num_workers: int
) -> None:
    bad = rows(12)
    bad[7]["image"] = bad[7]["image"][:-40]
    dataset_writer(tmp_path / "bad", {"train": bad}, rows_per_shard=5)
    config = configuration(root, train=(DatasetConfig(path=str(tmp_path / "bad")),), num_workers=num_workers)
    stream = PretrainStream(config, 0, 1)
    with pytest.raises(
        ShardReadError, match=r"train-00001\.arrow: row 2: image 'picture-0-7\.jpg': cannot decode"
    ):
        list(itertools.islice(stream.steps(0), 20))
    stream.close()


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "no data": ({"train": ()}, "data.train: empty"),
    "half weighted": (
        {"train": (DatasetConfig(path="one", weight=1.0), DatasetConfig(path="two"))},
        "1 of 2 data sets have a weight",
    ),
    "weight in evaluation": ({"eval": (DatasetConfig(path="one", weight=1.0),)}, "weights have no meaning"),
    "no folder": ({"train": (DatasetConfig(path="three"),)}, "three"),
    "no split": ({"train": (DatasetConfig(path="one", splits=("test",)),)}, "choose from"),
    "evaluation unreadable": ({"eval": (DatasetConfig(path="three"),)}, "three"),
    "no tokenizer": ({"tokenizer": "one"}, r"vocab\.json"),
    "long texts": ({"max_text_len": 39}, "choose 3 to 38"),
    "few pairs": ({"global_batch_size": 1000}, "fewer than train.global_batch_size 1000"),
    "no multiple": ({"global_batch_size": 9}, "no multiple"),
    "transform": ({"train_transform": "crop"}, "train_transform 'crop'"),
    "random evaluation": ({"eval_transform": "clip_randaug"}, "eval_transform 'clip_randaug'"),
    "micro-batch of one": (
        {"micro_batch_size": 1, "itm_negatives": "in_batch"},
        "needs train.micro_batch_size >= 2",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_told_before_training(root: Path, name: str) -> None:
    changes, message = FAULTS[name]
    with pytest.raises(ValueError, match=message):
        PretrainStream(configuration(root, **changes), 0, 1)


def test_tokenizer_and_model_must_fit(root: Path) -> None:
    config = configuration(root)
    for text, message in (
        (TextTowerConfig(vocab_size=500), r"has 320 tokens, model\.text\.vocab_size is 500"),
        (TextTowerConfig(vocab_size=VOCABULARY, pad_token_id=0), "pads with 1"),
    ):
        other = dataclasses.replace(config, model=dataclasses.replace(config.model, text=text))
        with pytest.raises(ValueError, match=message):
            PretrainStream(other, 0, 1)


def test_one_image_gives_no_negatives(root: Path, rows: Rows, dataset_writer: Writer, tmp_path: Path) -> None:
    dataset_writer(tmp_path / "lonely", {"train": rows(1)})
    with pytest.raises(ValueError, match="at least two images"):
        PretrainStream(configuration(root, train=(DatasetConfig(path=str(tmp_path / "lonely")),)), 0, 1)


@pytest.mark.slow
def test_a_killed_worker_process_ends_the_run(root: Path) -> None:
    stream = PretrainStream(configuration(root, num_workers=1, worker_kind="process"), 0, 1)
    steps = stream.steps(0)
    next(steps)
    (worker,) = multiprocessing.active_children()
    worker.kill()
    # DataLoader names the worker, unless it died while handing over a batch: then the connection breaks.
    with pytest.raises((RuntimeError, EOFError, ConnectionError)):
        list(itertools.islice(steps, 100))
