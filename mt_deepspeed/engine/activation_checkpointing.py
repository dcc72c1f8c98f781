"""Activation checkpointing of whole layers through `deepspeed.checkpointing`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import deepspeed
import torch
from torch import Tensor

from mt_deepspeed.engine.protocols import Task, repeated_layers


def wrap_layers(task: Task, every: int, ds_config: dict[str, Any]) -> int:
    """Makes every `every`-th of the task's checkpointable layers recompute its activations in backward.

    CPU offload or partitioning of what is kept comes from the `activation_checkpointing` section of the
    DeepSpeed configuration. Parameter names stay as they are.

    Args:
        task: Offers `checkpointable_layers()`.
        every: 0 none, 1 all layers, k every k-th.
        ds_config: Complete DeepSpeed configuration.

    Returns:
        Number of layers wrapped.

    Raises:
        ValueError: The task offers no layers.
    """
    if every == 0:
        return 0
    offered = repeated_layers(task, f"train.activation_checkpointing={every}")
    deepspeed.checkpointing.configure(None, deepspeed_config=ds_config)
    layers = offered[::every]
    for layer in layers:
        layer.forward = _checkpointed(layer.forward)  # type: ignore[method-assign]
    return len(layers)


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        names = tuple(kwargs)
        # Backward runs outside of autocast: recomputing in another precision would go unnoticed.
        device = _device((*args, *kwargs.values()))
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None

        def layer(*values: Any) -> Any:
            positional, named = values[: len(args)], values[len(args) :]
            with torch.autocast(device, dtype=dtype, enabled=dtype is not None):
                return _recompute_first(forward(*positional, **dict(zip(names, named, strict=True))))

        # DeepSpeed's CPU offload and partitioning empty the tensors they are given, although managers read
        # the same hidden states again, and every layer the same mask: it gets aliases.
        values = [
            value.view_as(value) if isinstance(value, Tensor) else value
            for value in (*args, *kwargs.values())
        ]
        # Not DeepSpeed's default `checkpoint`: with that, a layer used twice in a forward pass (as the
        # fusion of each objective does) fails at stage 2 and silently has wrong gradients at stage 3.
        return deepspeed.checkpointing.non_reentrant_checkpoint(layer, *values)

    return run


class _RecomputeFirst(torch.autograd.Function):
    """Identity that looks at a saved tensor in backward: the layer is recomputed there and then.

    Otherwise the recomputation starts when the first submodule's backward asks for a saved tensor. Under
    ZeRO-3 that submodule's weights have just been gathered, and its forward hook, run by the recomputation,
    releases them again: its gradient then meets an empty parameter.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x.new_empty(0))
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        assert ctx.saved_tensors
        return grad


def _recompute_first(output: Any) -> Any:
    if isinstance(output, Tensor):
        return _RecomputeFirst.apply(output)
    if isinstance(output, (tuple, list)):
        return type(output)(_recompute_first(value) for value in output)
    return output


def _device(values: tuple[Any, ...]) -> str:
    return next(value.device.type for value in values if isinstance(value, Tensor))
