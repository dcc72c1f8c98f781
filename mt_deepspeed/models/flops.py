"""Floating-point operations of a forward pass, counted on the real model without running it."""

from functools import lru_cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from mt_deepspeed.config.model import HeadsConfig, ModelConfig
from mt_deepspeed.models.heads import MLMHead
from mt_deepspeed.models.two_tower import TwoTowerModel


def forward_flops(
    config: ModelConfig,
    text_tokens: int,
    pairs: float,
    images: float,
    masked_tokens: float,
    texts: float | None = None,
) -> float:
    """Operations per sample (a multiply-add counts as two): matrix products, convolution and attention.

    Args:
        config: The model.
        text_tokens: Length of each text.
        pairs: Pairs fused per sample.
        images: Images encoded per sample.
        masked_tokens: Positions that reach the vocabulary head per sample.
        texts: Texts encoded per sample; None: one for each pair.
    """
    texts = pairs if texts is None else texts
    text, image, fusion, head = _parts(config, text_tokens)
    return texts * text + pairs * fusion + images * image + masked_tokens * head


@lru_cache(maxsize=64)
def _parts(config: ModelConfig, text_tokens: int) -> tuple[float, float, float, float]:
    """Operations of one text, one image, one fused pair and one masked token."""
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
        with FlopCounterMode(display=False) as fusion_count:
            model.fuse_experts(text_experts, image_experts, mask)
        with FlopCounterMode(display=False) as head_count:
            head(feats)
    text, image, fusion, masked = (
        counter.get_total_flops() / rows for counter in (text_count, image_count, fusion_count, head_count)
    )
    return text, image, fusion, masked
