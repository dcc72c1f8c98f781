"""What a backend receives and returns.

Shapes: T tokens (batch x length, 0 or more), N experts, P previous states (0 or more), D channels.
"""

from typing import NamedTuple

from torch import Tensor


class Arguments(NamedTuple):
    """Arguments of the operator, in the order of its schema.

    Experts and previous states are contiguous and share one dtype (float32, bfloat16, float16 or float64);
    all other floating-point tensors are float32, or float64 where the experts are, except `noise` (any).
    """

    experts: list[Tensor]
    """N tensors `[T, D]`."""
    previous: list[Tensor]
    """P tensors `[T, D]`."""
    norm_weight: Tensor
    """`[N + P, D]`, experts first."""
    norm_bias: Tensor
    """`[N + P, D]`."""
    logits: Tensor
    """`[N, D]` (static) or `[1, T, N]` (adaptive)."""
    temperature: Tensor
    """`[1]`."""
    previous_weight: Tensor
    """`[P, D]`."""
    statistics: Tensor
    """`[2, N, T]`: means and inverse deviations of the experts; constants here: the experts' gradients are
    those of the whole layer norm."""
    noise: Tensor | None
    """`[N, T, D]`, added to the logits; None: none, or the one that `seed` describes."""
    seed: Tensor | None
    """`[1]` int64: noise is `noise_scale * philox_normal(seed, offset, N, T, D)`."""
    offset: int
    noise_scale: float
    eps: float
    """Of the layer norms of previous states."""

    @property
    def adaptive(self) -> bool:
        """Whether each token has logits of its own."""
        return self.logits.ndim == 3


class Gradients(NamedTuple):
    """Gradients of the differentiable arguments, in the shapes and dtypes of these."""

    experts: list[Tensor]
    previous: list[Tensor]
    norm_weight: Tensor
    norm_bias: Tensor
    logits: Tensor
    temperature: Tensor
    previous_weight: Tensor
