"""Objectives against their definitions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mt_deepspeed.objectives.classification import cross_entropy, false_text_loss, vqa_loss
from mt_deepspeed.objectives.contrastive import contrastive_loss, three_way_contrastive_loss
from mt_deepspeed.objectives.hard_negatives import draw_negatives, negative_weights
from mt_deepspeed.objectives.mlm import gather_labelled


def _unit(rows: int, size: int = 5, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(rows, size, generator=generator), dim=-1)


def test_mlm_equals_the_dense_loss() -> None:
    torch.manual_seed(0)
    feats, head = torch.randn(3, 7, 4), torch.nn.Linear(4, 11)
    labels = torch.randint(0, 11, (3, 7))
    labels[torch.rand(3, 7) < 0.6] = -100
    dense = torch.nn.functional.cross_entropy(head(feats).flatten(0, 1), labels.flatten(), ignore_index=-100)
    some, targets = gather_labelled(feats, labels)
    assert len(some) == int((labels != -100).sum())
    torch.testing.assert_close(cross_entropy(head(some), targets), dense)


def test_nothing_to_predict_gives_an_attached_zero() -> None:
    head = torch.nn.Linear(4, 3)
    value = cross_entropy(head(torch.randn(0, 4)), torch.zeros(0, dtype=torch.long))
    assert value.item() == 0.0
    value.backward()
    assert head.weight.grad is not None
    assert not head.weight.grad.any()


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 6), images=st.integers(1, 4), temperature=st.floats(0.01, 0.4))
def test_contrastive_by_hand(rows: int, images: int, temperature: float) -> None:
    text, image = _unit(rows, seed=1), _unit(rows, seed=2)
    ids = torch.arange(rows) % images
    result = contrastive_loss(text, image, torch.tensor([temperature]), ids)
    total = 0.0
    for queries, keys in ((image, text), (text, image)):
        for row in range(rows):
            logits = [float(queries[row] @ key) / temperature for key in keys]
            log_sum = math.log(sum(math.exp(value - max(logits)) for value in logits)) + max(logits)
            positives = [column for column in range(rows) if ids[column] == ids[row]]
            total -= sum(logits[column] - log_sum for column in positives) / len(positives)
    assert result.loss.item() == pytest.approx(total / rows / 2, rel=1e-4, abs=1e-5)
    torch.testing.assert_close(result.logits_i2t, result.logits_t2i.T)


def test_contrastive_over_ranks_is_the_loss_of_one_batch() -> None:
    text, image = _unit(6, seed=1), _unit(6, seed=2)
    temperature = torch.tensor([0.1])
    whole = contrastive_loss(text, image, temperature)

    def gather(x: Tensor) -> Tensor:
        return (
            text if torch.equal(x, text[3:]) else image if torch.equal(x, image[3:]) else torch.arange(6) % 2
        )

    part = contrastive_loss(text[3:], image[3:], temperature, gather=gather, first_row=3)
    torch.testing.assert_close(part.logits_i2t, whole.logits_i2t[3:])
    assert torch.equal(part.positives, whole.positives[3:])
    shared = contrastive_loss(
        text[3:], image[3:], temperature, (torch.arange(6) % 2)[3:], gather=gather, first_row=3
    )
    assert torch.equal(shared.positives, (torch.arange(3, 6)[:, None] - torch.arange(6)) % 2 == 0)


def test_temperature_is_clamped_but_still_learns() -> None:
    text, image = _unit(3, seed=1), _unit(3, seed=2)
    cold = torch.tensor([1e-6], requires_grad=True)
    result = contrastive_loss(text, image, cold)
    torch.testing.assert_close(result.logits_t2i, text @ image.T / 0.001)
    result.loss.backward()
    assert cold.grad is not None
    assert cold.grad.abs() > 0


def test_three_way_loss_uses_one_direction_per_pair() -> None:
    text, image, fused = _unit(4, seed=1), _unit(4, seed=2), _unit(4, seed=3)
    scale = torch.tensor([1.3])
    target = torch.arange(4)
    entropy = torch.nn.functional.cross_entropy
    expected = sum(
        entropy(scale.exp() * a @ b.T, target) for a, b in ((text, image), (text, fused), (image, fused))
    )
    torch.testing.assert_close(three_way_contrastive_loss(text, image, fused, scale), expected / 3)


def test_negatives_are_never_positives_and_follow_the_weights() -> None:
    logits = torch.tensor([[5.0, 2.0, 0.0, 1.0], [0.0, 9.0, 1.0, 1.0]])
    positives = torch.tensor([[True, False, False, False], [False, True, True, False]])
    weights = negative_weights(logits, positives)
    torch.manual_seed(0)
    draws = torch.stack([draw_negatives(weights, positives) for _ in range(4000)])
    assert not positives[0][draws[:, 0]].any()
    assert not positives[1][draws[:, 1]].any()
    expected = weights[0] / weights[0].sum()
    share = torch.bincount(draws[:, 0], minlength=4) / 4000
    # Five standard deviations of a share of 4000 draws.
    assert (share - expected).abs().max() < 5 * 0.5 / 4000**0.5


def test_vanished_weights_draw_any_negative_and_a_row_without_one_any_column() -> None:
    positives = torch.tensor([[True, False, False]])
    weights = torch.zeros(1, 3)
    draws = {int(draw_negatives(weights, positives)) for _ in range(60)}
    assert draws == {1, 2}
    broken = torch.tensor([[0.0, float("nan"), 0.2]])
    assert {int(draw_negatives(broken, positives)) for _ in range(60)} == {1, 2}
    positives = torch.tensor([[True, True]])
    assert {int(draw_negatives(torch.zeros(1, 2), positives)) for _ in range(60)} == {0, 1}


def test_classification_and_retrieval() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(3, 7), torch.rand(3, 7)
    probability = torch.sigmoid(logits)
    by_hand = -(targets * probability.log() + (1 - targets) * (1 - probability).log()).sum() / 3
    torch.testing.assert_close(vqa_loss(logits, targets), by_hand)
    scores = torch.randn(4, 6)
    torch.testing.assert_close(false_text_loss(scores), -scores.log_softmax(1)[:, 0].mean())
    labels = torch.tensor([1, 0, 1])
    matching = torch.randn(3, 2)
    torch.testing.assert_close(
        cross_entropy(matching, labels), -matching.log_softmax(1)[torch.arange(3), labels].mean()
    )
