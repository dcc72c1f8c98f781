"""Manager aggregation in Triton; see the package's docstring for what a backend is.

With `TRITON_INTERPRET=1` the kernels run on CPU tensors, slowly.
"""

from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs

from mt_deepspeed.kernels.manager_aggregation import build
from mt_deepspeed.kernels.manager_aggregation.protocol import Arguments, Gradients
from mt_deepspeed.kernels.manager_aggregation.triton_kernels import (
    backward_kernel,
    forward_kernel,
    statistics_kernel,
)

MAX_EXPERTS, MAX_PREVIOUS, MAX_SIZE = 24, 8, 2048
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NO_NOISE, _GIVEN, _PHILOX = 0, 1, 2
_TILE = 2048  # elements of a tile: 8 per thread and tensor


def unsupported(experts: list[Tensor], num_previous: int) -> str | None:
    """See the package's docstring."""
    size, device = experts[0].shape[1], experts[0].device.type
    if device != "cuda" and not (device == "cpu" and knobs.runtime.interpret):
        return f"found tensors on {device}, expected cuda (or TRITON_INTERPRET=1)"
    if experts[0].dtype not in DTYPES:
        return f"found {experts[0].dtype}, expected float32, bfloat16 or float16"
    if size % 8 or size > MAX_SIZE:
        return f"found {size} channels, expected a multiple of 8 up to {MAX_SIZE}"
    if len(experts) > MAX_EXPERTS or num_previous > MAX_PREVIOUS:
        return (
            f"found {len(experts)} experts and {num_previous} previous states, "
            f"expected at most {MAX_EXPERTS} and {MAX_PREVIOUS}"
        )
    return build.no_c_compiler() if device == "cuda" else None


def statistics(states: list[Tensor], eps: float) -> Tensor:
    """See the package's docstring."""
    tokens, size = states[0].shape
    out = states[0].new_empty((2, len(states), tokens), dtype=torch.float32)
    if tokens:
        block, rows = _tile(size)
        with torch.cuda.device_of(out):  # Triton launches on the current device
            statistics_kernel[(triton.cdiv(tokens, rows),)](
                tuple(states), out, tokens, size, eps, len(states), rows, block, num_warps=8
            )
    return out


def forward(a: Arguments) -> tuple[Tensor, Tensor]:
    """See the package's docstring."""
    tokens, size = a.experts[0].shape
    out = torch.empty_like(a.experts[0])
    previous_statistics = a.statistics.new_empty((2, len(a.previous), tokens))
    if tokens:
        with torch.cuda.device_of(out):
            forward_kernel[(triton.cdiv(tokens, _tile(size)[1]),)](
                *_common(a),
                out,
                previous_statistics,
                tokens,
                size,
                a.eps,
                **_constants(a),
                num_warps=8,
                maxnreg=128,  # so that a processor holds two programs
            )
    return out, previous_statistics


def backward(a: Arguments, previous_statistics: Tensor, grad: Tensor) -> Gradients:
    """See the package's docstring."""
    tokens, size = a.experts[0].shape
    num_states = len(a.experts) + len(a.previous)
    states = [torch.empty_like(state) for state in (*a.experts, *a.previous)]
    logits = torch.empty_like(a.logits, memory_format=torch.contiguous_format)
    programs = min(triton.cdiv(tokens, _tile(size)[1]), _max_programs(grad.device))
    # Per program: sums for gains, biases, and logits or previous weights, [N + P, D] each; the temperature.
    partial = grad.new_zeros((programs, 3, num_states, size), dtype=torch.float32)
    partial_temperature = grad.new_zeros((programs,), dtype=torch.float32)
    if tokens:
        with torch.cuda.device_of(grad):
            backward_kernel[(programs,)](
                *_common(a),
                previous_statistics,
                grad,
                tuple(states),
                logits,
                partial,
                partial_temperature,
                tokens,
                size,
                programs,
                **_constants(a),
                num_warps=8,
            )
    gains, biases, rest = partial.sum(dim=0)
    n = len(a.experts)
    return Gradients(
        states[:n],
        states[n:],
        gains.clone(),
        biases.clone(),
        logits if a.adaptive else rest[:n].clone(),
        partial_temperature.sum(dim=0, keepdim=True),
        rest[n:].clone(),
    )


def _tile(size: int) -> tuple[int, int]:
    """Channels (a power of two) and rows of a tile."""
    block = max(triton.next_power_of_2(size), 16)
    return block, max(_TILE // block, 1) if not knobs.runtime.interpret else 4


def _max_programs(device: torch.device) -> int:
    """As many as there are processors: one holds one program of backward at a time."""
    if device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


def _common(a: Arguments) -> tuple[Any, ...]:
    """Arguments of both kernels; what is absent is passed as some tensor that is not read."""
    return (
        tuple(a.experts),
        tuple(a.previous),
        a.statistics,
        a.norm_weight.contiguous(),
        a.norm_bias.contiguous(),
        a.logits.contiguous(),
        a.temperature,
        a.previous_weight.contiguous(),
        a.temperature if a.noise is None else a.noise,
        a.temperature if a.seed is None else a.seed,
        a.offset,
        a.noise_scale,
    )


def _constants(a: Arguments) -> dict[str, Any]:
    block, rows = _tile(a.experts[0].shape[1])
    return {
        "N": len(a.experts),
        "P": len(a.previous),
        "ADAPTIVE": a.adaptive,
        "NOISE": _GIVEN if a.noise is not None else _PHILOX if a.seed is not None else _NO_NOISE,
        "ROWS": rows,
        "BLOCK": block,
    }
