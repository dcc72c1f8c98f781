"""Dropout of the cross-modal layers, without what torch's costs on a CPU.

There torch draws one random number at a time for each element, and attention with dropout is computed in float32
whatever it is given: together a seventh of a training step at base size. Here one draw of 64 bits from torch's
generator decides about four elements, and attention keeps its dtype. Other devices use torch's own operators.

Both functions obey torch function modes, as torch's do. Shapes: B batch, H heads, L and K tokens, E head size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

_LEVELS = 2**16


def dropout(x: Tensor, p: float) -> Tensor:
    """`x` with each element set to 0 with probability `p`, and else divided by `1 - p`.

    On a CPU `p` is rounded to a multiple of 2^-16, in both places.
    """
    if has_torch_function((x,)):
        result: Tensor = handle_torch_function(dropout, (x,), x, p)
        return result
    dropped = round(p * _LEVELS)
    if x.device.type != "cpu" or not 0 < dropped < _LEVELS:
        return F.dropout(x, p)
    draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    keep = draws.view(torch.int16)[: x.numel()] >= dropped - _LEVELS // 2
    return x * keep.view(x.shape).to(x.dtype).mul_(_LEVELS / (_LEVELS - dropped))


def attention(query: Tensor, key: Tensor, value: Tensor, attend: Tensor | None, p: float) -> Tensor:
    """Scaled dot-product attention, `[B, H, L, E]`, with dropout of its weights.

    Args:
        query: `[B, H, L, E]`.
        key: `[B, H, K, E]`.
        value: `[B, H, K, E]`.
        attend: None or bool, broadcastable to `[B, H, L, K]`; every query must be left a key.
        p: Probability that a weight is set to 0.
    """
    if has_torch_function((query, key, value)):
        result: Tensor = handle_torch_function(attention, (query, key, value), query, key, value, attend, p)
        return result
    if query.device.type != "cpu" or not p:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=attend, dropout_p=p)
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if attend is not None:
        scores = scores.masked_fill(~attend, float("-inf"))
    return dropout(scores.softmax(dim=-1), p) @ value
