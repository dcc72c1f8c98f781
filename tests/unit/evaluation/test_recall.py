"""Recall: equal to counting by hand, whatever the order; ties find nothing."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mt_deepspeed.evaluation.recall import NOT_SCORED, recall


def by_hand(scores: np.ndarray, image_of_text: np.ndarray, k: int) -> tuple[float, float]:
    """Image to text, text to image, for scores without ties."""
    to_text = [image in image_of_text[np.argsort(-row)[:k]] for image, row in enumerate(scores)]
    to_image = [image_of_text[text] in np.argsort(-column)[:k] for text, column in enumerate(scores.T)]
    return float(np.mean(to_text)), float(np.mean(to_image))


@settings(max_examples=40)
@given(images=st.integers(1, 12), extra=st.integers(0, 20), seed=st.integers(0, 2**16))
def test_equals_counting_by_hand_in_any_order(images: int, extra: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    image_of_text = rng.permutation(np.concatenate([np.arange(images), rng.integers(0, images, extra)]))
    scores = rng.permutation(images * len(image_of_text)).reshape(images, -1).astype(np.float32)
    found = recall(torch.from_numpy(scores), torch.from_numpy(image_of_text))
    for k in (1, 5, 10):
        assert (found[f"tr@{k}"], found[f"ir@{k}"]) == pytest.approx(by_hand(scores, image_of_text, k))
    assert found["r_mean"] == pytest.approx(
        sum(found[f"{way}@{k}"] for way in ("tr", "ir") for k in (1, 5, 10)) / 6
    )
    texts, rows = rng.permutation(len(image_of_text)), rng.permutation(images)
    moved = recall(
        torch.from_numpy(scores[rows][:, texts]), torch.from_numpy(np.argsort(rows)[image_of_text[texts]])
    )
    assert moved == pytest.approx(found)


class Group:
    """Ranks as threads that reduce tensors together."""

    def __init__(self, size: int) -> None:
        self.parts: list[torch.Tensor | None] = [None] * size
        self.barrier = threading.Barrier(size)

    def reduced(self, rank: int, tensor: torch.Tensor, maximum: bool) -> torch.Tensor:
        self.parts[rank] = tensor
        self.barrier.wait()
        stacked = torch.stack([part for part in self.parts if part is not None])
        self.barrier.wait()
        return stacked.max(dim=0).values if maximum else stacked.sum(dim=0)


@settings(max_examples=25, deadline=None)
@given(
    images=st.integers(1, 9),
    extra=st.integers(0, 9),
    ranks=st.integers(1, 4),
    levels=st.integers(1, 40),
    seed=st.integers(0, 2**16),
)
def test_rows_may_lie_on_any_rank_in_any_order(
    images: int, extra: int, ranks: int, levels: int, seed: int
) -> None:
    """With ties, pairs left out, and ranks without a row."""
    rng = np.random.default_rng(seed)
    owners = torch.from_numpy(np.concatenate([np.arange(images), rng.integers(0, images, extra)]))
    scores = torch.from_numpy(rng.integers(0, levels, (images, len(owners))).astype(np.float32))
    scores[torch.from_numpy(rng.random(scores.shape) < 0.2)] = NOT_SCORED
    wanted = recall(scores, owners)
    group = Group(ranks)
    shares = [torch.from_numpy(rows) for rows in np.array_split(rng.permutation(images), ranks)]

    def one(rank: int) -> dict[str, float]:
        return recall(
            scores[shares[rank]],
            owners,
            shares[rank],
            lambda tensor: group.reduced(rank, tensor, maximum=False),
            lambda tensor: group.reduced(rank, tensor, maximum=True),
        )

    with ThreadPoolExecutor(ranks) as pool:
        for found in pool.map(one, range(ranks)):
            assert found == pytest.approx(wanted)


def test_pairs_left_out_are_never_found() -> None:
    scores = torch.full((3, 3), NOT_SCORED)
    scores[0, 0] = 1.0
    found = recall(scores, torch.arange(3))
    assert found["tr@10"] == found["ir@1"] == pytest.approx(1 / 3)


def test_equal_scores_find_nothing() -> None:
    found = recall(torch.zeros(20, 20), torch.arange(20))
    assert found["tr@1"] == found["ir@10"] == found["r_mean"] == 0


def test_a_second_copy_of_a_right_text_changes_nothing_for_its_image() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0], [1.0, 2.0, 3.0]])
    before = recall(scores, torch.tensor([0, 1, 0]))
    doubled = recall(torch.cat([scores, scores[:, :1]], dim=1), torch.tensor([0, 1, 0, 0]))
    assert before["tr@1"] == doubled["tr@1"] == 0.5


def test_an_image_without_text_is_refused() -> None:
    with pytest.raises(ValueError, match="image 1 has no text"):
        recall(torch.zeros(2, 2), torch.tensor([0, 0]))
