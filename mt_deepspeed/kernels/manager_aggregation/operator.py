"""The operator: shapes, types, `torch.library` registration, autograd; backends do the arithmetic.

Shapes: B batch, N experts, P previous states (0 or more), L length, T = B x L tokens, D channels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mt_deepspeed.kernels.manager_aggregation import dispatch
from mt_deepspeed.kernels.manager_aggregation.noise import Philox
from mt_deepspeed.kernels.manager_aggregation.protocol import Arguments
from mt_deepspeed.kernels.manager_aggregation.reference import aggregate


def expert_statistics(
    experts: Sequence[Tensor], eps: float = 1e-5, backend: str | None = None
) -> Tensor | None:
    """Means and inverse standard deviations of experts, computed once for all managers that share them.

    Args:
        experts: N tensors `[B, L, D]`.
        eps: Of the layer norms.
        backend: As in `manager_aggregation`.

    Returns:
        `[2, N, B * L]` float32 (float64 if the experts are), without gradient: `manager_aggregation` returns
        the experts' gradients of the whole layer norm. None on a CPU where no backend is asked for.
    """
    if _by_autograd(experts, backend):
        return None
    with torch.no_grad():
        return _statistics(_rows(experts), eps, backend or "")


def manager_aggregation(
    experts: Sequence[Tensor],
    previous: Sequence[Tensor],
    norm_weight: Tensor,
    norm_bias: Tensor,
    logits: Tensor,
    temperature: Tensor,
    previous_weight: Tensor | None = None,
    noise: Tensor | Philox | None = None,
    eps: float = 1e-5,
    statistics: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Aggregates experts and previous cross-modal states into the input of a cross-modal layer.

    Everything inside is float32 (float64 if the experts are), cast once at the end. Backward keeps the inputs
    and two numbers per token, expert and previous state.

    On a CPU, unless a backend is asked for, autograd differentiates the formula: torch's fused layer norm and its
    derivative there take less than half the time of the written one, and memory is not what runs out.

    Args:
        experts: N tensors `[B, L, D]`; one that does not lie contiguously in memory is copied.
        previous: P tensors `[B, L, D]`, taken in the experts' dtype.
        norm_weight: `[N + P, D]`, gains of the layer norms, experts first.
        norm_bias: `[N + P, D]`.
        logits: `[N, D]`, `[N, 1]` (static) or `[B, L, N]` (adaptive), see `mixing_weights`.
        temperature: `[1]`.
        previous_weight: `[P, D]` or `[P, 1]`, applied as given; None when P is 0.
        noise: Added to the logits before the temperature divides them: None, a tensor `[N, B, L, D]` (no
            gradient flows to it), or the description of noise that is made inside.
        eps: Of every layer norm.
        statistics: From `expert_statistics` with the same `eps`; None: computed here.
        backend: `reference`, another name in `dispatch.BACKENDS`, or `auto`; None: what `MT_KERNELS` says.

    Returns:
        `[B, L, D]`, dtype of the experts.

    Raises:
        ValueError: Shapes do not fit together, or the backend asked for cannot compute this.
    """
    _check(experts, previous, norm_weight, norm_bias, logits, previous_weight, noise)
    if _by_autograd(experts, backend):
        given = _drawn(noise, experts) if isinstance(noise, Philox) else noise
        formula = (norm_weight, norm_bias, logits, temperature, previous_weight)
        return aggregate(experts, previous, *formula, None if given is None else given.detach(), eps)
    shape, dtype = experts[0].shape, torch.promote_types(experts[0].dtype, torch.float32)
    size = shape[-1]
    rows = _rows(experts)
    philox = noise if isinstance(noise, Philox) else None
    given = noise if isinstance(noise, Tensor) else None
    if statistics is None:
        with torch.no_grad():
            statistics = _statistics(rows, eps, backend or "")
    a = Arguments(
        rows,
        [state.to(experts[0].dtype) for state in _rows(previous)],
        norm_weight.to(dtype),
        norm_bias.to(dtype),
        logits.to(dtype).expand(-1, size) if logits.ndim == 2 else logits.to(dtype).flatten(0, 1)[None],
        temperature.to(dtype),
        norm_weight.new_zeros(0, size, dtype=dtype)
        if previous_weight is None
        else previous_weight.to(dtype).expand(-1, size),
        statistics,
        None if given is None else given.detach().flatten(1, -2).contiguous(),
        None if philox is None else philox.seed,
        0 if philox is None else philox.offset,
        0.0 if philox is None else philox.scale,
        eps,
    )
    out, _ = _forward(*a, backend or "")
    return out.view(shape)


def _by_autograd(experts: Sequence[Tensor], backend: str | None) -> bool:
    return bool(experts) and experts[0].device.type == "cpu" and dispatch.wish(backend) is None


def _drawn(noise: Philox, experts: Sequence[Tensor]) -> Tensor:
    """Noise by torch's own generator; Philox on int64 tensors takes a processor eight times as long."""
    key = (int(noise.seed) + 0x9E3779B97F4A7C15 * (noise.offset + 1)) * 0x94D049BB133111EB & (2**64 - 1)
    # The generator takes 32 bits: fold the high ones, where products mix best, over the low ones.
    generator = torch.Generator().manual_seed((key ^ (key >> 32)) & (2**32 - 1))
    drawn = torch.randn((len(experts), *experts[0].shape), generator=generator)
    return drawn.mul_(noise.scale)


def _rows(states: Sequence[Tensor]) -> list[Tensor]:
    return [state.flatten(0, -2).contiguous() for state in states]


def _check(
    experts: Sequence[Tensor],
    previous: Sequence[Tensor],
    norm_weight: Tensor,
    norm_bias: Tensor,
    logits: Tensor,
    previous_weight: Tensor | None,
    noise: Tensor | Philox | None,
) -> None:
    def expect(name: str, found: Sequence[int], *expected: Sequence[int]) -> None:
        if tuple(found) not in [tuple(one) for one in expected]:
            raise ValueError(
                f"manager_aggregation: {name} has shape {tuple(found)}, expected "
                + " or ".join(str(tuple(one)) for one in expected)
            )

    if not experts:
        raise ValueError("manager_aggregation: found no experts, expected at least one")
    if previous and previous_weight is None:
        raise ValueError(f"manager_aggregation: {len(previous)} previous states need previous_weight")
    shape, size = experts[0].shape, experts[0].shape[-1]
    num_experts, num_previous = len(experts), len(previous)
    for i, state in enumerate([*experts, *previous]):
        expect(f"expert {i}" if i < num_experts else f"previous {i - num_experts}", state.shape, shape)
    expect("norm_weight", norm_weight.shape, (num_experts + num_previous, size))
    expect("norm_bias", norm_bias.shape, (num_experts + num_previous, size))
    expect("logits", logits.shape, (num_experts, size), (num_experts, 1), (*shape[:-1], num_experts))
    if previous_weight is not None:
        expect("previous_weight", previous_weight.shape, (num_previous, size), (num_previous, 1))
    if isinstance(noise, Tensor):
        expect("noise", noise.shape, (num_experts, *shape))


_ARGUMENTS = (
    "Tensor[] experts, Tensor[] previous, Tensor norm_weight, Tensor norm_bias, Tensor logits, "
    "Tensor temperature, Tensor previous_weight, Tensor statistics, Tensor? noise, Tensor? seed, "
    "int offset, float noise_scale, float eps"
)
# `backend` is the caller's wish, "" for none: it is granted inside, where torch.compile does not look.
_GRADIENTS = "Tensor[], Tensor[], Tensor, Tensor, Tensor, Tensor, Tensor"


@torch.library.custom_op("mt_deepspeed::expert_statistics", mutates_args=())
def _statistics(states: list[Tensor], eps: float, backend: str) -> Tensor:
    result: Tensor = dispatch.chosen(states, 0, backend).statistics(states, eps)
    return result


@_statistics.register_fake
def _(states: list[Tensor], eps: float, backend: str) -> Tensor:
    dtype = torch.promote_types(states[0].dtype, torch.float32)
    return states[0].new_empty((2, len(states), states[0].shape[0]), dtype=dtype)


@torch.library.custom_op(
    "mt_deepspeed::manager_aggregation",
    mutates_args=(),
    schema=f"({_ARGUMENTS}, str backend) -> (Tensor, Tensor)",
)
def _forward(*values: Any) -> tuple[Tensor, Tensor]:
    *arguments, backend = values
    a = Arguments(*arguments)
    result: tuple[Tensor, Tensor] = dispatch.chosen(a.experts, len(a.previous), backend).forward(a)
    return result


@_forward.register_fake
def _(*values: Any) -> tuple[Tensor, Tensor]:
    a = Arguments(*values[:-1])
    return _like(a.experts[0]), a.statistics.new_empty((2, len(a.previous), a.statistics.shape[2]))


@torch.library.custom_op(
    "mt_deepspeed::manager_aggregation_backward",
    mutates_args=(),
    schema=f"({_ARGUMENTS}, Tensor previous_statistics, Tensor grad, str backend) -> ({_GRADIENTS})",
)
def _backward(*values: Any) -> tuple[Any, ...]:
    *arguments, previous_statistics, grad, backend = values
    a = Arguments(*arguments)
    module = dispatch.chosen(a.experts, len(a.previous), backend)
    return tuple(module.backward(a, previous_statistics, grad.contiguous()))


@_backward.register_fake
def _(*values: Any) -> tuple[Any, ...]:
    a = Arguments(*values[:-3])
    return [_like(one) for one in a.experts], [_like(one) for one in a.previous], *map(_like, a[2:7])


def _like(tensor: Tensor) -> Tensor:
    return tensor.new_empty(tensor.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    a = Arguments(*inputs[:-1])
    ctx.mark_non_differentiable(output[1])
    ctx.counts = len(a.experts), len(a.previous)
    ctx.rest = (a.offset, a.noise_scale, a.eps)
    ctx.backend = inputs[-1]
    ctx.save_for_backward(*a.experts, *a.previous, *a[2:10], output[1])


def _differentiate(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    n, p = ctx.counts
    experts, previous, rest = list(saved[:n]), list(saved[n : n + p]), saved[n + p :]
    grads = _backward(experts, previous, *rest[:-1], *ctx.rest, rest[-1], grad, ctx.backend)
    return (*grads, *[None] * 7)  # statistics, noise, seed, offset, noise_scale, eps, backend


_forward.register_autograd(_differentiate, setup_context=_save)
