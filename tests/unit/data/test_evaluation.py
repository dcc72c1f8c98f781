"""Evaluation batches: every pair once, the same in every run."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mt_deepspeed.config.run import DatasetConfig
from mt_deepspeed.data.order import evaluated_pairs
from mt_deepspeed.data.pipeline import TrainStream, eval_batches
from tests.helpers.datasets import configuration, make_rows


@given(num_pairs=st.integers(1, 10**9), count=st.integers(1, 500), seed=st.integers(0, 2**63))
def test_an_evaluation_takes_one_pair_of_each_stretch(num_pairs: int, count: int, seed: int) -> None:
    count = min(count, num_pairs)
    pairs = evaluated_pairs(np.arange(count), num_pairs, count, seed)
    starts = [i * num_pairs // count for i in range(count + 1)]
    assert all(first <= pair < last for first, pair, last in zip(starts[:-1], pairs, starts[1:], strict=True))


def test_kinds_that_take_turns_are_all_evaluated() -> None:
    kinds = np.bincount(evaluated_pairs(np.arange(300), 1800, 300, 0) % 3)
    assert kinds.min() > 70


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("max_samples", [0, 5, 12, 1000])
def test_evaluation_takes_every_pair_once(root: Path, world_size: int, max_samples: int) -> None:
    all_pairs = [caption for row in make_rows(7, seed=50) for caption in row["captions"]]
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
    assert set(taken) <= set(range(len(all_pairs)))
    assert {ids: rest for ids, *rest in found} == {ids: rest for ids, *rest in expected}
    assert len(found) == len(expected)
    assert len(expected) == (
        max_samples if 0 < max_samples < 1000 else sum(len(c) for c in val_captions(root))
    )


def val_captions(root: Path) -> list[list[str]]:
    stream = TrainStream(configuration(root, train=(DatasetConfig(path="one", splits=("val",)),)), 0, 1)
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
