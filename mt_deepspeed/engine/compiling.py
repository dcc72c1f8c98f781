"""`torch.compile` of single layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mt_deepspeed.engine.protocols import Task, repeated_layers

BACKEND = "inductor"
"""Of `torch.compile`; tests use one that generates no code."""


def compile_layers(task: Task) -> int:
    """Compiles the forward pass of each of the task's repeated layers; returns their number.

    Layer by layer, since layers of a kind share one compiled function: a whole model takes many times as long
    to compile, and again for each length of text. Evaluation is left as it is. Comes before activation
    checkpointing, which then recomputes compiled layers, and before DeepSpeed.

    Raises:
        ValueError: The task offers no layers.
    """
    layers = repeated_layers(task, "train.compile=true")
    for layer in layers:
        layer.forward = _compiled(layer.forward)  # type: ignore[method-assign]
    return len(layers)


def _compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    fast = torch.compile(forward, backend=BACKEND)

    def run(*args: Any, **kwargs: Any) -> Any:
        return (fast if torch.is_grad_enabled() else forward)(*args, **kwargs)

    return run
