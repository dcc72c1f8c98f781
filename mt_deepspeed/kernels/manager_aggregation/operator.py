"""The operator: shapes, types, `torch.library` registration, autograd; backends do the arithmetic.

Shapes: B batch, N experts, P previous states (0 or more), L length, T = B x L tokens, D channels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from mt_deepspeed.kernels.manager_aggregation import dispatch
from mt_deepspeed.kernels.manager_aggregation.noise import Philox, philox_normal
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
        the experts' gradients of the whole layer norm. None where autograd differentiates the formula
        (`dispatch.by_autograd`).

    Raises:
        ValueError: The experts differ in shape, dtype or device, or the backend asked for cannot compute this.
    """
    _check_states(experts)
    if dispatch.by_autograd(experts, 0, backend):
        return None
    with torch.no_grad():
        return _statistics_of(_rows(experts), eps, backend or "")


def _statistics_of(rows: list[Tensor], eps: float, backend: str) -> Tensor:
    if _is_plain(rows):
        found: Tensor = dispatch.chosen(rows, 0, backend).statistics(rows, eps)
        return found
    return _statistics(rows, eps, backend)


def _is_plain(experts: Sequence[Tensor]) -> bool:
    """Whether a backend may be called directly: nothing traces, fakes or counts, which should meet one operator."""
    return (
        type(experts[0]) is Tensor and not torch.compiler.is_compiling() and not is_in_torch_dispatch_mode()
    )


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
        ValueError: Shapes, dtypes or devices do not fit together, or the backend asked for cannot compute this.
    """
    parameters = (norm_weight, norm_bias, logits, temperature, previous_weight)
    _check(experts, previous, *parameters, noise, statistics)
    if dispatch.by_autograd(experts, len(previous), backend):
        given = _materialised(noise, experts) if isinstance(noise, Philox) else noise
        return aggregate(experts, previous, *parameters, None if given is None else given.detach(), eps)
    tensors = (*parameters, statistics)
    if _is_plain(experts):
        numbers = (len(experts), noise, eps, backend or "")
        result: Tensor = _Aggregation.apply(*numbers, *tensors, *experts, *previous)
        return result
    a = _arguments(experts, previous, *tensors, noise, eps, backend or "")
    return _forward(*a, backend or "")[0].view(experts[0].shape)


def _arguments(
    experts: Sequence[Tensor],
    previous: Sequence[Tensor],
    norm_weight: Tensor,
    norm_bias: Tensor,
    logits: Tensor,
    temperature: Tensor,
    previous_weight: Tensor | None,
    statistics: Tensor | None,
    noise: Tensor | Philox | None,
    eps: float,
    backend: str,
) -> Arguments:
    """The arguments of `manager_aggregation` as backends take them."""
    size, dtype = experts[0].shape[-1], torch.promote_types(experts[0].dtype, torch.float32)
    rows = _rows(experts)
    philox = noise if isinstance(noise, Philox) else None
    if statistics is None:
        with torch.no_grad():
            statistics = _statistics_of(rows, eps, backend)
    return Arguments(
        rows,
        [state.to(experts[0].dtype) for state in _rows(previous)],
        norm_weight.to(dtype),
        norm_bias.to(dtype),
        logits.to(dtype).expand(-1, size) if logits.ndim == 2 else logits.to(dtype).flatten(0, 1)[None],
        temperature.to(dtype),
        norm_weight.new_zeros(0, size, dtype=dtype)
        if previous_weight is None
        else previous_weight.to(dtype).expand(-1, size),
        statistics.contiguous(),
        noise.detach().flatten(1, -2).contiguous() if isinstance(noise, Tensor) else None,
        None if philox is None else philox.seed,
        0 if philox is None else philox.offset,
        0.0 if philox is None else philox.scale,
        eps,
    )


def _materialised(noise: Philox, experts: Sequence[Tensor]) -> Tensor:
    shape, dtype = experts[0].shape, torch.promote_types(experts[0].dtype, torch.float32)
    normals = philox_normal(noise.seed, noise.offset, len(experts), shape[:-1].numel(), shape[-1], dtype)
    return normals.mul_(noise.scale).view(len(experts), *shape)


def _rows(states: Sequence[Tensor]) -> list[Tensor]:
    return [state.flatten(0, -2).contiguous() for state in states]


def _expect(name: str, what: str, found: object, *expected: object) -> None:
    if found not in expected:
        wanted = " or ".join(map(str, expected))
        raise ValueError(f"manager_aggregation: {name} has {what} {found}, expected {wanted}")


def _check_states(experts: Sequence[Tensor], previous: Sequence[Tensor] = ()) -> None:
    """What is equal in all states, since compiled backends take the first expert's for granted."""
    if not experts:
        raise ValueError("manager_aggregation: found no experts, expected at least one")
    first = experts[0]
    named = {f"expert {i}": state for i, state in enumerate(experts)}
    for name, state in (named | {f"previous {i}": state for i, state in enumerate(previous)}).items():
        _expect(name, "shape", tuple(state.shape), tuple(first.shape))
        _expect(name, "device", state.device, first.device)
    for name, state in named.items():
        _expect(name, "dtype", state.dtype, first.dtype)


def _check(
    experts: Sequence[Tensor],
    previous: Sequence[Tensor],
    norm_weight: Tensor,
    norm_bias: Tensor,
    logits: Tensor,
    temperature: Tensor,
    previous_weight: Tensor | None,
    noise: Tensor | Philox | None,
    statistics: Tensor | None,
) -> None:
    _check_states(experts, previous)
    if previous and previous_weight is None:
        raise ValueError(f"manager_aggregation: {len(previous)} previous states need previous_weight")
    shape, size, device = experts[0].shape, experts[0].shape[-1], experts[0].device
    num_experts, num_previous = len(experts), len(previous)

    def expect(name: str, tensor: Tensor, *shapes: tuple[int, ...]) -> None:
        _expect(name, "shape", tuple(tensor.shape), *shapes)
        _expect(name, "device", tensor.device, device)

    expect("norm_weight", norm_weight, (num_experts + num_previous, size))
    expect("norm_bias", norm_bias, (num_experts + num_previous, size))
    expect("logits", logits, (num_experts, size), (num_experts, 1), (*shape[:-1], num_experts))
    expect("temperature", temperature, (1,))
    if previous_weight is not None:
        expect("previous_weight", previous_weight, (num_previous, size), (num_previous, 1))
    if isinstance(noise, Tensor):
        expect("noise", noise, (num_experts, *shape))
    elif noise is not None:
        expect("seed", noise.seed, (1,))
        _expect("seed", "dtype", noise.seed.dtype, torch.int64)
    if statistics is not None:
        expect("statistics", statistics, (2, num_experts, shape[:-1].numel()))
        dtype = torch.promote_types(experts[0].dtype, torch.float32)
        _expect("statistics", "dtype", statistics.dtype, dtype)


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


class _Aggregation(torch.autograd.Function):
    """The backends as one node of autograd, for ordinary tensors in eager execution.

    What traces or fakes meets the registered operator instead; torch.library's own autograd, and the nodes of all
    reshaping around it, would take longer than a small aggregation does.
    """

    @staticmethod
    def forward(
        ctx: Any, num_experts: int, noise: Any, eps: float, backend: str, *tensors: Tensor | None
    ) -> Tensor:
        parameters: Any = tensors[:5]
        states: Any = tensors[6:]
        ctx.given = [None if one is None else (one.shape, one.dtype) for one in (*parameters, *states)]
        experts, previous = states[:num_experts], states[num_experts:]
        more: Any = {"statistics": tensors[5], "noise": noise, "eps": eps, "backend": backend}
        a = _arguments(experts, previous, *parameters, **more)
        ctx.module = dispatch.chosen(a.experts, len(a.previous), backend)
        out, previous_statistics = ctx.module.forward(a)
        _save(ctx, a, previous_statistics)
        return out.view(experts[0].shape)

    @staticmethod
    @once_differentiable  # backends' gradients have no derivative
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        a, previous_statistics = _saved(ctx)
        experts, previous, *parameters = ctx.module.backward(
            a, previous_statistics, grad.flatten(0, -2).contiguous()
        )
        found = [
            None if given is None else _reduced(one, *given)
            for one, given in zip((*parameters, *experts, *previous), ctx.given, strict=True)
        ]
        return *[None] * 4, *found[:5], None, *found[5:]


def _reduced(grad: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """A gradient in the shape and dtype in which its tensor was given; a single weight served all channels."""
    if shape[-1] == 1 != grad.shape[-1]:
        grad = grad.sum(dim=-1, keepdim=True)
    return grad.view(shape).to(dtype)


def _save(ctx: Any, a: Arguments, previous_statistics: Tensor) -> None:
    ctx.counts = len(a.experts), len(a.previous)
    ctx.rest = a[10:]
    ctx.save_for_backward(*a.experts, *a.previous, *a[2:10], previous_statistics)


def _saved(ctx: Any) -> tuple[Arguments, Tensor]:
    *saved, previous_statistics = ctx.saved_tensors
    n, p = ctx.counts
    return Arguments(saved[:n], saved[n : n + p], *saved[n + p :], *ctx.rest), previous_statistics


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    *arguments, ctx.backend = inputs
    _save(ctx, Arguments(*arguments), output[1])


def _differentiate(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    a, previous_statistics = _saved(ctx)
    grads = _backward(*a, previous_statistics, grad, ctx.backend)
    return (*grads, *[None] * 7)  # statistics, noise, seed, offset, noise_scale, eps, backend


_forward.register_autograd(_differentiate, setup_context=_keep)
