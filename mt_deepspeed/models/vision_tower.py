"""CLIP vision transformer whose top hidden states are returned.

Shapes: B batch, S pixels per side, P tokens (class token, then patches row by row), D width.
"""

from functools import partial

import torch
import torch.nn.functional as F
from open_clip.transformer import Attention, LayerNorm, VisionTransformer
from torch import Tensor, nn

from mt_deepspeed.config.model import VisionTowerConfig
from mt_deepspeed.kernels.attention import attention

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Colour mean and deviation that CLIP's pixels are normalised with (arXiv 2103.00020), for values 0 to 1."""


def normalise(pixels: Tensor) -> Tensor:
    """`[..., 3, S, S]` uint8 -> float32 of about zero mean and unit variance per channel."""
    # Numbers instead of tensors: those would have to be brought to the device first, which waits for it.
    channels = pixels.float().unbind(dim=-3)
    scaled = [(x - 255 * mean) / (255 * std) for x, mean, std in zip(channels, MEAN, STD, strict=True)]
    return torch.stack(scaled, dim=-3)


def resize_positions(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resizes the patch rows of a position table bicubically (align_corners False, no antialias).

    Args:
        table: `[1 + g * g, D]`, class row first.
        grid: Rows and columns of the wanted patch grid.

    Returns:
        `[1 + rows * columns, D]`, dtype of `table`; `table` itself when the grid is the same.
    """
    side = round((table.shape[0] - 1) ** 0.5)
    if side * side != table.shape[0] - 1:
        raise ValueError(f"position embedding: {table.shape[0]} rows are not 1 + a square number")
    if grid == (side, side):
        return table
    # In fp32 as the published code: half-precision bicubic weights would shift the result.
    patches = table[1:].float().T.reshape(1, -1, side, side)
    patches = F.interpolate(patches, size=grid, mode="bicubic", align_corners=False)
    return torch.cat([table[:1], patches.flatten(2)[0].T.to(table.dtype)])


class QuickGELU(nn.Module):
    """`x * sigmoid(1.702 x)`, CLIP's activation, as a scaled SiLU: that keeps two tensors for backward, not three."""

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        return F.silu(1.702 * x) / 1.702


class SelfAttention(nn.Module):
    """open_clip's attention with its parameters, around our own operator.

    Args:
        own: The module whose parameters are taken over.
    """

    def __init__(self, own: Attention) -> None:
        super().__init__()
        self.num_heads = own.num_heads
        self.in_proj_weight, self.in_proj_bias = own.in_proj_weight, own.in_proj_bias
        self.out_proj = own.out_proj

    def forward(self, hidden_BPD: Tensor, attn_mask: None = None) -> Tensor:
        """Same shape; a mask is never given."""
        joint = F.linear(hidden_BPD, self.in_proj_weight, self.in_proj_bias)
        query, key, value = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in joint.chunk(3, dim=-1)
        )
        mixed = attention(query, key, value, None, 0.0, self.training)
        result: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return result


class _Visual(VisionTransformer):
    """open_clip's transformer without the projection, returning all block outputs."""

    def __init__(self, config: VisionTowerConfig) -> None:
        super().__init__(
            image_size=config.image_size,
            patch_size=config.patch_size,
            width=config.width,
            layers=config.num_layers,
            heads=config.num_heads,
            mlp_ratio=config.mlp_ratio,
            output_dim=1,
            act_layer=QuickGELU if config.hidden_act == "quick_gelu" else nn.GELU,
            norm_layer=partial(LayerNorm, eps=config.layer_norm_eps),
            # Same maths and names as the default block, whose attention cannot be replaced and does not call its
            # output projection as a module, which ZeRO-3 needs to gather it in evaluation too.
            block_type="custom",
        )
        for block in self.transformer.resblocks:
            block.attn = SelfAttention(block.attn)
        self.proj = None  # CLIP's projection takes no part in the two-tower model

    def forward(self, pixels: Tensor, num_states: int) -> list[Tensor]:
        patches = self.conv1(pixels)
        grid = (int(patches.shape[2]), int(patches.shape[3]))
        patches = patches.flatten(2).transpose(1, 2)
        first = self.class_embedding.to(patches.dtype).expand(patches.shape[0], 1, -1)
        positions = resize_positions(self.positional_embedding, grid).to(patches.dtype)
        hidden = self.ln_pre(torch.cat([first, patches], dim=1) + positions)
        states = []
        for block in self.transformer.resblocks:
            hidden = block(hidden)
            states.append(hidden)
        return [self.ln_post(state) for state in states[-num_states:]]


class VisionTower(nn.Module):
    """CLIP-ViT: pre-norm blocks, QuickGELU, no dropout; parameter names of the published checkpoints.

    Args:
        config: Sizes.
        num_states: How many top layers' outputs are returned.
    """

    def __init__(self, config: VisionTowerConfig, num_states: int) -> None:
        super().__init__()
        self.num_states = num_states
        self.visual = _Visual(config)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Encodes a batch of images.

        Args:
            pixels: `[B, 3, S, S]`, uint8 as decoded, or float and normalised. Another size than the
                configured one (also not square) is taken with position embeddings resized on the fly.

        Returns:
            `num_states` tensors `[B, P, D]` after the shared `ln_post`, lowest layer first.
        """
        if pixels.dtype == torch.uint8:  # a quarter of the bytes to carry here
            pixels = normalise(pixels)
        states: list[Tensor] = self.visual(pixels, self.num_states)
        return states
