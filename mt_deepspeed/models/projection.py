"""Linear maps that can be applied to either side of what attention multiplies.

`x (W y + b) = (W^T x) y + b^T x`: of two token sequences the shorter one can bear all projections. With some 15
tokens of a text and hundreds of a picture, attention between them then projects no token of the picture.

Shapes: B batch, L tokens, H heads, D width, E = D / H. What is computed head by head is `[H, B * L, ...]`, what all
heads share `[B, H * L, ...]`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Projection(nn.Linear):
    """`W x + b`, or another product of the same parameters.

    A call, and not attribute access, because ZeRO-3 gathers the parameters of modules that are called.
    """

    def forward(self, *inputs: Tensor, product: Callable[..., Any] | None = None) -> Any:
        """`W x + b`, or `product(*inputs, W, b)`."""
        return super().forward(*inputs) if product is None else product(*inputs, self.weight, self.bias)


def by_head(x_BLD: Tensor, heads: int) -> Tensor:
    """`[B, L, D]` -> `[H, B * L, E]`."""
    return x_BLD.flatten(0, 1).unflatten(-1, (heads, -1)).transpose(0, 1)


def by_item(x: Tensor, length: int) -> Tensor:
    """`[H, B * L, X]` -> `[B, H * L, X]`, L being `length`."""
    return x.unflatten(1, (-1, length)).transpose(0, 1).flatten(1, 2)


def adjoint(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Products with the projection `x` was to meet: `x W_h` `[H, B * L, D]` and `x b_h` `[H, B * L, 1]`.

    Args:
        x: `[H, B * L, E]`; heads are rows of `weight` `[D, D]` and of `bias` `[D]`.
    """
    heads = len(x)
    return torch.bmm(x, weight.unflatten(0, (heads, -1))), torch.bmm(x, bias.view(heads, -1, 1))


def after_sum(x: Tensor, total: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The weighted sums of projected tokens, from those of the tokens: `x W_h^T + total b_h`, `[H, B * L, E]`.

    Args:
        x: Sums `[H, B * L, D]`.
        total: `[H, B * L, 1]`, what the weights of each sum add up to.
    """
    heads = len(x)
    weight_HDE = weight.unflatten(0, (heads, -1)).transpose(1, 2)
    return torch.baddbmm(total * bias.view(heads, 1, -1), x, weight_HDE)


def before_sum(weights: Tensor, values: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The projection of all heads' weighted sums of values, `[B, K, D]`: the values meet it, not the sums.

    Args:
        weights: `[B, K, H * L]`.
        values: `[H, B * L, E]`; heads are columns of `weight` `[D, D]`.
    """
    length = weights.shape[-1] // len(values)
    return torch.baddbmm(bias, weights, by_item(joined(values, weight), length))


def joined(values: Tensor, weight: Tensor) -> Tensor:
    """What each head adds to the map of all heads side by side, `[H, B * L, D]`."""
    return torch.bmm(values, weight.T.unflatten(0, (len(values), -1)))
