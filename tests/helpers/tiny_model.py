"""A two-tower model of a few thousand parameters, and a batch for it."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mt_deepspeed.config.model import (
    CrossModalConfig,
    LinkConfig,
    ModelConfig,
    TextTowerConfig,
    VisionTowerConfig,
)

KINDS = ("saue", "aaue", "sae", "aaue_own_query", "bridge_add", "bridge_scaled_add", "bridge_interpolate")


def tiny_config(kind: Any = "aaue", dropout: float = 0.0, **link: Any) -> ModelConfig:
    """Towers of different width and depth, three cross-modal layers, unequal numbers of experts."""
    return ModelConfig(
        text=TextTowerConfig(
            vocab_size=41,
            hidden_size=16,
            num_layers=4,
            num_heads=2,
            intermediate_size=24,
            max_positions=20,
            dropout=dropout,
        ),
        vision=VisionTowerConfig(image_size=16, patch_size=8, width=24, num_layers=5, num_heads=3),
        cross_modal=CrossModalConfig(
            hidden_size=32, num_layers=3, num_heads=4, intermediate_size=40, dropout=dropout
        ),
        link=LinkConfig(kind=kind, num_text_experts=3, num_image_experts=4, **link),
        init_std=0.1,
    )


def with_link(config: ModelConfig, **changes: Any) -> ModelConfig:
    return replace(config, link=replace(config.link, **changes))


def tiny_batch(config: ModelConfig, lengths: tuple[int, ...] = (9, 6, 4), seed: int = 0) -> dict[str, Tensor]:
    """`text_ids`, `text_mask` `[B, longest]` and `pixels`."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths))
    mask = (torch.arange(shape[1]) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(3, config.text.vocab_size, shape, generator=generator)
    side = config.vision.image_size
    pixels = torch.randn(len(lengths), 3, side, side, generator=generator)
    return {"text_ids": torch.where(mask.bool(), ids, 1), "text_mask": mask, "pixels": pixels}
