"""Attention and dropout on a CPU: statistics, gradients, agreement with torch's."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mt_deepspeed.kernels.attention import attention, dropout


def kept(shape: tuple[int, ...], p: float, seed: int) -> Tensor:
    """Where a tensor of ones is not dropped, bool."""
    torch.manual_seed(seed)
    return dropout(torch.ones(shape), p, True) != 0


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_share_and_scale(p: float) -> None:
    size = 400_001
    torch.manual_seed(3)
    dropped = dropout(torch.ones(size), p, True)
    share = float((dropped == 0).float().mean())
    assert abs(share - p) < 5 * (p * (1 - p) / size) ** 0.5
    torch.testing.assert_close(dropped[dropped != 0].unique(), torch.tensor([1 / (1 - p)]), rtol=2e-4, atol=0)


def test_elements_are_independent() -> None:
    """Also those that share a draw, whose distance is 1 to 3."""
    p, size = 0.3, 400_000
    one = kept((size,), p, 5).float() - (1 - p)
    for distance in (1, 2, 3, 4, 8):
        correlation = float((one[distance:] * one[:-distance]).mean()) / (p * (1 - p))
        assert abs(correlation) < 5 / size**0.5, distance


def test_each_place_of_a_draw_has_its_share() -> None:
    p, draws = 0.1, 200_000
    shares = 1 - kept((draws, 4), p, 7).float().mean(dim=0)
    assert float((shares - p).abs().max()) < 5 * (p * (1 - p) / draws) ** 0.5


@pytest.mark.parametrize("size", [0, 1, 2, 3, 5, 31])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_any_number_of_elements(size: int, dtype: torch.dtype) -> None:
    x = torch.randn(size, dtype=dtype) + 3
    result = dropout(x, 0.5, True)
    assert result.dtype == dtype
    assert result.shape == x.shape
    assert bool(((result == 0) | (result == 2 * x)).all())


def test_nothing_and_everything() -> None:
    x = torch.randn(64)
    assert torch.equal(dropout(x, 0.0, True), x)
    assert torch.equal(dropout(x, 1.0, True), torch.zeros(64))


def test_the_seed_decides() -> None:
    same, again, other = (kept((4096,), 0.5, seed) for seed in (1, 1, 2))
    assert torch.equal(same, again)
    assert not torch.equal(same, other)


def test_gradients_pass_where_values_do() -> None:
    x = torch.randn(2, 37, 5, dtype=torch.float64, requires_grad=True)
    result = dropout(x, 0.25, True)
    result.sum().backward()
    torch.testing.assert_close(x.grad, (result != 0).double() / 0.75, rtol=1e-12, atol=0)


def test_tensors_that_are_not_contiguous() -> None:
    x = torch.rand(6, 10).T + 1
    result = dropout(x, 0.5, True)
    assert bool(((result == 0) | (result == 2 * x)).all())


def projected(seed: int, masked: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    torch.manual_seed(seed)
    query, key, value = (
        torch.randn(2, 3, size, 8, dtype=torch.float64, requires_grad=True) for size in (5, 7, 7)
    )
    attend = torch.arange(7) < torch.tensor([[4], [7]])
    return query, key, value, attend[:, None, None] if masked else None


@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_unbiased(masked: bool) -> None:
    """Its mean over many draws is attention without dropout."""
    query, key, value, attend = projected(0, masked)
    with torch.no_grad():
        expected = F.scaled_dot_product_attention(query, key, value, attn_mask=attend)
        draws = torch.stack([attention(query, key, value, attend, 0.2, True) for _ in range(3000)])
    error = (draws.mean(dim=0) - expected) / (draws.std(dim=0) / len(draws) ** 0.5)
    assert float(error.abs().max()) < 6
    assert float(draws.std(dim=0).min()) > 0


@pytest.mark.parametrize("masked", [False, True])
def test_attention_drops_weights_and_not_values(masked: bool) -> None:
    """With values of the unit matrix the result is the dropped weights themselves."""
    query, key, _, attend = projected(1, masked)
    unit = torch.eye(7, dtype=torch.float64).expand(2, 3, 7, 7)
    weights = F.scaled_dot_product_attention(query, key, unit, attn_mask=attend)
    found = attention(query, key, unit, attend, 0.5, True)
    gone = found == 0
    torch.testing.assert_close(found[~gone], 2 * weights[~gone])
    assert 0.2 < float(gone[weights > 0].double().mean()) < 0.8


def test_attention_gradients() -> None:
    query, key, value, attend = projected(2, True)

    def seeded(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        torch.manual_seed(4)
        return attention(query, key, value, attend, 0.3, True)

    assert torch.autograd.gradcheck(seeded, (query, key, value))


def test_attention_without_dropout_is_torchs() -> None:
    query, key, value, attend = projected(3, True)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=attend)
    assert torch.equal(attention(query, key, value, attend, 0.0, True), expected)
    assert torch.equal(attention(query, key, value, attend, 0.3, False), expected)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_half_precision(masked: bool, training: bool) -> None:
    """Values and gradients in bfloat16 are those in float64 but for rounding."""
    *exact, attend = projected(6, masked)
    half = [part.detach().bfloat16().requires_grad_() for part in exact]
    results = []
    for query, key, value in (exact, half):
        result = attention(query, key, value, attend, 0.0, training)
        assert result.dtype == query.dtype
        results.append([result, *torch.autograd.grad(result.double().square().sum(), [query, key, value])])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=0.05, atol=0.03)


def test_half_precision_with_dropout_stays_half() -> None:
    query, key, value = (torch.randn(2, 2, 6, 4).bfloat16() for _ in range(3))
    assert attention(query, key, value, None, 0.1, True).dtype == torch.bfloat16
