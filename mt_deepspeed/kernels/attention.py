"""Attention and dropout, in the form that trains fastest on the device.

On GPUs that is torch's own. On a CPU torch draws a random number for each element that dropout may drop, one after
the other; its attention computes in float32 when it has dropout, and in half precision has a backward pass that takes
several times as long as the products it stands for. With both written as below a training step at base size needs a
fifth less time.

Both functions obey torch function modes, as torch's do. Shapes: B batch, H heads, L and K tokens, E head size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

_LEVELS = 2**16


def attention(
    query: Tensor, key: Tensor, value: Tensor, attend: Tensor | None, dropout_p: float, training: bool
) -> Tensor:
    """Scaled dot-product attention, `[B, H, L, E]`.

    Args:
        query: `[B, H, L, E]`.
        key: `[B, H, K, E]`.
        value: `[B, H, K, E]`.
        attend: None or bool, broadcastable to `[B, H, L, K]`; every query must be left a key.
        dropout_p: Probability that a weight is dropped in training.
        training: Whether a backward pass will follow.
    """
    if has_torch_function((query, key, value)):
        result: Tensor = handle_torch_function(
            attention, (query, key, value), query, key, value, attend, dropout_p, training
        )
        return result
    half = query.dtype in (torch.bfloat16, torch.float16)
    if query.device.type != "cpu" or not training or not (dropout_p or half):
        dropout_p = dropout_p if training else 0.0
        return F.scaled_dot_product_attention(query, key, value, attn_mask=attend, dropout_p=dropout_p)
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if attend is not None:
        scores = scores.masked_fill(~attend, float("-inf"))
    return dropout(scores.softmax(dim=-1), dropout_p, training) @ value


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """In training `x` with each element set to 0 with probability `p`, and else divided by `1 - p`.

    On a CPU 64 bits of torch's generator decide about four elements: `p` is rounded to a multiple of 2^-16.
    """
    if has_torch_function((x,)):
        result: Tensor = handle_torch_function(dropout, (x,), x, p, training)
        return result
    dropped = round(p * _LEVELS)
    if x.device.type != "cpu" or not training or not 0 < dropped < _LEVELS:
        return F.dropout(x, p, training)
    draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    keep = draws.view(torch.int16)[: x.numel()] >= dropped - _LEVELS // 2
    return x * keep.view(x.shape).to(x.dtype).mul_(_LEVELS / (_LEVELS - dropped))
