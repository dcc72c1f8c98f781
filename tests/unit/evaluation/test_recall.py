"""Recall: equal to counting by hand, whatever the order; ties find nothing."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mt_deepspeed.evaluation.recall import recall


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
