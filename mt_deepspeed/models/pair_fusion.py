"""One image against many texts: the cross-modal encoder in evaluation, without what repeats or is not read.

`PairFusion` gives the `cls_feats` of `TwoTowerModel.fuse_experts` for all pairs of an image and B texts. The
arithmetic is the same in another order, so results differ by rounding only:

- What follows from one item alone is computed once for it: the experts as each manager reads them, the input of
  the first cross-modal layer, its self-attention, its keys and values.
- Of the last layer only the first tokens are computed, which is all that the poolers read.

Shapes: B texts, L text tokens, P image tokens, N experts, D width, H heads, E = D / H.
"""

import copy
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from mt_deepspeed.models.co_attention import AttentionBlock, Output
from mt_deepspeed.models.cross_modal import CrossModalLayer
from mt_deepspeed.models.pair_links import Link, arrange
from mt_deepspeed.models.projection import by_item, joined
from mt_deepspeed.models.two_tower import Modality, TwoTowerModel


class FewKeys(NamedTuple):
    """Keys and values of texts with the projections of who attends to them multiplied in."""

    readers: Tensor
    """`[B, H * L, D]`: scores are `hidden @ readers^T + shifts`."""
    shifts: Tensor
    """`[B, 1, H * L]`, -inf at padding."""
    values: Tensor
    """`[B, H * L, D]`, as they arrive behind the output projection."""


@dataclass(frozen=True)
class TextSide:
    """What follows from B texts alone.

    Attributes:
        attend: bool `[B, L]`, True at tokens.
        entry: `[B, L, D]`, input of the first cross-modal layer.
        hidden: `[B, L, D]`, behind its self-attention.
        keys: Of its input, for the image's stream.
        own: What the links of later layers read.
    """

    attend: Tensor
    entry: Tensor
    hidden: Tensor
    keys: FewKeys
    own: list[Tensor]


@dataclass(frozen=True)
class ImageSide:
    """What follows from one image alone.

    Attributes:
        hidden: `[P, D]`, behind the self-attention of the first cross-modal layer.
        keys: `[1, H, P, E]`, of that layer's input, for the text's stream.
        values: `[1, H, P, E]`.
        own: What the links of later layers read.
    """

    hidden: Tensor
    keys: Tensor
    values: Tensor
    own: list[Tensor]


class PairFusion:
    """Cross-modal encoder of a model in evaluation mode, for one image and many texts at a time.

    Args:
        model: Its weights are copied into `dtype`; the copy does not follow later changes.
        dtype: Of weights and activations; norms and softmax keep float32 inside.
    """

    def __init__(self, model: TwoTowerModel, dtype: torch.dtype) -> None:
        config = model.config
        self.dtype = dtype
        self.heads = config.cross_modal.num_heads
        self.mask_managers = config.mask_padding_in_managers
        self.standardised_eps = config.link.layer_norm_eps if config.has_managers else None

        def converted(name: str) -> list[CrossModalLayer]:
            layers = copy.deepcopy(getattr(model, name)).to(dtype).eval().requires_grad_(False)
            return cast(list[CrossModalLayer], list(layers))

        with torch.no_grad():
            self.text_layers = converted("cross_modal_text_layers")
            self.image_layers = converted("cross_modal_image_layers")
            self.poolers = [
                copy.deepcopy(getattr(model, f"cross_modal_{side}_pooler")).to(dtype).requires_grad_(False)
                for side in ("text", "image")
            ]
            self.text_links = self._arranged(model, "text")
            self.image_links = self._arranged(model, "image")
            self.image_qkv = [_packed(layer.attention) for layer in self.image_layers]

    def _arranged(self, model: TwoTowerModel, modality: Modality) -> list[Link]:
        links = model.links(modality)
        return [arrange(link, self.dtype, i, modality == "image") for i, link in enumerate(links)]

    @torch.no_grad()
    def texts(self, experts_BLND: Tensor, mask_BL: Tensor) -> TextSide:
        """The texts' side.

        Args:
            experts_BLND: Of `TwoTowerModel.text_experts`.
            mask_BL: 1 at tokens, 0 at padding.
        """
        experts = self._read(experts_BLND.to(self.dtype))
        attend = mask_BL.bool()
        entry = self.text_links[0].own(experts)
        return TextSide(
            attend,
            entry,
            self.text_layers[0].attention(entry, entry, attend[:, None, None]),
            _few_keys(self.image_layers[0].crossattention, entry, attend),
            [link.own(experts) for link in self.text_links[1:]],
        )

    @torch.no_grad()
    def image(self, experts_PND: Tensor) -> ImageSide:
        """The image's side, from `TwoTowerModel.image_experts` of one image."""
        experts = self._read(experts_PND.to(self.dtype))
        entry = self.image_links[0].own(experts)
        cross = self.text_layers[0].crossattention.self
        hidden = self.image_layers[0].attention(entry[None], entry[None], None)[0]
        keys, values = self._split(cross.key(entry)[None]), self._split(cross.value(entry)[None])
        return ImageSide(hidden, keys, values, [link.own(experts) for link in self.image_links[1:]])

    @torch.no_grad()
    def __call__(self, image: ImageSide, texts: TextSide) -> Tensor:
        """`cls_feats` `[B, 2D]` of the image with each text."""
        text, picture = self._first_layer(image, texts)
        previous: tuple[list[Tensor], list[Tensor]] = ([], [])
        to_image = texts.attend[:, None] if self.mask_managers else None
        for i in range(1, len(self.text_layers)):
            previous[0].append(self._read(text))
            previous[1].append(self._read(picture))
            text_in = self.text_links[i].mix(texts.own[i - 1], previous[0], previous[1][-1], None)
            image_in = self.image_links[i].mix(image.own[i - 1], previous[1], previous[0][-1], to_image)
            last = i == len(self.text_layers) - 1
            attend = texts.attend[:, None, None]
            text = self.text_layers[i](text_in[:, :1] if last else text_in, image_in, attend, text_in)
            picture = self._image_layer(i, image_in, text_in, attend, last)
        return torch.cat([self.poolers[0](text), self.poolers[1](picture)], dim=-1)

    def _first_layer(self, image: ImageSide, texts: TextSide) -> tuple[Tensor, Tensor]:
        only = len(self.text_layers) == 1
        text_layer, image_layer = self.text_layers[0], self.image_layers[0]
        text = texts.hidden[:, :1] if only else texts.hidden
        cross = text_layer.crossattention
        # All texts' queries meet the same keys: one long sequence of queries.
        query = self._split(cross.self.query(text).flatten(0, 1)[None])
        mixed = F.scaled_dot_product_attention(query, image.keys, image.values)
        mixed = mixed.transpose(1, 2).reshape(text.shape)
        text = _feed_forward(text_layer, _close(cross.output, mixed, text))
        picture = image.hidden[:1] if only else image.hidden
        picture = _to_few(image_layer.crossattention, picture, texts.keys)
        return text, _feed_forward(image_layer, picture)

    def _image_layer(
        self, i: int, image_in: Tensor, text_in: Tensor, attend_B11L: Tensor, last: bool
    ) -> Tensor:
        layer = self.image_layers[i]
        if last:
            return cast(Tensor, layer(image_in[:, :1], text_in, attend_B11L, image_in))
        hidden = self._image_attention(i, image_in)
        return _feed_forward(layer, layer.crossattention(hidden, text_in, attend_B11L))

    def _image_attention(self, i: int, image_BPD: Tensor) -> Tensor:
        """Self-attention of image tokens; links return them with P outside, which linear maps keep as it is."""
        weight, bias = self.image_qkv[i]
        outside = 0 if image_BPD.is_contiguous() else 1
        rows = image_BPD.transpose(0, outside)
        joint = F.linear(rows, weight, bias).transpose(0, outside)
        query, key, value = (self._split(part) for part in joint.chunk(3, dim=-1))
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        output = self.image_layers[i].attention.output
        return _close(output, mixed.transpose(0, outside).contiguous(), rows).transpose(0, outside)

    def _read(self, state: Tensor) -> Tensor:
        """What links read of a state: managers its standardised form, bridges itself."""
        if self.standardised_eps is None:
            return state
        return F.layer_norm(state, state.shape[-1:], eps=self.standardised_eps)

    def _split(self, x_BKD: Tensor) -> Tensor:
        """`[B, H, K, E]`."""
        return x_BKD.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def _packed(block: AttentionBlock) -> tuple[Tensor, Tensor]:
    parts = [block.self.query, block.self.key, block.self.value]
    return torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts])


def _few_keys(block: AttentionBlock, text_BLD: Tensor, attend_BL: Tensor) -> FewKeys:
    """Keys and values of texts for the attention `block` of image tokens to them."""
    readers, shifts, values = block.self.to_few(text_BLD, attend_BL[:, None, None])
    return FewKeys(readers, shifts, by_item(joined(values, block.output.dense.weight), text_BLD.shape[1]))


def _to_few(block: AttentionBlock, hidden_PD: Tensor, keys: FewKeys) -> Tensor:
    """Attention of one image's tokens to all texts: `[B, P, D]`."""
    scores = (hidden_PD @ keys.readers.flatten(0, 1).T).unflatten(1, (len(keys.readers), -1))
    scores = scores.transpose(0, 1) + keys.shifts
    weights = scores.unflatten(-1, (block.self.num_heads, -1)).softmax(dim=-1).flatten(2)
    mixed = torch.baddbmm(block.output.dense.bias, weights, keys.values).add_(hidden_PD)
    return cast(Tensor, block.output.LayerNorm(mixed))


def _close(output: Output, x: Tensor, residual: Tensor) -> Tensor:
    """As `Output.forward` without dropout; the result is contiguous."""
    return cast(Tensor, output.LayerNorm(output.dense(x).add_(residual)))


def _feed_forward(layer: CrossModalLayer, hidden: Tensor) -> Tensor:
    return _close(layer.output, layer.intermediate(hidden), hidden)
