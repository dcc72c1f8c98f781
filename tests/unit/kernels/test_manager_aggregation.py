"""The reference aggregation against a direct transcription of its formula."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mt_deepspeed.kernels.manager_aggregation import manager_aggregation, mixing_weights


def _inputs(
    n: int, p: int, shape: tuple[int, int, int], adaptive: bool, scalar: bool, seed: int = 0
) -> dict[str, Any]:
    torch.manual_seed(seed)
    b, length, d = shape
    logits = torch.randn(b, length, n) if adaptive else torch.randn(n, 1 if scalar else d)
    tensors = {
        "experts": [torch.randn(shape) for _ in range(n)],
        "previous": [torch.randn(shape) for _ in range(p)],
        "norm_weight": torch.randn(n + p, d),
        "norm_bias": torch.randn(n + p, d),
        "logits": logits,
        "temperature": torch.tensor([0.7]),
        "previous_weight": torch.randn(p, 1 if scalar else d) if p else None,
        "noise": torch.randn(n, b, length, d) / n,
    }
    return {key: _double(value) for key, value in tensors.items()}


def _double(value: Any) -> Any:
    return (
        [item.double() for item in value]
        if isinstance(value, list)
        else None
        if value is None
        else value.double()
    )


def _by_hand(
    experts: list[Tensor],
    previous: list[Tensor],
    norm_weight: Tensor,
    norm_bias: Tensor,
    logits: Tensor,
    temperature: Tensor,
    previous_weight: Tensor | None,
    noise: Tensor | None,
    eps: float = 1e-5,
) -> Tensor:
    out = torch.zeros_like(experts[0])
    for b in range(out.shape[0]):
        for t in range(out.shape[1]):
            scores = logits[b, t][:, None] if logits.ndim == 3 else logits
            scores = scores.expand(len(experts), out.shape[2])
            if noise is not None:
                scores = scores + noise[:, b, t]
            weights = torch.exp(scores / temperature)
            weights = weights / weights.sum(0)
            for i, state in enumerate([*experts, *previous]):
                x = state[b, t]
                normed = (x - x.mean()) / torch.sqrt(x.var(unbiased=False) + eps) * norm_weight[
                    i
                ] + norm_bias[i]
                if i < len(experts):
                    out[b, t] += weights[i] * normed
                elif previous_weight is not None:
                    out[b, t] += previous_weight[i - len(experts)] * normed
    return out


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 5),
    p=st.integers(0, 3),
    b=st.integers(1, 2),
    length=st.integers(1, 3),
    d=st.integers(2, 7),
    adaptive=st.booleans(),
    scalar=st.booleans(),
    noisy=st.booleans(),
    shared=st.booleans(),
)
def test_formula(
    n: int, p: int, b: int, length: int, d: int, adaptive: bool, scalar: bool, noisy: bool, shared: bool
) -> None:
    arguments = _inputs(n, p, (b, length, d), adaptive, scalar)
    if not noisy:
        arguments["noise"] = None
    expected = _by_hand(**arguments)
    if shared:
        arguments["statistics"] = [
            (x.mean(-1, keepdim=True), (x.var(-1, unbiased=False, keepdim=True) + 1e-5).rsqrt())
            for x in arguments["experts"]
        ]
    torch.testing.assert_close(manager_aggregation(**arguments), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("adaptive", [False, True])
def test_every_gradient(adaptive: bool) -> None:
    arguments = _inputs(2, 1, (1, 2, 3), adaptive, scalar=False)
    names = ("norm_weight", "norm_bias", "logits", "temperature", "previous_weight")

    def run(expert: Tensor, previous: Tensor, *tensors: Tensor) -> Tensor:
        named: Any = dict(zip(names, tensors, strict=True))
        return manager_aggregation(
            [expert, arguments["experts"][1]],
            [previous],
            **named,
            noise=arguments["noise"],
        )

    tensors = [arguments["experts"][0], arguments["previous"][0], *(arguments[name] for name in names)]
    assert torch.autograd.gradcheck(run, [tensor.requires_grad_() for tensor in tensors])


def test_low_precision_experts_are_summed_in_float32() -> None:
    exact = _inputs(6, 1, (2, 5, 64), adaptive=True, scalar=False)
    low: Any = {
        key: [item.bfloat16() for item in value] if isinstance(value, list) else value.float()
        for key, value in exact.items()
    }
    rounded: Any = {
        key: [item.double() for item in value] if isinstance(value, list) else value.double()
        for key, value in low.items()
    }
    found = manager_aggregation(**low)
    assert found.dtype == torch.bfloat16
    # Only the last rounding is left: half a unit in the last place of bfloat16.
    torch.testing.assert_close(found.double(), manager_aggregation(**rounded), rtol=2**-8, atol=1e-5)


def test_weights_sum_to_one_and_temperature_sharpens() -> None:
    logits = torch.randn(2, 3, 4)
    cold, warm = mixing_weights(logits, torch.tensor([0.1])), mixing_weights(logits, torch.tensor([10.0]))
    assert cold.shape == (4, 2, 3, 1)
    torch.testing.assert_close(cold.sum(0), torch.ones(2, 3, 1))
    assert (cold.amax(0) > warm.amax(0)).all()


def test_missing_arguments_are_named() -> None:
    arguments = _inputs(2, 1, (1, 1, 4), adaptive=False, scalar=False)
    with pytest.raises(ValueError, match="previous_weight"):
        manager_aggregation(**{**arguments, "previous_weight": None})
    with pytest.raises(ValueError, match="no experts"):
        manager_aggregation(**{**arguments, "experts": [], "noise": None})
