"""The squared norm of all gradients."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mt_deepspeed.engine.gradients import sum_of_squares


def squared(*parts: Tensor) -> float:
    ownership: Any = SimpleNamespace(gradients=lambda: enumerate(parts))
    result = sum_of_squares(ownership, torch.device("cpu"))
    assert result.dtype == torch.float64
    assert result.ndim == 0
    return float(result)


def test_large_gradients_are_added_up_accurately() -> None:
    """One float32 sum of so many squares would be 1e-3 too small."""
    part = torch.rand(2**24, generator=torch.Generator().manual_seed(0))
    assert squared(part) == pytest.approx(float(part.double().square().sum()), rel=2e-4)


def test_parts_of_any_shape_and_none() -> None:
    assert squared(torch.full((2, 3), 2.0), torch.ones(5).bfloat16(), torch.ones(4, 4).T[:2]) == 24 + 5 + 8
    assert squared(torch.empty(0)) == 0.0
    assert squared() == 0.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows(bad: float) -> None:
    found = squared(torch.ones(8), torch.tensor([0.0, bad]))
    assert found - found != 0.0
