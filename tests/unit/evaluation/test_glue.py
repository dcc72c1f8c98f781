"""GLUE's metrics against hand-worked values and numpy's formulas."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mt_deepspeed.evaluation.glue import accuracy, f1, matthews, pearson, spearman


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_hand_worked() -> None:
    predicted, labels = vector(1, 1, 1, 0, 0, 0, 0, 1), vector(1, 1, 0, 0, 0, 1, 0, 1)
    # 3 true positives, 1 false positive, 1 false negative, 3 true negatives
    assert accuracy(predicted, labels) == 6 / 8
    assert f1(predicted, labels) == 6 / 8
    assert matthews(predicted, labels) == pytest.approx((3 * 3 - 1 * 1) / 16)
    assert f1(vector(1, 1, 1, 1), vector(1, 0, 0, 0)) == pytest.approx(0.4)  # precision 1/4, recall 1
    assert pearson(vector(0, 1, 2), vector(1, 3, 8)) == pytest.approx(7 / math.sqrt(2 * 26))
    # Ranks 1, 2.5, 2.5, 4 and 2, 1, 3, 4
    assert spearman(vector(0, 7, 7, 9), vector(2, 1, 3, 4)) == pytest.approx(0.6324555)
    assert spearman(vector(1, 2, 3), vector(1, 10, 1000)) == pytest.approx(1)


def test_what_has_no_value_is_zero() -> None:
    nothing, something = vector(0, 0, 0), vector(0, 1, 0)
    assert f1(nothing, nothing) == 0
    assert matthews(nothing, something) == matthews(something, nothing) == 0
    assert pearson(vector(2, 2, 2), vector(1, 2, 3)) == spearman(vector(1, 2, 3), vector(4, 4, 4)) == 0


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1))
def test_counts_of_two_classes(pairs: list[tuple[int, int]]) -> None:
    predicted, labels = (vector(*column) for column in zip(*pairs, strict=True))
    tp, tn, fp, fn = (pairs.count(cell) for cell in ((1, 1), (0, 0), (1, 0), (0, 1)))
    assert accuracy(predicted, labels) == pytest.approx((tp + tn) / len(pairs))
    assert f1(predicted, labels) == pytest.approx(2 * tp / (2 * tp + fp + fn) if tp else 0)
    below = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert matthews(predicted, labels) == pytest.approx((tp * tn - fp * fn) / below if below else 0, abs=1e-9)


@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), min_size=2))
def test_ranks_with_ties(pairs: list[tuple[int, int]]) -> None:
    x, y = (np.array(column, float) for column in zip(*pairs, strict=True))

    def ranks(values: np.ndarray) -> np.ndarray:
        return np.array([(values < one).sum() + ((values == one).sum() + 1) / 2 for one in values])

    constant = len(set(x)) == 1 or len(set(y)) == 1
    for found, (a, b) in ((pearson, (x, y)), (spearman, (ranks(x), ranks(y)))):
        wanted = 0.0 if constant else np.corrcoef(a, b)[0, 1]
        assert found(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(wanted, abs=1e-9)
