"""Links from uni-modal into cross-modal layers: managers (arXiv 2306.00103), bridges (arXiv 2206.08657).

Every link is called as `link(experts, previous, other, other_attend, record, statistics, seed)`:
    experts: N tensors `[B, L, D]`, projected uni-modal layers of its own modality, lowest first;
    previous: outputs of all earlier cross-modal layers of its own modality, first layer first;
    other: the other modality's last cross-modal output `[B, K, D]`, None at the first layer;
    other_attend: bool `[B, 1, K]`, False at tokens of `other` that do not count, or None;
    record: None, or a dict that receives detached mixing weights (for plots and tests);
    statistics: of the experts' layer norms, shared by all managers of a modality; None: made by the manager;
    seed: `[1]` int64, of the noise of all managers of a modality; None: no noise.
It returns the input `[B, L, D]` of the next cross-modal layer.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mt_deepspeed.config.model import LinkConfig, ModelConfig
from mt_deepspeed.kernels.manager_aggregation import Philox, manager_aggregation, mixing_weights
from mt_deepspeed.models.projection import Projection, adjoint, by_head, by_item

Record = dict[str, Tensor]


def draw_seed(device: torch.device) -> Tensor:
    """A seed `[1]` int64 of managers' noise, from torch's generator of the device.

    So that whoever seeds that generator decides on the noise, and recomputation under activation
    checkpointing, which restores it, meets the same noise.
    """
    return torch.randint(2**63 - 1, (1,), device=device)


class _NormParameters(nn.Module):
    """Gain and bias of a layer norm that the aggregation applies; calling it returns both.

    A call, and not attribute access, because ZeRO-3 gathers the parameters of modules that are called.
    """

    def __init__(self, size: int, gain: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), gain))
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.weight.clone(), self.bias.clone()


class _Manager(nn.Module):
    """What static and adaptive managers share: layer norms, temperature, noise, the aggregation."""

    def __init__(self, link: LinkConfig, size: int, num_experts: int, num_previous: int, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_experts = num_experts
        self.num_previous = num_previous
        self.eps = link.layer_norm_eps
        self.softmax_temperature = nn.Parameter(
            torch.full((1,), float(link.temperature)), requires_grad=link.learnable_temperature
        )
        gains = [link.expert_gain if num_previous else 1.0] * num_experts + [1.0] * num_previous
        self.LayerNorm = nn.ModuleList(_NormParameters(size, gain) for gain in gains)

    def affine(self) -> tuple[Tensor, Tensor]:
        """Gains and biases `[N + P, D]` of all layer norms, experts first."""
        weights, biases = zip(*(norm() for norm in self.LayerNorm), strict=True)
        return torch.stack(weights), torch.stack(biases)

    def aggregate(
        self,
        experts: Sequence[Tensor],
        previous: Sequence[Tensor],
        affine: tuple[Tensor, Tensor],
        logits: Tensor,
        previous_weight: Tensor | None,
        record: Record | None,
        statistics: Tensor | None,
        seed: Tensor | None,
    ) -> Tensor:
        """Runs the aggregation, with noise of standard deviation 1/N per element if there is a seed of it."""
        if record is not None:
            weights = mixing_weights(logits, self.softmax_temperature)
            record["weights"] = (
                weights[:, 0, 0] if logits.ndim == 2 else weights[..., 0].movedim(0, -1)
            ).detach()
            if previous_weight is not None:
                record["weight_previous"] = previous_weight.detach()
        noise = None if seed is None else Philox(seed, self.layer, 1 / len(experts))
        return manager_aggregation(
            experts,
            previous,
            *affine,
            logits,
            self.softmax_temperature,
            previous_weight,
            noise,
            self.eps,
            statistics,
        )


class StaticManager(_Manager):
    """SAUE and SAE: mixing weights are parameters (arXiv 2306.00103, section 3.2).

    SAUE adds the last cross-modal output with a free weight. SAE (`all_previous`) adds all previous ones with
    weights of their own softmax and temperature; a single one has weight 1 and no parameter.
    """

    def __init__(
        self,
        link: LinkConfig,
        size: int,
        num_experts: int,
        num_previous: int,
        all_previous: bool,
        layer: int,
    ) -> None:
        super().__init__(link, size, num_experts, num_previous, layer)
        self.all_previous = all_previous
        num_free = num_previous if not all_previous or num_previous > 1 else 0
        scores = torch.full((1, num_experts + num_free, 1, size if link.weight == "vector" else 1), 1.0)
        scores[:, :num_experts] /= num_experts
        if all_previous and num_free:
            scores[:, num_experts:] /= num_previous
            self.softmax_temperature_cross = nn.Parameter(
                torch.full((1,), float(link.temperature)), requires_grad=link.learnable_temperature
            )
        self.layer_scores = nn.Parameter(scores, requires_grad=link.learnable_weight)

    def forward(
        self,
        experts: Sequence[Tensor],
        previous: Sequence[Tensor],
        other: Tensor | None,
        other_attend: Tensor | None,
        record: Record | None = None,
        statistics: Tensor | None = None,
        seed: Tensor | None = None,
    ) -> Tensor:
        """See the module docstring."""
        scores_MD = self.layer_scores[0, :, 0]
        used = list(previous[len(previous) - self.num_previous :])
        previous_weight: Tensor | None = None
        if self.all_previous and used:
            if len(used) == 1:
                previous_weight = scores_MD.new_ones(1, 1)
            else:
                cross = scores_MD[self.num_experts :] / self.softmax_temperature_cross
                previous_weight = torch.softmax(cross, dim=0)
        elif used:
            previous_weight = scores_MD[self.num_experts :]
        logits = scores_MD[: self.num_experts]
        return self.aggregate(experts, used, self.affine(), logits, previous_weight, record, statistics, seed)


class FusionAttention(nn.Module):
    """Single-head attention whose values are the keys' source itself: no value or output projection.

    Both projections are applied to the shorter of the two token sequences, one of them transposed: a caption has
    20 times fewer tokens than a picture, whose tokens then need no projection at all. The scores are the same.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.q_proj = Projection(size, size)
        self.k_proj = Projection(size, size)

    def forward(
        self, query_BLD: Tensor, other_BKD: Tensor, attend_B1K: Tensor | None, record: Record | None
    ) -> Tensor:
        """`softmax(q k^T / sqrt(D)) other`, `[B, L, D]`."""
        scale = query_BLD.shape[-1] ** -0.5
        if query_BLD.shape[1] <= other_BKD.shape[1]:
            moved_BLD, shift_BL1 = self._moved(self.k_proj, self.q_proj(query_BLD) * scale)
            scores_BLK = moved_BLD @ other_BKD.transpose(1, 2) + shift_BL1
        else:
            moved_BKD, shift_BK1 = self._moved(self.q_proj, self.k_proj(other_BKD) * scale)
            scores_BLK = query_BLD @ moved_BKD.transpose(1, 2) + shift_BK1.transpose(1, 2)
        if attend_B1K is not None:
            scores_BLK = scores_BLK.masked_fill(~attend_B1K, float("-inf"))
        attention_BLK = scores_BLK.softmax(dim=-1)
        if record is not None:
            record["query_attention"] = attention_BLK.detach()
        # Written out: for one head as wide as the model there is no fused attention to call.
        return attention_BLK @ other_BKD

    def _moved(self, projection: Projection, x_BLD: Tensor) -> list[Tensor]:
        """`[B, L, D]` and `[B, L, 1]`: `x (W y + b)` is the first times `y`, plus the second."""
        return [by_item(part, x_BLD.shape[1]) for part in projection(by_head(x_BLD, 1), product=adjoint)]


class AdaptiveManager(_Manager):
    """AAUE: mixing logits per token from a query (arXiv 2306.00103, section 3.2).

    The query is the manager's own previous cross-modal output and what it attends to in the other modality's
    (fused query), or the former alone (`own_query`).
    """

    def __init__(self, link: LinkConfig, size: int, num_experts: int, own_query: bool, layer: int) -> None:
        super().__init__(link, size, num_experts, num_previous=1, layer=layer)
        self.own_query = own_query
        self.layer_scores_cross = nn.Parameter(
            torch.ones(1, 1, 1, size if link.weight == "vector" else 1), requires_grad=link.learnable_weight
        )
        self.linear_controller = nn.Linear(size if own_query else 2 * size, num_experts)
        if not own_query:
            self.fusion_attention = FusionAttention(size)
            self.extra_query_LayerNorm = nn.LayerNorm(size, eps=link.layer_norm_eps)

    def forward(
        self,
        experts: Sequence[Tensor],
        previous: Sequence[Tensor],
        other: Tensor | None,
        other_attend: Tensor | None,
        record: Record | None = None,
        statistics: Tensor | None = None,
        seed: Tensor | None = None,
    ) -> Tensor:
        """See the module docstring."""
        last = previous[-1]
        affine = self.affine()
        query = F.layer_norm(last, last.shape[-1:], affine[0][-1], affine[1][-1], self.eps)
        if not self.own_query:
            attended = self.fusion_attention(query, self.extra_query_LayerNorm(other), other_attend, record)
            query = torch.cat([attended, query.to(attended.dtype)], dim=-1)  # other modality first
        logits_BLN = self.linear_controller(query)
        if record is not None:
            record["logits"] = logits_BLN.detach()
        previous_weight = self.layer_scores_cross[0, :, 0]
        return self.aggregate(experts, [last], affine, logits_BLN, previous_weight, record, statistics, seed)


class FirstBridge(nn.LayerNorm):
    """Input of the first cross-modal layer in BridgeTower: the normalised lowest expert."""

    def forward(  # type: ignore[override]
        self,
        experts: Sequence[Tensor],
        previous: Sequence[Tensor],
        other: Tensor | None,
        other_attend: Tensor | None,
        record: Record | None = None,
        statistics: Tensor | None = None,
        seed: Tensor | None = None,
    ) -> Tensor:
        """See the module docstring."""
        return super().forward(experts[0])


class Bridge(nn.Module):
    """`LN(uni + cross)`, `LN(s * uni + cross)` or `LN((1 - b) * uni + b * cross)`.

    May serve several layers: the layer index is the number of previous outputs.
    """

    def __init__(self, link: LinkConfig, size: int) -> None:
        super().__init__()
        if link.kind == "bridge_scaled_add":
            self.scaled_factor = nn.Parameter(torch.ones(1))
        elif link.kind == "bridge_interpolate":
            self.beta = nn.Parameter(torch.full((1,), 0.5))
        self.kind = link.kind
        self.LayerNorm = nn.LayerNorm(size, eps=link.layer_norm_eps)

    def forward(
        self,
        experts: Sequence[Tensor],
        previous: Sequence[Tensor],
        other: Tensor | None,
        other_attend: Tensor | None,
        record: Record | None = None,
        statistics: Tensor | None = None,
        seed: Tensor | None = None,
    ) -> Tensor:
        """See the module docstring."""
        uni, cross = experts[len(previous)], previous[-1]
        if self.kind == "bridge_scaled_add":
            mixed = uni * self.scaled_factor + cross
        elif self.kind == "bridge_interpolate":
            mixed = uni * (1 - self.beta) + cross * self.beta
        else:
            mixed = uni + cross
        result: Tensor = self.LayerNorm(mixed)
        return result


def build_manager(config: ModelConfig, num_experts: int, layer: int) -> nn.Module:
    """The manager that feeds cross-modal layer `layer`; the first one has no previous output to ask."""
    link, size = config.link, config.cross_modal.hidden_size
    if layer == 0 or link.kind == "saue":
        return StaticManager(link, size, num_experts, min(layer, 1), all_previous=False, layer=layer)
    if link.kind == "sae":
        return StaticManager(link, size, num_experts, layer, all_previous=True, layer=layer)
    return AdaptiveManager(link, size, num_experts, own_query=link.kind == "aaue_own_query", layer=layer)
