"""The two-tower model: text and vision tower, links, cross-modal encoder.

Parameter names are those of the published checkpoints. Shapes: B batch, L text tokens, P image tokens,
N layers taken from a tower, D cross-modal width.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mt_deepspeed.config.model import ModelConfig
from mt_deepspeed.kernels.manager_aggregation import expert_statistics
from mt_deepspeed.models.cross_modal import CrossModalLayer, Pooler
from mt_deepspeed.models.managers import Bridge, FirstBridge, Record, build_manager, draw_seed
from mt_deepspeed.models.partition import init_weights
from mt_deepspeed.models.text_tower import TextTower
from mt_deepspeed.models.vision_tower import VisionTower

Modality = Literal["text", "image"]


class FusionOutput(NamedTuple):
    """Result of the cross-modal encoder; a tuple, because ZeRO-3 looks for tensors in tuples."""

    text_feats: Tensor
    """`[B, L, D]`, last cross-modal text layer."""
    image_feats: Tensor
    """`[B, P, D]`, last cross-modal image layer; `[B - pooled_from, 1, D]` where only class tokens were asked for."""
    cls_feats: Tensor
    """`[B, 2D]` or `[B - pooled_from, 2D]`, text pooler then image pooler."""


class Transform(nn.Linear):
    """Projection of a uni-modal layer, to which an embedding is added in the same pass over memory.

    Under autocast the result, an expert, is in half precision: added afterwards, the embedding would make it float32
    and double the bytes that every manager reads.
    """

    def forward(self, state_BLD: Tensor, offset_D: Tensor) -> Tensor:  # type: ignore[override]
        """`W x + b + offset`."""
        return F.linear(state_BLD, self.weight, self.bias + offset_D)


class TwoTowerModel(nn.Module):
    """ManagerTower (arXiv 2306.00103) and BridgeTower (arXiv 2206.08657), by `config.link.kind`.

    Towers and fusion are separate calls, so that each text and image passes its tower once: rows of the
    returned states may be gathered, repeated or dropped before they are fused.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        cross, size = config.cross_modal, config.cross_modal.hidden_size
        self.vit_model = VisionTower(config.vision, config.num_image_states)
        self.text_transformer = TextTower(config.text, config.num_text_states, config.init_std)
        self.token_type_embeddings = nn.Embedding(cross.num_token_types, size)
        self.cross_modal_text_transform = self._build_transform(config.text.hidden_size)
        self.cross_modal_image_transform = self._build_transform(config.vision.width)
        layers = range(cross.num_layers)
        self.cross_modal_text_layers = nn.ModuleList(CrossModalLayer(cross, "text") for _ in layers)
        self.cross_modal_image_layers = nn.ModuleList(CrossModalLayer(cross, "image") for _ in layers)
        self.cross_modal_text_pooler = Pooler(size)
        self.cross_modal_image_pooler = Pooler(size)
        if config.has_managers:
            self.layer_embeddings_text = nn.Embedding(config.text.num_layers, size)
            self.layer_embeddings_image = nn.Embedding(config.vision.num_layers, size)
            self.cross_modal_text_manager_tower = self._build_managers(config.link.num_text_experts)
            self.cross_modal_image_manager_tower = self._build_managers(config.link.num_image_experts)
        else:
            self.cross_modal_text_layernorm = FirstBridge(size, eps=config.link.layer_norm_eps)
            self.cross_modal_image_layernorm = FirstBridge(size, eps=config.link.layer_norm_eps)
            self.cross_modal_text_link_tower = self._build_bridges()
            self.cross_modal_image_link_tower = self._build_bridges()
        for name, child in self.named_children():
            if name not in ("vit_model", "text_transformer"):
                init_weights(child, config.init_std)

    def _build_transform(self, in_size: int) -> nn.Module:
        cross = self.config.cross_modal
        if cross.shared_transform:
            return Transform(in_size, cross.hidden_size)
        return nn.ModuleList(Transform(in_size, cross.hidden_size) for _ in range(cross.num_layers))

    def _build_managers(self, num_experts: int) -> nn.ModuleList:
        return nn.ModuleList(
            nn.ModuleDict({"manager_layer": build_manager(self.config, num_experts, layer)})
            for layer in range(self.config.cross_modal.num_layers)
        )

    def _build_bridges(self) -> nn.Module:
        link, cross = self.config.link, self.config.cross_modal
        if link.shared:
            return Bridge(link, cross.hidden_size)
        return nn.ModuleList(Bridge(link, cross.hidden_size) for _ in range(cross.num_layers - 1))

    def links(self, modality: Modality) -> list[nn.Module]:
        """The manager or bridge in front of each cross-modal layer of `modality`."""
        if self.config.has_managers:
            tower = getattr(self, f"cross_modal_{modality}_manager_tower")
            return [part["manager_layer"] for part in tower]
        first = getattr(self, f"cross_modal_{modality}_layernorm")
        rest = getattr(self, f"cross_modal_{modality}_link_tower")
        count = self.config.cross_modal.num_layers - 1
        return [first, *([rest] * count if self.config.link.shared else rest)]

    def checkpointable_layers(self) -> list[nn.Module]:
        """Layers that activation checkpointing may wrap: text, vision, cross-modal text and image layers."""
        return [
            *self.text_transformer.encoder.layer,
            *self.vit_model.visual.transformer.resblocks,
            *self.cross_modal_text_layers,
            *self.cross_modal_image_layers,
        ]

    def encode_text(self, ids_BL: Tensor, mask_BL: Tensor) -> list[Tensor]:
        """Top text layers.

        Args:
            ids_BL: int64 token ids.
            mask_BL: 1 where a token is, 0 at padding.

        Returns:
            N tensors `[B, L, text.hidden_size]`, lowest layer first.
        """
        states: list[Tensor] = self.text_transformer(ids_BL, mask_BL)
        return states

    def encode_image(self, pixels: Tensor) -> list[Tensor]:
        """Top vision layers after `ln_post`.

        Args:
            pixels: `[B, 3, S, S]`, uint8, or float and normalised.

        Returns:
            N tensors `[B, P, vision.width]`, lowest layer first.
        """
        states: list[Tensor] = self.vit_model(pixels)
        return states

    def text_experts(self, states: Sequence[Tensor]) -> list[Tensor]:
        """Projected text layers with type (and for managers layer) embeddings: N tensors `[B, L, D]`."""
        return self._experts("text", states, token_type=0)

    def image_experts(self, states: Sequence[Tensor], token_type: int = 1) -> list[Tensor]:
        """Projected vision layers; `token_type` 2 marks the second image of a pair. N tensors `[B, P, D]`."""
        return self._experts("image", states, token_type)

    def _experts(self, modality: Modality, states: Sequence[Tensor], token_type: int) -> list[Tensor]:
        device = states[0].device
        transform = getattr(self, f"cross_modal_{modality}_transform")
        offset = self.token_type_embeddings(torch.full((1,), token_type, device=device))
        offsets = offset.expand(len(states), -1)
        if self.config.has_managers:
            table = getattr(self, f"layer_embeddings_{modality}")
            top = torch.arange(table.num_embeddings - len(states), table.num_embeddings, device=device)
            offsets = offsets + table(top)
        if self.config.cross_modal.shared_transform:
            return [transform(state, offset) for state, offset in zip(states, offsets, strict=True)]
        return [one(state, offset) for one, state, offset in zip(transform, states, offsets, strict=True)]

    def fuse(
        self,
        text_states: Sequence[Tensor],
        image_states: Sequence[Tensor],
        text_mask_BL: Tensor,
        image_token_type: int = 1,
        record: Record | None = None,
        pooled_from: int | None = None,
    ) -> FusionOutput:
        """Runs the cross-modal encoder on tower outputs with equal numbers of rows.

        Args:
            text_states: From `encode_text`.
            image_states: From `encode_image`.
            text_mask_BL: 1 where a token is, 0 at padding.
            image_token_type: Row of the type table for image tokens.
            record: None, or a dict that receives detached intermediates: `experts.M` `[B, N, L, D]`,
                `manager.M.i.{out,weights,weight_previous,logits,query_attention}` or `bridge.M.i`, and
                `cross.M.i`, with M `text` or `image` and i the cross-modal layer.
            pooled_from: The first pair whose class features are wanted; all from it on are. The last image layer is
                then computed for their class tokens alone. None: all tokens of all pairs.
        """
        return self.fuse_experts(
            self.text_experts(text_states),
            self.image_experts(image_states, image_token_type),
            text_mask_BL,
            record,
            pooled_from,
        )

    def fuse_experts(
        self,
        text_experts: Sequence[Tensor],
        image_experts: Sequence[Tensor],
        text_mask_BL: Tensor,
        record: Record | None = None,
        pooled_from: int | None = None,
    ) -> FusionOutput:
        """As `fuse`, from projected layers (`text_experts`, `image_experts`)."""
        attend = text_mask_BL.bool()
        attend_B11L, attend_B1L = attend[:, None, None, :], attend[:, None, :]
        to_image = attend_B1L if self.config.mask_padding_in_managers else None
        text_shared = self._shared(text_experts)
        image_shared = self._shared(image_experts)
        texts: list[Tensor] = []
        images: list[Tensor] = []
        text: Tensor | None = None
        image: Tensor | None = None
        layers = zip(
            self.links("text"),
            self.links("image"),
            self.cross_modal_text_layers,
            self.cross_modal_image_layers,
            strict=True,
        )
        for i, (text_link, image_link, text_layer, image_layer) in enumerate(layers):
            notes: dict[Modality, Record | None] = {
                "text": None if record is None else {},
                "image": None if record is None else {},
            }
            text_in = text_link(text_experts, texts, image, None, notes["text"], *text_shared)
            image_in = image_link(image_experts, images, text, to_image, notes["image"], *image_shared)
            # Both streams read the inputs of this layer, not each other's output.
            text = text_layer(text_in, image_in, attend_B11L)
            if pooled_from is None or i + 1 < self.config.cross_modal.num_layers:
                image = image_layer(image_in, text_in, attend_B11L)
            else:
                rows = slice(pooled_from, None)
                image = image_layer(image_in[rows, :1], text_in[rows], attend_B11L[rows], image_in[rows])
            texts.append(text)
            images.append(image)
            if record is not None:
                self._note(record, i, "text", notes["text"], text_in, text)
                self._note(record, i, "image", notes["image"], image_in, image)
        if record is not None and self.config.has_managers:
            record["experts.text"] = torch.stack(list(text_experts), dim=1).detach()
            record["experts.image"] = torch.stack(list(image_experts), dim=1).detach()
        pooled_text = self.cross_modal_text_pooler(texts[-1][pooled_from or 0 :])
        cls_feats = torch.cat([pooled_text, self.cross_modal_image_pooler(images[-1])], dim=-1)
        return FusionOutput(text_feats=texts[-1], image_feats=images[-1], cls_feats=cls_feats)

    def _shared(self, experts: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """What all managers of a modality use in one pass: the experts' statistics and the seed of the noise."""
        if not self.config.has_managers:
            return None, None
        noisy = self.training and self.config.link.noise
        seed = draw_seed(experts[0].device) if noisy else None
        return expert_statistics(experts, self.config.link.layer_norm_eps), seed

    def _note(
        self, record: Record, i: int, modality: Modality, notes: Record | None, entry: Tensor, out: Tensor
    ) -> None:
        for key, value in (notes or {}).items():
            record[f"manager.{modality}.{i}.{key}"] = value
        name = f"manager.{modality}.{i}.out" if self.config.has_managers else f"bridge.{modality}.{i}"
        record[name] = entry.detach()
        record[f"cross.{modality}.{i}"] = out.detach()

    def forward(self, text_ids: Tensor, text_mask: Tensor, pixels: Tensor) -> FusionOutput:
        """Encodes and fuses pairs: `text_ids` and `text_mask` `[B, L]`, `pixels` `[B, 3, S, S]`."""
        return self.fuse(self.encode_text(text_ids, text_mask), self.encode_image(pixels), text_mask)
