"""ManagerTower's pre-training step in plain PyTorch, as the published code computes it.

Each objective is a complete pass of its own; managers stack the experts `[B, N, L, D]`, normalise them one by one and
draw a noise tensor of the same size; attention is written out; the vocabulary head runs on every position. It uses
the parameters of a `PretrainTask`, so that both must give the same losses. Shapes as in `mt_deepspeed`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mt_deepspeed.models.vision_tower import normalise
from mt_deepspeed.tasks.pretrain import PretrainTask

MASKED = -10000.0


def pad_texts(batch: dict[str, Tensor], length: int, pad_id: int) -> dict[str, Tensor]:
    """The batch with every text padded to `length` tokens, as the published loader does it."""
    missing = length - batch["text_mask"].shape[1]
    fill = {"text_ids": pad_id, "mlm_ids": pad_id, "text_mask": 0, "mlm_labels": -100}
    return {**batch, **{key: F.pad(batch[key], (0, missing), value=value) for key, value in fill.items()}}


class PlainPretraining(nn.Module):
    """The losses of a `PretrainTask`, which it wraps, the published way."""

    def __init__(self, task: PretrainTask) -> None:
        super().__init__()
        self.task = task

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`mlm` and `itm`."""
        task, mask, pixels = self.task, batch["text_mask"], batch["pixels"]
        text_feats, _ = self._fuse(batch["mlm_ids"], mask, pixels[: len(mask)])
        logits = task.mlm_score(text_feats)
        mlm = F.cross_entropy(logits.flatten(0, 1).float(), batch["mlm_labels"].flatten(), ignore_index=-100)
        _, cls_feats = self._fuse(batch["text_ids"], mask, pixels[batch["itm_image_index"]])
        itm = F.cross_entropy(task.itm_score(cls_feats).float(), batch["itm_labels"])
        return {"mlm": mlm, "itm": itm}

    def _fuse(self, ids: Tensor, mask: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """One complete joint pass: text features `[B, L, D]` and class features `[B, 2D]`."""
        model: Any = self.task.model
        away = (1.0 - mask.float())[:, None, None, :] * MASKED
        texts = torch.stack(model.text_experts(self._text(ids, away)), dim=1)
        images = torch.stack(model.image_experts(self._vision(pixels)), dim=1)
        return fuse_stacks(model, texts, images, mask)

    def _text(self, ids: Tensor, away: Tensor) -> list[Tensor]:
        tower: Any = self.task.model.text_transformer
        hidden, states = tower.embeddings(input_ids=ids), []
        for layer in tower.encoder.layer:
            own = layer.attention.self
            mixed = _attend(own.query(hidden), own.key(hidden), own.value(hidden), away, own, own.dropout.p)
            hidden = layer.feed_forward_chunk(layer.attention.output(mixed, hidden))
            states.append(hidden)
        return states[-tower.num_states :]

    def _vision(self, pixels: Tensor) -> list[Tensor]:
        tower: Any = self.task.model.vit_model
        visual = tower.visual
        patches = visual.conv1(normalise(pixels) if pixels.dtype == torch.uint8 else pixels)
        patches = patches.flatten(2).transpose(1, 2)
        first = visual.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
        hidden = visual.ln_pre(torch.cat([first, patches], dim=1) + visual.positional_embedding)
        states = []
        for block in visual.transformer.resblocks:
            own, x = block.attn, block.ln_1(hidden)
            query, key, value = F.linear(x, own.in_proj_weight, own.in_proj_bias).chunk(3, dim=-1)
            hidden = hidden + own.out_proj(_attend(query, key, value, None, own, 0.0))
            hidden = hidden + block.mlp(block.ln_2(hidden))
            states.append(hidden)
        return [visual.ln_post(state) for state in states[-tower.num_states :]]


def fuse_stacks(model: Any, texts: Tensor, images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Managers and cross-modal layers: text features `[B, L, D]` and class features `[B, 2D]`.

    Args:
        model: A `TwoTowerModel` with managers of kind `aaue`.
        texts: Projected layers with their embeddings, `[B, N, L, D]`.
        images: As `texts`, `[B, N, P, D]`.
        mask: `[B, L]`, 1 at tokens, 0 at padding.
    """
    away = (1.0 - mask.float())[:, None, None, :] * MASKED
    # The published managers attend to padding; ours may leave it out, which is the same maths with a mask.
    seen = away[:, 0] if model.config.mask_padding_in_managers else None
    noisy = model.training and model.config.link.noise
    text, image = None, None
    stages = zip(
        model.links("text"),
        model.links("image"),
        model.cross_modal_text_layers,
        model.cross_modal_image_layers,
        strict=True,
    )
    for text_link, image_link, text_layer, image_layer in stages:
        text_in = _manage(text_link, texts, text, image, None, noisy)
        image_in = _manage(image_link, images, image, text, seen, noisy)
        text = _cross_modal(text_layer, text_in, image_in, away, None)
        image = _cross_modal(image_layer, image_in, text_in, None, away)
    assert text is not None
    poolers = model.cross_modal_text_pooler, model.cross_modal_image_pooler
    return text, torch.cat([poolers[0](text), poolers[1](image)], dim=-1)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, away: Tensor | None, own: Any, dropout: float
) -> Tensor:
    """Multi-head attention with all scores in memory; `own` tells the heads and whether it is trained."""
    heads = getattr(own, "num_heads", None) or own.num_attention_heads
    query, key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    if away is not None:
        scores = scores + away
    attention = F.dropout(scores.softmax(dim=-1), dropout, own.training)
    return (attention @ value).transpose(1, 2).flatten(2)


def _cross_modal(
    layer: Any, hidden: Tensor, other: Tensor, away: Tensor | None, other_away: Tensor | None
) -> Tensor:
    for block, context, mask in (
        (layer.attention, None, away),
        (layer.crossattention, other, other_away),
    ):
        own, context = block.self, hidden if context is None else context
        mixed = _attend(own.query(hidden), own.key(context), own.value(context), mask, own, own.dropout)
        hidden = _close(block.output, mixed, hidden)
    return _close(layer.output, layer.intermediate(hidden), hidden)


def _close(output: Any, x: Tensor, residual: Tensor) -> Tensor:
    """`Output` with torch's dropout."""
    x = F.dropout(output.dense(x), output.dropout, output.training)
    normed: Tensor = output.LayerNorm(residual + x)
    return normed


def _manage(
    link: Any,
    experts: Tensor,
    previous: Tensor | None,
    other: Tensor | None,
    other_away: Tensor | None,
    noisy: bool,
) -> Tensor:
    """SAUE at the first layer, AAUE with fused query at the others, on a stack `[B, N, L, D]`."""
    batch, count, length, size = experts.shape
    weights, biases = link.affine()
    normed = torch.stack(
        [F.layer_norm(experts[:, i], (size,), weights[i], biases[i], link.eps) for i in range(count)], dim=1
    )
    if previous is None:
        scores = link.layer_scores[:, :count].expand(batch, count, length, size)
    else:
        own = F.layer_norm(previous, (size,), weights[-1], biases[-1], link.eps)
        fusion, keys = link.fusion_attention, link.extra_query_LayerNorm(other)
        attention = fusion.q_proj(own) @ fusion.k_proj(keys).transpose(1, 2) / size**0.5
        if other_away is not None:
            attention = attention + other_away
        attended = attention.softmax(dim=-1) @ keys
        query = torch.cat([attended, own.to(attended.dtype)], dim=-1)
        scores = link.linear_controller(query).transpose(1, 2)[..., None].expand(batch, count, length, size)
    if noisy:
        scores = scores + torch.randn(scores.shape, device=scores.device) / count
    mixed = ((scores / link.softmax_temperature).softmax(dim=1) * normed).sum(dim=1)
    return mixed if previous is None else mixed + link.layer_scores_cross[0, :, 0] * own
