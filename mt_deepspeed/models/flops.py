"""Floating-point operations of a forward pass, counted on the real model without running it."""

from functools import lru_cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from mt_deepspeed.config.model import HeadsConfig, ModelConfig
from mt_deepspeed.models.heads import MLMHead
from mt_deepspeed.models.single_tower import TextOnly, VisionOnly
from mt_deepspeed.models.two_tower import TwoTowerModel


def forward_flops(
    config: ModelConfig,
    text_tokens: int,
    pairs: float,
    images: float,
    masked_tokens: float,
    texts: float | None = None,
    pooled: float | None = None,
) -> float:
    """Operations per sample (a multiply-add counts as two): matrix products, convolution and attention.

    Args:
        config: The model.
        text_tokens: Length of each text.
        pairs: Pairs fused per sample.
        images: Images encoded per sample.
        masked_tokens: Positions that reach the vocabulary head per sample.
        texts: Texts encoded per sample; None: one for each pair.
        pooled: Pairs of which only class features are wanted (`TwoTowerModel.fuse`), the others giving none; None:
            all tokens of all pairs.
    """
    texts = pairs if texts is None else texts
    text, image, whole, unpooled, class_token, head = _parts(config, text_tokens)
    fusion = pairs * whole if pooled is None else pairs * unpooled + pooled * class_token
    return texts * text + fusion + images * image + masked_tokens * head


@lru_cache(maxsize=64)
def _parts(config: ModelConfig, text_tokens: int) -> tuple[float, ...]:
    """Operations of one text, one image, one pair (all; without class features; these alone), one masked token."""
    rows = 2
    with torch.device("meta"):
        model = TwoTowerModel(config).eval()
        size = config.cross_modal.hidden_size
        heads = HeadsConfig()
        head = MLMHead(size, config.text.vocab_size, heads.mlm_hidden_act, heads.mlm_layer_norm_eps)
        ids = torch.zeros(rows, text_tokens, dtype=torch.long)
        mask = torch.ones(rows, text_tokens, dtype=torch.long)
        side = config.vision.image_size
        pixels = torch.zeros(rows, 3, side, side)
        feats = torch.zeros(rows, size)
    with torch.no_grad():
        with FlopCounterMode(display=False) as text_count:
            text_experts = model.text_experts(model.encode_text(ids, mask))
        with FlopCounterMode(display=False) as image_count:
            image_experts = model.image_experts(model.encode_image(pixels))
        fusion_counts = []
        for pooled_from in (None, rows, 0):
            with FlopCounterMode(display=False) as fusion_count:
                model.fuse_experts(text_experts, image_experts, mask, pooled_from=pooled_from)
            fusion_counts.append(fusion_count.get_total_flops() / rows)
        with FlopCounterMode(display=False) as head_count:
            head(feats)
    whole, unpooled, pooled = fusion_counts
    text, image, masked = (
        counter.get_total_flops() / rows for counter in (text_count, image_count, head_count)
    )
    return text, image, whole, unpooled, pooled - unpooled, masked


@lru_cache(maxsize=64)
def vision_flops(config: ModelConfig) -> float:
    """Operations of one picture in the vision tower alone."""
    side = config.vision.image_size
    with torch.device("meta"):
        model, pixels = VisionOnly(config).eval(), torch.zeros(1, 3, side, side)
    with torch.no_grad(), FlopCounterMode(display=False) as count:
        model.encode_image(pixels)
    return count.get_total_flops()


@lru_cache(maxsize=64)
def text_flops(config: ModelConfig, text_tokens: int) -> float:
    """Operations of one text in the text tower alone."""
    with torch.device("meta"):
        model, ids = TextOnly(config).eval(), torch.zeros(1, text_tokens, dtype=torch.long)
    with torch.no_grad(), FlopCounterMode(display=False) as count:
        model.encode_text(ids, torch.ones_like(ids))
    return count.get_total_flops()
