"""Manager aggregation in plain PyTorch: the numerical truth for fused versions, float64-capable.

ManagerTower (arXiv 2306.00103), section 3: every cross-modal layer reads
`sum_i softmax_i((S_i + noise_i) / T) * LN_i(U_i) + sum_j w_j * LN_{N+j}(C_j)`
with experts `U_i` (uni-modal layers) and previous cross-modal states `C_j`.

`aggregate` is the formula, differentiated by autograd. `statistics`, `forward` and `backward` are the backend
`reference`: the same with the derivatives written out, so that only inputs and statistics are kept.

Shapes: B batch, N experts, P previous states (0 or more), L length, T = B x L tokens, D channels.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mt_deepspeed.kernels.manager_aggregation.noise import philox_normal
from mt_deepspeed.kernels.manager_aggregation.protocol import Arguments, Gradients


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
    return torch.softmax(_scores(logits, noise) / temperature, dim=0)


def _scores(logits: Tensor, noise: Tensor | None) -> Tensor:
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scores = scores[:, None, None, :] if scores.ndim == 2 else scores.movedim(-1, 0).unsqueeze(-1)
    return scores if noise is None else scores + noise


def aggregate(
    experts: Sequence[Tensor],
    previous: Sequence[Tensor],
    norm_weight: Tensor,
    norm_bias: Tensor,
    logits: Tensor,
    temperature: Tensor,
    previous_weight: Tensor | None = None,
    noise: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """The formula; arguments as in `operator.manager_aggregation`, `noise` `[N, B, L, D]` or None.

    Everything inside is float32 (float64 if the experts are), cast once at the end.
    """
    dtype = torch.promote_types(experts[0].dtype, torch.float32)
    gain, bias = norm_weight.to(dtype), norm_bias.to(dtype)
    weights = [*mixing_weights(logits, temperature, noise)]
    if previous_weight is not None:
        weights.extend(previous_weight.to(dtype).unbind())  # += on a list cannot be compiled
    total = torch.zeros((), dtype=dtype, device=experts[0].device)
    for i, state in enumerate([*experts, *previous]):
        normed = F.layer_norm(state.to(dtype), state.shape[-1:], gain[i], bias[i], eps)
        total = torch.addcmul(total, weights[i], normed)
    return total.to(experts[0].dtype)


def unsupported(experts: list[Tensor], num_previous: int) -> str | None:
    """Everything is supported."""
    return None


def statistics(states: list[Tensor], eps: float) -> Tensor:
    """Means and inverse deviations `[2, N, T]`; see the package's docstring for all backend functions."""
    pairs = []
    for state in states:
        exact = state.to(torch.promote_types(state.dtype, torch.float32))
        mean = exact.mean(dim=-1)
        variance = (exact - mean[:, None]).square_().mean(dim=-1)
        pairs.append(torch.stack([mean, (variance + eps).rsqrt()]))
    return torch.stack(pairs, dim=1)


def forward(a: Arguments) -> tuple[Tensor, Tensor]:
    """See the package's docstring."""
    dtype = a.norm_weight.dtype
    previous_statistics = (
        statistics(a.previous, a.eps) if a.previous else a.statistics.new_empty(2, 0, a.statistics.shape[2])
    )
    weights = [*_weights(a)[1], *a.previous_weight]
    both = torch.cat([a.statistics, previous_statistics], dim=1)
    total = torch.zeros(a.experts[0].shape, dtype=dtype, device=a.experts[0].device)
    for i, state in enumerate([*a.experts, *a.previous]):
        normed = _standardise(state, both[:, i]) * a.norm_weight[i] + a.norm_bias[i]
        total.addcmul_(weights[i], normed)
    return total.to(a.experts[0].dtype), previous_statistics


def backward(a: Arguments, previous_statistics: Tensor, grad: Tensor) -> Gradients:
    """See the package's docstring."""
    num_experts, grad = len(a.experts), grad.to(a.norm_weight.dtype)
    scores, weights = _weights(a)
    both = torch.cat([a.statistics, previous_statistics], dim=1)
    states = [*a.experts, *a.previous]

    mixed = torch.zeros_like(grad)
    for i, state in enumerate(a.experts):
        mixed.addcmul_(weights[i], _standardise(state, both[:, i]) * a.norm_weight[i] + a.norm_bias[i])

    norm_weight, norm_bias = torch.zeros_like(a.norm_weight), torch.zeros_like(a.norm_bias)
    logits, previous_weight = torch.zeros_like(a.logits), torch.zeros_like(a.previous_weight)
    temperature = torch.zeros_like(a.temperature)
    state_grads = []
    for i, state in enumerate(states):
        standard = _standardise(state, both[:, i])
        normed = standard * a.norm_weight[i] + a.norm_bias[i]
        if i < num_experts:
            normed_grad = weights[i] * grad
            score_grad = normed_grad * (normed - mixed) / a.temperature
            temperature -= (score_grad * scores[i]).sum() / a.temperature
            if a.adaptive:
                logits[0, :, i] = score_grad.sum(dim=1)
            else:
                logits[i] = score_grad.sum(dim=0)
        else:
            normed_grad = a.previous_weight[i - num_experts] * grad
            previous_weight[i - num_experts] = (grad * normed).sum(dim=0)
        norm_weight[i] = (normed_grad * standard).sum(dim=0)
        norm_bias[i] = normed_grad.sum(dim=0)
        inner = normed_grad * a.norm_weight[i]
        inner -= inner.mean(dim=1, keepdim=True) + standard * (inner * standard).mean(dim=1, keepdim=True)
        state_grads.append((inner * both[1, i][:, None]).to(state.dtype))
    return Gradients(
        state_grads[:num_experts],
        state_grads[num_experts:],
        norm_weight,
        norm_bias,
        logits,
        temperature,
        previous_weight,
    )


def _standardise(state: Tensor, statistics: Tensor) -> Tensor:
    mean, inverse_deviation = statistics
    return (state.to(statistics.dtype) - mean[:, None]) * inverse_deviation[:, None]


def _weights(a: Arguments) -> tuple[Tensor, Tensor]:
    """Scores and mixing weights, both `[N, 1 or T, 1 or D]`."""
    noise = a.noise
    if noise is None and a.seed is not None:
        tokens, size = a.experts[0].shape
        normals = philox_normal(a.seed, a.offset, len(a.experts), tokens, size, a.norm_weight.dtype)
        noise = normals * a.noise_scale
    scores = _scores(a.logits, None if noise is None else noise[:, None]).squeeze(1)
    return scores, torch.softmax(scores / a.temperature, dim=0)
