"""Architecture of a two-tower model: sizes of the towers, of the cross-modal encoder and what joins them.

Defaults are ManagerTower base (ACL 2023, arXiv 2306.00103) at 288 px.
"""

from dataclasses import dataclass, field
from typing import Literal

MANAGERS = ("saue", "aaue", "sae", "aaue_own_query")


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
    """Rows of the position table; `pad_token_id + 1` of them never hold a text position."""
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
    shared_transform: bool = True
    """One linear map per modality from tower to cross-modal width; False: one per joined layer
    (bridges only)."""


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
    expert_gain: float = 1.0
    """Initial gain of the experts' layer norms in all managers but the first. Below 1 the previous cross-modal state
    outweighs the experts at first, as it does in bridges, which lets narrow models learn sooner."""
    shared: bool = False
    """Bridges only: one bridge per modality for all cross-modal layers after the first."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A two-tower model without heads. Raises ValueError where sizes do not fit together."""

    text: TextTowerConfig = field(default_factory=TextTowerConfig)
    vision: VisionTowerConfig = field(default_factory=VisionTowerConfig)
    cross_modal: CrossModalConfig = field(default_factory=CrossModalConfig)
    link: LinkConfig = field(default_factory=LinkConfig)
    init_std: float = 0.02
    """Standard deviation of new linear and embedding weights. 0.02 suits widths near 768; narrow models
    learn far sooner with about 1 / sqrt(width). CLIP's own initialisation depends on the width already."""
    mask_padding_in_managers: bool = True
    """True: adaptive managers ignore padded text (results do not depend on the padding).
    False: as the published code, whose weights expect texts padded to a fixed length."""

    def __post_init__(self) -> None:
        _check_model(self)

    @property
    def has_managers(self) -> bool:
        """True for managers, False for bridges."""
        return self.link.kind in MANAGERS

    @property
    def managers_read_padding(self) -> bool:
        """Whether the model's results depend on how far texts are padded."""
        return self.link.kind == "aaue" and not self.mask_padding_in_managers

    @property
    def num_text_states(self) -> int:
        """Number of top text layers that the cross-modal side receives."""
        return self.link.num_text_experts if self.has_managers else self.cross_modal.num_layers

    @property
    def num_image_states(self) -> int:
        """Number of top vision layers that the cross-modal side receives."""
        return self.link.num_image_experts if self.has_managers else self.cross_modal.num_layers


@dataclass(frozen=True, kw_only=True)
class HeadsConfig:
    """Which heads stand on a two-tower model. Names in state dicts are those of the published checkpoints."""

    mlm: bool = False
    mlm_layer_norm_eps: float = 1e-12
    mlm_hidden_act: str = "gelu"
    itm: bool = False
    itc_size: int | None = None
    """Width of the contrastive embeddings; None: no contrastive heads."""
    itc_temperature: float = 0.07
    """Initial contrastive temperature."""
    fused_itc_size: int | None = None
    """Width of the three contrastive embeddings of the Hugging Face port (text, image, fused); None: none."""
    rank: bool = False
    """Score of a pair for retrieval with sampled false texts."""
    vqa_answers: int | None = None
    """Size of the answer vocabulary; None: no VQA head."""
    nlvr2: bool = False
    snli_ve: bool = False
    classifier_layers: Literal[1, 2] = 2
    """Depth of the VQA, NLVR2 and SNLI-VE heads."""
    classifier_scale: float = 1.0
    """Hidden width of two-layer heads, relative to `cls_feats`."""


def _check_model(config: ModelConfig) -> None:
    text, vision, cross, link = config.text, config.vision, config.cross_modal, config.link
    if vision.image_size % vision.patch_size:
        raise ValueError(
            f"model.vision.image_size: {vision.image_size} is not a multiple of patch_size "
            f"{vision.patch_size}; use {vision.image_size // vision.patch_size * vision.patch_size}"
        )
    for where, width, heads in (
        ("text.hidden_size", text.hidden_size, text.num_heads),
        ("vision.width", vision.width, vision.num_heads),
        ("cross_modal.hidden_size", cross.hidden_size, cross.num_heads),
    ):
        if width % heads:
            raise ValueError(f"model.{where}: {width} is not a multiple of its num_heads {heads}")
    if cross.num_layers < 1:
        raise ValueError(f"model.cross_modal.num_layers: found {cross.num_layers}, expected at least 1")
    for where, wanted, layers in (
        ("text", config.num_text_states, text.num_layers),
        ("vision", config.num_image_states, vision.num_layers),
    ):
        if not 1 <= wanted <= layers:
            raise ValueError(
                f"model.link: kind {link.kind} takes the top {wanted} layers of the {where} tower, which has "
                f"{layers}; change model.{where}.num_layers, the experts or cross_modal.num_layers"
            )
    if config.has_managers and not (cross.shared_transform and not link.shared):
        raise ValueError(f"model: shared_transform=false and link.shared=true need bridges, not {link.kind}")
