"""Architecture of a two-tower model: sizes of the towers, of the cross-modal encoder and what joins them.

Defaults are ManagerTower base (ACL 2023, arXiv 2306.00103) at 288 px.
"""

from dataclasses import dataclass, field
from typing import Literal

MANAGERS = ("saue", "aaue", "sae", "aaue_own_query")
BRIDGES = ("bridge_add", "bridge_scaled_add", "bridge_interpolate")


@dataclass(frozen=True, kw_only=True)
class TextTowerConfig:
    """RoBERTa encoder (post-norm)."""

    pretrained: str | None = None
    """Folder or hub name of a Hugging Face RoBERTa to start from; None: random weights."""
    vocab_size: int = 50265
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    intermediate_size: int = 3072
    max_positions: int = 514
    """Rows of the position table; two of them (0 and the padding row) never hold a text position."""
    type_vocab_size: int = 1
    pad_token_id: int = 1
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    dropout: float = 0.1
    """Hidden and attention dropout."""


@dataclass(frozen=True, kw_only=True)
class VisionTowerConfig:
    """CLIP ViT encoder (pre-norm, `ln_pre`, shared `ln_post`)."""

    pretrained: str | None = None
    """open_clip `MODEL:TAG` or a weight file to start from; None: random weights."""
    image_size: int = 288
    """Pixels per side; a multiple of `patch_size`."""
    patch_size: int = 16
    width: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    hidden_act: Literal["quick_gelu", "gelu"] = "quick_gelu"
    layer_norm_eps: float = 1e-5


@dataclass(frozen=True, kw_only=True)
class CrossModalConfig:
    """Co-attention encoder: `num_layers` layers per modality."""

    hidden_size: int = 768
    num_layers: int = 6
    num_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    dropout: float = 0.1
    """Hidden and attention dropout."""
    num_token_types: int = 2
    """Rows of the modality table: text, image (and second image)."""


@dataclass(frozen=True, kw_only=True)
class LinkConfig:
    """What carries uni-modal layers into the cross-modal layers: managers or bridges."""

    kind: Literal[
        "saue", "aaue", "sae", "aaue_own_query", "bridge_add", "bridge_scaled_add", "bridge_interpolate"
    ] = "aaue"
    num_text_experts: int = 6
    """Top uni-modal text layers a manager aggregates (bridges always take one per cross-modal layer)."""
    num_image_experts: int = 6
    weight: Literal["vector", "scalar"] = "vector"
    """Mixing weights per channel or one for all channels."""
    temperature: float = 1.0
    """Initial softmax temperature of every manager."""
    learnable_temperature: bool = True
    learnable_weight: bool = True
    layer_norm_eps: float = 1e-5
    noise: bool = True
    """Training only: N(0, 1/N^2) on every mixing logit, per element."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    text: TextTowerConfig = field(default_factory=TextTowerConfig)
    vision: VisionTowerConfig = field(default_factory=VisionTowerConfig)
    cross_modal: CrossModalConfig = field(default_factory=CrossModalConfig)
    link: LinkConfig = field(default_factory=LinkConfig)
    mask_padding_in_managers: bool = True
    """True: adaptive managers ignore padded text (results do not depend on the padding).
    False: as the published code, whose weights expect texts padded to a fixed length."""
