"""Manager aggregation in plain PyTorch: the numerical truth for fused versions.

ManagerTower (arXiv 2306.00103), section 3: every cross-modal layer reads
`sum_i softmax_i((S_i + noise_i) / T) * LN_i(U_i) + sum_j w_j * LN_{N+j}(C_j)`
with experts `U_i` (uni-modal layers) and previous cross-modal states `C_j`.

Shapes: B batch, N experts, P previous states (0 or more), L tokens, D channels.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def mixing_weights(logits: Tensor, temperature: Tensor, noise: Tensor | None = None) -> Tensor:
    """Weights of the experts: `softmax over N of (logits + noise) / temperature`.

    Args:
        logits: `[N, D]` or `[N, 1]` (static), or `[B, L, N]` (adaptive: one set per token).
        temperature: `[1]`.
        noise: None or `[N, B, L, D]`.

    Returns:
        `[N, 1, 1, D or 1]` (static) or `[N, B, L, 1]` (adaptive), `[N, B, L, D]` with noise;
        float32, or float64 if the logits are.
    """
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scores = scores[:, None, None, :] if scores.ndim == 2 else scores.movedim(-1, 0).unsqueeze(-1)
    if noise is not None:
        scores = scores + noise
    return torch.softmax(scores / temperature, dim=0)


def manager_aggregation(
    experts: Sequence[Tensor],
    previous: Sequence[Tensor],
    norm_weight: Tensor,
    norm_bias: Tensor,
    logits: Tensor,
    temperature: Tensor,
    previous_weight: Tensor | None = None,
    noise: Tensor | None = None,
    eps: float = 1e-5,
    statistics: Sequence[tuple[Tensor, Tensor]] | None = None,
) -> Tensor:
    """Aggregates experts and previous cross-modal states into the input of a cross-modal layer.

    Everything inside is float32 (float64 if the experts are), cast once at the end.

    Args:
        experts: N tensors `[B, L, D]`, any strides.
        previous: P tensors `[B, L, D]`.
        norm_weight: `[N + P, D]`, gains of the layer norms, experts first.
        norm_bias: `[N + P, D]`.
        logits: `[N, D]`, `[N, 1]` or `[B, L, N]`, see `mixing_weights`.
        temperature: `[1]`.
        previous_weight: `[P, D]` or `[P, 1]`, applied as given; None when P is 0.
        noise: None or `[N, B, L, D]`, added to the logits before the temperature divides them.
        eps: Of every layer norm.
        statistics: None, or per expert (mean, 1 / standard deviation), each `[B, L, 1]`, when the caller
            shares them between the managers of a step.

    Returns:
        `[B, L, D]`, dtype of the experts.
    """
    if not experts:
        raise ValueError("manager_aggregation: found no experts, expected at least one")
    if previous and previous_weight is None:
        raise ValueError(f"manager_aggregation: {len(previous)} previous states need previous_weight")
    dtype = torch.promote_types(experts[0].dtype, torch.float32)
    gain, bias = norm_weight.to(dtype), norm_bias.to(dtype)
    weights = [*mixing_weights(logits, temperature, noise)]
    if previous_weight is not None:
        weights += previous_weight.to(dtype)

    def normed(i: int, state: Tensor) -> Tensor:
        if statistics is None or i >= len(experts):
            return F.layer_norm(state.to(dtype), state.shape[-1:], gain[i], bias[i], eps)
        mean, inverse_deviation = statistics[i]
        return (state.to(dtype) - mean) * inverse_deviation * gain[i] + bias[i]

    total = weights[0] * normed(0, experts[0])
    for i, state in enumerate([*experts[1:], *previous], start=1):
        total = torch.addcmul(total, weights[i], normed(i, state))
    return total.to(experts[0].dtype)
