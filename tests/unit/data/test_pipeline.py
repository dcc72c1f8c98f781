"""Streams: one for every number of ranks and workers, exact resume, batches as the contract says."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mt_deepspeed.config.run import DatasetConfig
from mt_deepspeed.data.collate import Batch, BatchMaker, MicroBatch
from mt_deepspeed.data.pipeline import TrainStream
from tests.helpers.datasets import configuration, make_rows, take, write_dataset


def merged(ranks: list[list[list[Batch]]]) -> list[list[Batch]]:
    """What one rank would see: the micro-batches of all ranks, rank by rank."""
    return [list(itertools.chain(*step)) for step in zip(*ranks, strict=True)]


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
    stream = TrainStream(config, 0, 1)
    steps = stream.num_pairs // 8
    seen = np.concatenate([micro.pairs for step in range(steps) for micro in stream.plan(step)])
    assert len(set(seen)) == len(seen) == steps * 8
    positions = np.concatenate([micro.positions for step in range(steps) for micro in stream.plan(step)])
    assert np.array_equal(np.sort(positions), np.arange(steps * 8))


def test_batches_are_what_the_contract_says(root: Path) -> None:
    captions = [
        caption
        for row in [*make_rows(23), *make_rows(11, seed=100), *make_rows(3, seed=150)]
        for caption in row["captions"]
    ]
    config = configuration(root, micro_batch_size=4)
    stream = TrainStream(config, 0, 1)
    for batch in itertools.chain(*itertools.islice(stream.steps(0), 4)):
        labels = batch["itm_labels"]
        false_images = int((labels == 0).sum())
        length = batch["text_ids"].shape[1]
        assert batch["pixels"].shape == (4 + false_images, 3, 16, 16)
        assert batch["pixels"].dtype == torch.uint8
        for key in ("text_ids", "text_mask", "mlm_ids", "mlm_labels"):
            assert batch[key].shape == (4, length)
            assert batch[key].dtype == torch.int64
        assert length == batch["text_mask"].sum(1).max() <= 12
        assert torch.equal(batch["text_mask"], (batch["text_ids"] != 1).long())
        chosen = batch["mlm_labels"] != -100
        assert chosen.any(1).all()
        assert torch.equal(batch["mlm_labels"][chosen], batch["text_ids"][chosen])
        assert torch.equal(batch["mlm_positions"], chosen.flatten().nonzero()[:, 0])
        assert torch.equal(batch["mlm_ids"][~chosen], batch["text_ids"][~chosen])
        index = batch["itm_image_index"]
        assert torch.equal(index[labels == 1], torch.arange(4)[labels == 1])
        assert torch.equal(index[labels == 0], torch.arange(4, 4 + false_images))
        for row, sample in enumerate(batch["sample_ids"].tolist()):
            assert isinstance(stream._maker, BatchMaker)
            assert stream._maker.tokenizer is not None
            ids = stream._maker.tokenizer.encode(captions[sample]).ids
            assert batch["text_ids"][row, : len(ids)].tolist() == ids.tolist()
    stream.close()


def test_texts_of_like_length_meet(root: Path) -> None:
    stream = TrainStream(configuration(root, global_batch_size=32), 0, 1)
    plans = [plan for step in range(5) for plan in stream.plan(step)]
    positions, pairs = (np.concatenate([getattr(p, name) for p in plans]) for name in ("positions", "pairs"))
    in_stream_order = stream._corpus.caption_bytes(pairs[np.argsort(positions)]).reshape(-1, 2)
    dealt = stream._corpus.caption_bytes(pairs).reshape(-1, 2)
    assert dealt.max(axis=1).sum() < 0.9 * in_stream_order.max(axis=1).sum()
    batch = take(configuration(root, padding="max_length"), 0, 1)[0][0]
    assert batch["text_ids"].shape[1] == 12


def test_half_of_the_pairs_match_and_the_others_never_do(root: Path) -> None:
    config = configuration(root, seed=11, train_transform="albef")
    stream = TrainStream(config, 0, 1)
    corpus, maker = stream._corpus, stream._maker
    assert isinstance(maker, BatchMaker)
    shown = {
        maker.picture(number, row, np.random.default_rng(0)).numpy().tobytes(): (number, row)
        for number, dataset in enumerate(corpus.datasets)
        for row in range(dataset.num_rows)
    }
    labels: list[tuple[int, int]] = []
    for step in range(20):
        for plan in stream.plan(step):
            batch, skipped = maker(plan)
            assert not skipped
            labels += zip(plan.positions.tolist(), batch["itm_labels"].tolist(), strict=True)
            pictures = [shown[picture.numpy().tobytes()] for picture in batch["pixels"]]
            matched = [pictures[i] for i in batch["itm_image_index"].tolist()]
            for i, pair in enumerate(plan.pairs.tolist()):
                own = corpus.sample(pair)
                assert pictures[i] == (own.dataset, own.row)
                assert matched[i][0] == own.dataset
                assert (matched[i][1] == own.row) == bool(batch["itm_labels"][i])
    found = [label for _, label in sorted(labels)]
    assert all(found[2 * k] + found[2 * k + 1] == 1 for k in range(80))
    assert 20 < sum(found[::2]) < 60


def test_in_batch_negatives_show_another_image(root: Path) -> None:
    config = configuration(root, itm_negatives="in_batch", micro_batch_size=8, global_batch_size=32)
    stream = TrainStream(config, 0, 1)
    for batch in itertools.chain(*itertools.islice(stream.steps(0), 3)):
        assert len(batch["pixels"]) == 8
        images = [stream._corpus.sample(i) for i in batch["sample_ids"].tolist()]
        for row, (index, label) in enumerate(
            zip(batch["itm_image_index"].tolist(), batch["itm_labels"].tolist(), strict=True)
        ):
            same = (images[row].dataset, images[row].row) == (images[index].dataset, images[index].row)
            assert same == bool(label)
            assert label == 0 or index == row


def test_in_batch_without_another_image_counts_as_matched(root: Path, tmp_path: Path) -> None:
    row = make_rows(1)[0] | {"captions": ["red ball", "blue ball", "red cube", "blue cube"]}
    write_dataset(tmp_path / "same", {"train": [row]})
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
    only_mlm = take(configuration(root, itm_weight=0.0), 0, 1)[0][0].keys()
    assert only_mlm == keys | {"mlm_ids", "mlm_labels", "mlm_positions"}
    only_itm = take(configuration(root, mlm_weight=0.0), 0, 1)[0][0].keys()
    assert only_itm == keys | {"itm_image_index", "itm_labels"}


def test_seed_changes_order_masks_and_crops(root: Path) -> None:
    one, other = take(configuration(root, seed=1), 0, 1)[0], take(configuration(root, seed=2), 0, 1)[0]
    assert [b["sample_ids"].tolist() for b in one] != [b["sample_ids"].tolist() for b in other]


def test_a_pair_looks_different_at_each_position(root: Path) -> None:
    stream = TrainStream(configuration(root, itm_weight=0.0), 0, 1)
    same = np.zeros(12, dtype=np.int64)
    batch, _ = stream._maker(MicroBatch(np.arange(12), same, same, same))
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
