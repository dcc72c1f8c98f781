"""The links of `managers` in evaluation, arranged for one image against many texts.

Each link has two halves. `own(experts)` is what follows from one item alone, computed once for it:
    experts: `[..., K, N, D]`, standardised (zero mean, unit variance) for managers, as they are for bridges;
and `mix(own, previous, other, attend)` is what remains for a pair:
    own: from `own`; leading axis B, or none when all B pairs share the item;
    previous: earlier outputs of the own modality `[B, K, D]`, standardised for managers, first layer first;
    other: the other modality's last output `[B, K', D]`, standardised for managers;
    attend: bool `[B, 1, K']`, False at tokens of `other` that do not count, or None.

The gains and biases of the managers' layer norms are folded into what they meet, so that a state is normalised
once for all its readers. Shapes: B pairs, K tokens, N experts, D width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mt_deepspeed.kernels.manager_aggregation import mixing_weights
from mt_deepspeed.models.managers import AdaptiveManager, Bridge, FirstBridge, StaticManager


class StaticLink:
    """`StaticManager`: the mixture of the experts is the item's own."""

    def __init__(self, manager: StaticManager, dtype: torch.dtype) -> None:
        count = manager.num_experts
        gains, biases = manager.affine()
        scores = manager.layer_scores[0, :, 0].float()
        weights_ND = mixing_weights(scores[:count], manager.softmax_temperature)[:, 0, 0]
        if not manager.num_previous:
            previous = scores[:0]
        elif not manager.all_previous:
            previous = scores[count:]
        elif manager.num_previous == 1:
            previous = scores.new_ones(1, 1)
        else:
            previous = torch.softmax(scores[count:] / manager.softmax_temperature_cross, dim=0)
        self.expert_gains_ND = (weights_ND * gains[:count]).to(dtype)
        self.gains_PD = (previous * gains[count:]).to(dtype)
        self.bias_D = ((weights_ND * biases[:count]).sum(0) + (previous * biases[count:]).sum(0)).to(dtype)

    def own(self, experts: Tensor) -> Tensor:
        """`[..., K, D]`."""
        return (experts * self.expert_gains_ND).sum(dim=-2).add_(self.bias_D)

    def mix(
        self, own: Tensor, previous: Sequence[Tensor], other: Tensor | None, attend: Tensor | None
    ) -> Tensor:
        """`[B, K, D]`."""
        used = previous[len(previous) - len(self.gains_PD) :]
        for gain_D, state in zip(self.gains_PD, used, strict=True):
            own = torch.addcmul(own, state, gain_D)
        return own


class AdaptiveLink:
    """`AdaptiveManager`: the mixing weights follow from the pair, what is mixed is the item's own.

    With own state `c = g z + b` and query `q` of the other modality, the logits are
    `softmax((W_q c + b_q) (W_k q + b_k)^T) q M^T + c O^T + bias`, M and O the controller's two halves. Projections
    of image tokens are moved to the text's side of each product, and `q M^T`, N numbers per token, takes the
    place of `q`, D numbers, as the values.
    """

    def __init__(self, manager: AdaptiveManager, dtype: torch.dtype, long_own: bool) -> None:
        count = manager.num_experts
        gains, biases = (part.float() for part in manager.affine())
        cross_D = manager.layer_scores_cross[0, 0, 0].float()
        self.long_own = long_own
        self.temperature = float(manager.softmax_temperature)
        self.expert_gains_ND = gains[:count].to(dtype)
        # Mixing weights add up to 1: what is added to every expert is added to the result.
        self.expert_biases_ND = (biases[:count] + cross_D * biases[-1]).to(dtype)
        self.gain_D = (cross_D * gains[-1]).to(dtype)
        controller = manager.linear_controller
        size = gains.shape[1]
        own_ND = controller.weight[:, -size:]
        self.own_ND = (own_ND * gains[-1]).to(dtype)
        self.bias_N = (controller.bias + own_ND @ biases[-1]).to(dtype)
        self.own_gain_D, self.own_bias_D = gains[-1].to(dtype), biases[-1].to(dtype)
        self.fused = not manager.own_query
        if self.fused:
            attention, norm = manager.fusion_attention, manager.extra_query_LayerNorm
            self.query = [part.to(dtype) for part in (attention.q_proj.weight, attention.q_proj.bias)]
            self.key = [part.to(dtype) for part in (attention.k_proj.weight, attention.k_proj.bias)]
            self.other_gain_D, self.other_bias_D = norm.weight.to(dtype), norm.bias.to(dtype)
            self.other_ND = controller.weight[:, :size].to(dtype)

    def own(self, experts: Tensor) -> Tensor:
        """`[..., K, N, D]`."""
        return torch.addcmul(self.expert_biases_ND, experts, self.expert_gains_ND)

    def mix(
        self, own: Tensor, previous: Sequence[Tensor], other: Tensor | None, attend: Tensor | None
    ) -> Tensor:
        """`[B, K, D]`; of a shared item a view of a contiguous `[K, B, D]`."""
        state = previous[-1]
        assert other is not None
        if not self.fused:
            logits = state @ self.own_ND.T + self.bias_N
        elif self.long_own:
            logits = self._image_logits(state, other, attend)
        else:
            logits = self._text_logits(state, other)
        weights = torch.softmax(logits / self.temperature, dim=-1)
        if own.ndim == 3:
            mixed = torch.bmm(weights.transpose(0, 1), own).transpose(0, 1)
        else:
            mixed = (weights[..., None, :] @ own).squeeze(-2)
        return mixed.addcmul_(state, self.gain_D)

    def _image_logits(self, image_BPD: Tensor, text_BLD: Tensor, attend: Tensor | None) -> Tensor:
        """`[B, P, N]`; image tokens ask, text tokens are few."""
        query_BLD = torch.addcmul(self.other_bias_D, text_BLD, self.other_gain_D)
        keys_BLD = torch.addmm(self.key[1], query_BLD.flatten(0, 1), self.key[0].T).view_as(query_BLD)
        keys_BLD = keys_BLD * keys_BLD.shape[-1] ** -0.5
        moved_BLD = keys_BLD @ self.query[0]
        shift_B1L = (keys_BLD @ self.query[1] + moved_BLD @ self.own_bias_D)[:, None]
        if attend is not None:
            shift_B1L = shift_B1L.masked_fill(~attend, float("-inf"))
        rows, few = len(text_BLD), text_BLD.shape[1]
        readers = torch.cat([moved_BLD * self.own_gain_D, self.own_ND.expand(rows, -1, -1)], dim=1)
        shifts = torch.cat([shift_B1L, self.bias_N.expand(rows, 1, -1)], dim=2)
        read = torch.baddbmm(shifts, image_BPD, readers.transpose(1, 2))
        attention_BPL = read[..., :few].softmax(dim=-1)
        return torch.baddbmm(read[..., few:], attention_BPL, query_BLD @ self.other_ND.T)

    def _text_logits(self, text_BLD: Tensor, image_BPD: Tensor) -> Tensor:
        """`[B, L, N]`; text tokens ask. What is equal for all image tokens falls out of the softmax."""
        own_BLD = torch.addcmul(self.own_bias_D, text_BLD, self.own_gain_D)
        scale = own_BLD.shape[-1] ** -0.5
        asked_BLD = torch.addmm(self.query[1], own_BLD.flatten(0, 1), self.query[0].T).view_as(own_BLD)
        moved_BLD = (asked_BLD * scale) @ self.key[0]
        rows, few = len(text_BLD), text_BLD.shape[1]
        readers = torch.cat([moved_BLD, self.other_ND.expand(rows, -1, -1)], dim=1) * self.other_gain_D
        read = readers @ image_BPD.transpose(1, 2)
        attention_BLP = read[:, :few].softmax(dim=-1)
        logits_BLN = attention_BLP @ read[:, few:].transpose(1, 2)
        return logits_BLN + text_BLD @ self.own_ND.T + (self.bias_N + self.other_ND @ self.other_bias_D)


class FirstBridgeLink:
    """`FirstBridge`."""

    def __init__(self, bridge: FirstBridge, dtype: torch.dtype) -> None:
        self.size, self.eps = bridge.normalized_shape, bridge.eps
        self.weight, self.bias = bridge.weight.to(dtype), bridge.bias.to(dtype)

    def own(self, experts: Tensor) -> Tensor:
        """`[..., K, D]`."""
        return nn.functional.layer_norm(experts[..., 0, :], self.size, self.weight, self.bias, self.eps)

    def mix(
        self, own: Tensor, previous: Sequence[Tensor], other: Tensor | None, attend: Tensor | None
    ) -> Tensor:
        """`own`: nothing stands before it."""
        return own


class BridgeLink:
    """`Bridge` in front of cross-modal layer `layer`."""

    def __init__(self, bridge: Bridge, dtype: torch.dtype, layer: int) -> None:
        self.layer = layer
        self.uni = float(bridge.scaled_factor) if bridge.kind == "bridge_scaled_add" else 1.0
        self.cross = 1.0
        if bridge.kind == "bridge_interpolate":
            self.cross = float(bridge.beta)
            self.uni = 1.0 - self.cross
        norm = bridge.LayerNorm
        self.size, self.eps = norm.normalized_shape, norm.eps
        self.weight, self.bias = norm.weight.to(dtype), norm.bias.to(dtype)

    def own(self, experts: Tensor) -> Tensor:
        """`[..., K, D]`."""
        return experts[..., self.layer, :] * self.uni

    def mix(
        self, own: Tensor, previous: Sequence[Tensor], other: Tensor | None, attend: Tensor | None
    ) -> Tensor:
        """`[B, K, D]`."""
        mixed = torch.add(own, previous[-1], alpha=self.cross)
        return nn.functional.layer_norm(mixed, self.size, self.weight, self.bias, self.eps)


Link = StaticLink | AdaptiveLink | FirstBridgeLink | BridgeLink


def arrange(link: nn.Module, dtype: torch.dtype, layer: int, long_own: bool) -> Link:
    """The arranged form of a link in front of cross-modal layer `layer`; `long_own` for the image's."""
    if isinstance(link, AdaptiveManager):
        return AdaptiveLink(link, dtype, long_own)
    if isinstance(link, StaticManager):
        return StaticLink(link, dtype)
    if isinstance(link, FirstBridge):
        return FirstBridgeLink(link, dtype)
    assert isinstance(link, Bridge)
    return BridgeLink(link, dtype, layer)
