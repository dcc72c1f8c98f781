"""One tower of a two-tower model alone, under the parameter names it has there."""

from torch import Tensor, nn

from mt_deepspeed.config.model import ModelConfig
from mt_deepspeed.models.text_tower import TextTower
from mt_deepspeed.models.vision_tower import VisionTower


class VisionOnly(nn.Module):
    """The vision tower; see `TwoTowerModel.encode_image`, here of the last layer only."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.vit_model = VisionTower(config.vision, num_states=1)

    def encode_image(self, pixels: Tensor) -> list[Tensor]:
        """`pixels [B, 3, S, S]` -> one tensor `[B, P, width]`, the last layer after `ln_post`."""
        states: list[Tensor] = self.vit_model(pixels)
        return states

    def checkpointable_layers(self) -> list[nn.Module]:
        """Layers that activation checkpointing may wrap."""
        return [*self.vit_model.visual.transformer.resblocks]


class TextOnly(nn.Module):
    """The text tower; see `TwoTowerModel.encode_text`, here of the last layer only."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.text_transformer = TextTower(config.text, 1, config.init_std)

    def encode_text(self, ids_BL: Tensor, mask_BL: Tensor) -> list[Tensor]:
        """`ids_BL`, `mask_BL` -> one tensor `[B, L, hidden_size]`, the last layer."""
        states: list[Tensor] = self.text_transformer(ids_BL, mask_BL)
        return states

    def checkpointable_layers(self) -> list[nn.Module]:
        """Layers that activation checkpointing may wrap."""
        return [*self.text_transformer.encoder.layer]
