"""Puts apex's fused layer norm where torch's stands, when apex is installed and a GPU is used.

Parameters, their names and the checkpoint stay as they are.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

log = logging.getLogger(__name__)


def fuse_layer_norms(task: nn.Module, device: torch.device) -> int:
    """Replaces every `nn.LayerNorm` below `task` by apex's; says once in the log which norm the run uses.

    Args:
        task: Changed in place; its parameter objects stay the same.
        device: Where it will run; apex has kernels for CUDA only.

    Returns:
        Number of norms replaced.
    """
    fused = _apex_norm() if device.type == "cuda" else None
    if fused is None:
        log.info("layer norm: torch")
        return 0
    replaced = 0
    for parent in list(task.modules()):
        for name, child in list(parent.named_children()):
            if _is_plain(child):
                setattr(parent, name, _as_fused(child, fused))
                replaced += 1
    log.info("layer norm: apex FusedLayerNorm (%d)", replaced)
    return replaced


def _apex_norm() -> Any:
    try:
        from apex.normalization import FusedLayerNorm
    except ImportError:
        return None
    return FusedLayerNorm


def _is_plain(module: nn.Module) -> bool:
    """An affine layer norm over one dimension that is called as a norm and nothing else.

    Subclasses in our models take other arguments, except open_clip's, which only casts types around the norm.
    """
    kind = type(module)
    plain = kind is nn.LayerNorm or (
        kind.__name__ == "LayerNorm" and kind.__module__.startswith("open_clip.")
    )
    return plain and isinstance(module.weight, nn.Parameter) and isinstance(module.bias, nn.Parameter)


def _as_fused(norm: nn.Module, fused: Any) -> nn.Module:
    assert isinstance(norm, nn.LayerNorm)
    made: nn.Module = fused(norm.normalized_shape, eps=norm.eps)
    made.weight, made.bias = norm.weight, norm.bias
    made.train(norm.training)
    return made
