"""Memory of a forward and backward pass, counted on the real model without computing anything.

The task runs on fake tensors: shapes, dtypes and lifetimes are those of a real step, the numbers do not exist. What
is counted is the most bytes alive at once besides parameters and their gradients: saved activations, temporary
results, and the half-precision copies of the weights that autocast keeps until the backward pass is over.

Fake tensors live on the CPU, where some operators work otherwise than on a GPU; `_AsOnGpu` makes those behave as
they do there: layer norms in float32 under autocast, attention that keeps no score matrix, dropout that keeps a mask
of one byte per element.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from mt_deepspeed.config import RunConfig
from mt_deepspeed.engine.precision import DTYPES
from mt_deepspeed.kernels.attention import attention, dropout
from mt_deepspeed.kernels.manager_aggregation import using
from mt_deepspeed.tasks import Ranks, build_task

SIZES = (4, 12)
"""Micro-batches that are counted; memory grows by the same amount with every sample in between and beyond."""


@dataclass(frozen=True)
class ActivationBytes:
    """Peak of a forward and backward pass: `fixed + per_sample * micro_batch` bytes."""

    fixed: float
    per_sample: float

    def at(self, micro_batch: int) -> int:
        """Bytes at a micro-batch size."""
        return round(self.fixed + self.per_sample * micro_batch)


@lru_cache(maxsize=32)
def activation_bytes(
    config: RunConfig, checkpointing: int, text_len: int, world_size: int = 1
) -> ActivationBytes:
    """Counts two micro-batch sizes on fake tensors and draws the line through them.

    Args:
        config: The run; task, model, objectives and `train.precision` count.
        checkpointing: As `train.activation_checkpointing`.
        text_len: Tokens of every text.
        world_size: Ranks whose rows a loss over all of them brings together.
    """
    mode = FakeTensorMode()
    with mode:
        task = build_task(config, Ranks(0, lambda rows: torch.cat([rows.clone() for _ in range(world_size)])))
    task.train()
    recompute(task.checkpointable_layers(), checkpointing, config.train.precision)
    peaks = []
    for size in SIZES:
        batch = task.fake_batch(size, text_len)
        with mode:
            fake: dict[str, Tensor] = {key: mode.from_tensor(value) for key, value in batch.items()}
            peaks.append(peak_bytes(task, fake, config.train.precision))
    slope = (peaks[1] - peaks[0]) / (SIZES[1] - SIZES[0])
    return ActivationBytes(peaks[0] - slope * SIZES[0], slope)


def peak_bytes(task: nn.Module, batch: dict[str, Tensor], precision: str) -> int:
    """Most bytes alive at once in a forward and backward pass, without parameters and their gradients.

    Args:
        task: On fake tensors (call it inside their mode then), or on real ones on the CPU.
        batch: Tensors of the same kind.
        precision: As `train.precision`.
    """
    hooks = [
        parameter.register_post_accumulate_grad_hook(_drop_gradient)
        for parameter in task.parameters()
        if parameter.requires_grad
    ]
    dtype = DTYPES[precision]
    half: AbstractContextManager[object] = (
        nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype)
    )
    # The managers' operator as on a GPU: by itself a CPU leaves the formula to autograd, which keeps more.
    with using("reference"), _LiveBytes(batch) as count, _AsOnGpu(dtype):
        with half:
            losses, report = task(batch)
        total = torch.stack([loss.float() for loss in losses.values()]).sum()
        del losses, report
        total.backward()  # type: ignore[no-untyped-call]
    for hook in hooks:
        hook.remove()
    return count.peak


def recompute(layers: list[nn.Module], every: int, precision: str) -> None:
    """Activation checkpointing of every `every`-th layer, as `engine.activation_checkpointing` does it.

    Without DeepSpeed's bookkeeping of random states, which fake tensors cannot take part in.
    """
    for layer in layers[::every] if every else []:
        layer.forward = _checkpointed(layer.forward, DTYPES[precision])  # type: ignore[method-assign]


def _checkpointed(forward: Callable[..., Any], dtype: torch.dtype | None) -> Callable[..., Any]:
    def contexts() -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
        return nullcontext(), _AsOnGpu(dtype)  # a backward pass switches the mode around it off

    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(
            forward, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts, **kwargs
        )

    return run


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None  # counted by planning.states, which knows what DeepSpeed does with it


class _LiveBytes(TorchDispatchMode):
    """Adds up the storages that operators make, until they are freed."""

    def __init__(self, batch: dict[str, Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()
        for tensor in batch.values():
            self._add(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {
            tensor.untyped_storage() for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)
        }
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage() not in given:
                self._add(tensor)
        return out

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        weakref.finalize(storage, self._free, size)
        self.live += size
        self.peak = max(self.peak, self.live)

    def _free(self, size: int) -> None:
        self.live -= size


class _AsOnGpu(TorchFunctionMode):
    """Gives operators on CPU tensors the memory behaviour of their CUDA versions."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention or func is attention:
            return self._attention(*args, **kwargs)
        if func is F.dropout or func is dropout:
            return _dropout(*args, **kwargs)
        if func is F.layer_norm:
            args = tuple(value.float() if isinstance(value, Tensor) else value for value in args)
        return func(*args, **kwargs)

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.dtype is not None:
            query, key, value = (part.to(self.dtype) for part in (query, key, value))
        return _FusedAttention.apply(query, key, value)


class _FusedAttention(torch.autograd.Function):
    """What flash and memory-efficient attention keep: inputs, output, one float32 per query row. All zero."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_zeros(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        query, key, value, _, _ = ctx.saved_tensors
        return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if not training or p == 0.0:
        return x
    dropped: Tensor = torch.native_dropout(x, p, True)[0]
    return dropped
