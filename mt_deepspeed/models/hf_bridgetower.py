"""Configurations of Hugging Face transformers' BridgeTower: read and written.

Its classes `BridgeTowerForMaskedLM`, `BridgeTowerForImageAndTextRetrieval` and `BridgeTowerForContrastiveLearning`
differ by their heads. It has no ManagerTower.
"""

from typing import Any

from mt_deepspeed.config.model import (
    CrossModalConfig,
    HeadsConfig,
    LinkConfig,
    ModelConfig,
    TextTowerConfig,
    VisionTowerConfig,
)
from mt_deepspeed.models.foreign_configs import ForeignSetup, Options, cut_vision, one_of

LINKS = {"add": "bridge_add", "scaled_add": "bridge_scaled_add", "interpolate": "bridge_interpolate"}


def from_hf_bridgetower(config: Options, architecture: str) -> ForeignSetup:
    """Reads a Hugging Face BridgeTower configuration.

    Args:
        config: `config.json`, values that are absent take the library's defaults.
        architecture: Class name, e.g. `BridgeTowerForMaskedLM`; it decides the heads.

    Raises:
        ValueError: An option that is not supported.
    """
    text, vision = config.get("text_config") or {}, config.get("vision_config") or {}
    eps, size = config.get("layer_norm_eps", 1e-5), config.get("hidden_size", 768)
    if text.get("hidden_act", "gelu") != config.get("hidden_act", "gelu"):
        raise ValueError("text_config.hidden_act and hidden_act differ: the model here has one for both")
    if config.get("tie_word_embeddings", False):
        raise ValueError("tie_word_embeddings: found true, expected false (a decoder of its own)")
    tower = _hf_text(text)
    if tower.hidden_size != size:
        raise ValueError(f"hidden_size {size}: the library's model needs text_config.hidden_size equal to it")
    image_tower, unused = cut_vision(_hf_vision(vision), tower.num_layers)
    model = ModelConfig(
        text=tower,
        vision=image_tower,
        cross_modal=CrossModalConfig(
            hidden_size=size,
            num_layers=config.get("num_hidden_layers", 6),
            num_heads=tower.num_heads,  # the library builds its cross-modal layers from text_config
            intermediate_size=tower.intermediate_size,
            hidden_act=tower.hidden_act,
            layer_norm_eps=tower.layer_norm_eps,
            dropout=tower.dropout,
            shared_transform=config.get("share_cross_modal_transformer_layers", True),
        ),
        link=LinkConfig(
            kind=one_of({"link_tower_type": "add", **config}, "link_tower_type", LINKS),
            layer_norm_eps=eps,
            shared=config.get("share_link_tower_layers", False),
        ),
    )
    contrastive = architecture == "BridgeTowerForContrastiveLearning"
    heads = HeadsConfig(
        mlm=architecture == "BridgeTowerForMaskedLM",
        mlm_layer_norm_eps=eps,
        mlm_hidden_act=config.get("hidden_act", "gelu"),
        itm=architecture == "BridgeTowerForImageAndTextRetrieval",
        fused_itc_size=config.get("contrastive_hidden_size", 512) if contrastive else None,
    )
    return ForeignSetup(model, heads, unused)


def to_hf_bridgetower(model: ModelConfig, mlm_layer_norm_eps: float | None) -> dict[str, Any]:
    """Writes a BridgeTower configuration; weights go by the same names whatever the heads.

    The library has one epsilon for text tower and cross-modal layers, and one for bridges and vocabulary head,
    where the published code has 1e-5 and 1e-12 of each. The text tower's, and the vocabulary head's where there is
    one, are written: their features have the smallest variances, so that the rest moves the result least.

    Args:
        model: The model.
        mlm_layer_norm_eps: Epsilon of the vocabulary head; None: there is no such head.

    Raises:
        ValueError: ManagerTower, or sizes that the library's model cannot have; names each.
    """
    text, vision, cross, link = model.text, model.vision, model.cross_modal, model.link
    if model.has_managers:
        raise ValueError(
            f"transformers has no ManagerTower (model.link.kind {link.kind}), only BridgeTower; export it without "
            "--format and use mt_deepspeed.ManagerTower.from_pretrained"
        )
    fixed = {
        "model.vision.num_heads": (vision.num_heads, vision.width // 64),
        "model.vision.mlp_ratio": (vision.mlp_ratio, 4),
        "model.vision.hidden_act": (vision.hidden_act, "quick_gelu"),
        "model.vision.num_layers": (vision.num_layers, text.num_layers),
        "model.text.hidden_size": (text.hidden_size, cross.hidden_size),
        "model.cross_modal.num_heads": (cross.num_heads, text.num_heads),
        "model.cross_modal.intermediate_size": (cross.intermediate_size, text.intermediate_size),
        "model.cross_modal.hidden_act": (cross.hidden_act, text.hidden_act),
        "model.link.shared": (link.shared, False),  # the library cannot run it
        "model.cross_modal.num_token_types": (cross.num_token_types, 2),
    }
    wrong = [
        f"{key} is {value}, must be {wanted}" for key, (value, wanted) in fixed.items() if value != wanted
    ]
    if wrong:
        raise ValueError(f"transformers' BridgeTower cannot be of these sizes: {'; '.join(wrong)}")
    return {
        "model_type": "bridgetower",
        # With the default the library (5.x) makes the image stream's self-attention causal.
        "attn_implementation": "eager",
        "hidden_size": cross.hidden_size,
        "num_hidden_layers": cross.num_layers,
        "num_attention_heads": cross.num_heads,
        "hidden_act": cross.hidden_act,
        "layer_norm_eps": link.layer_norm_eps if mlm_layer_norm_eps is None else mlm_layer_norm_eps,
        "share_cross_modal_transformer_layers": cross.shared_transform,
        "share_link_tower_layers": False,
        "link_tower_type": next(name for name, kind in LINKS.items() if kind == link.kind),
        "tie_word_embeddings": False,
        "text_config": {
            "vocab_size": text.vocab_size,
            "hidden_size": text.hidden_size,
            "num_hidden_layers": text.num_layers,
            "num_attention_heads": text.num_heads,
            "intermediate_size": text.intermediate_size,
            "hidden_act": text.hidden_act,
            "hidden_dropout_prob": text.dropout,
            "attention_probs_dropout_prob": text.dropout,
            "max_position_embeddings": text.max_positions,
            "type_vocab_size": text.type_vocab_size,
            "pad_token_id": text.pad_token_id,
            "layer_norm_eps": text.layer_norm_eps,
        },
        "vision_config": {
            "hidden_size": vision.width,
            "num_hidden_layers": vision.num_layers,
            "patch_size": vision.patch_size,
            "image_size": vision.image_size,
            "layer_norm_eps": vision.layer_norm_eps,
        },
    }


def _hf_text(text: Options) -> TextTowerConfig:
    hidden, attention = text.get("hidden_dropout_prob", 0.1), text.get("attention_probs_dropout_prob", 0.1)
    if hidden != attention:
        raise ValueError(f"text_config: hidden and attention dropout differ ({hidden}, {attention})")
    return TextTowerConfig(
        vocab_size=text.get("vocab_size", 50265),
        hidden_size=text.get("hidden_size", 768),
        num_layers=text.get("num_hidden_layers", 12),
        num_heads=text.get("num_attention_heads", 12),
        intermediate_size=text.get("intermediate_size", 3072),
        max_positions=text.get("max_position_embeddings", 514),
        type_vocab_size=text.get("type_vocab_size", 1),
        pad_token_id=text.get("pad_token_id", 1),
        hidden_act=text.get("hidden_act", "gelu"),
        layer_norm_eps=text.get("layer_norm_eps", 1e-5),
        dropout=hidden,
    )


def _hf_vision(vision: Options) -> VisionTowerConfig:
    width = vision.get("hidden_size", 768)
    return VisionTowerConfig(
        image_size=vision.get("image_size", 288),
        patch_size=vision.get("patch_size", 16),
        width=width,
        num_layers=vision.get("num_hidden_layers", 12) - bool(vision.get("remove_last_layer", False)),
        num_heads=width // 64,
        layer_norm_eps=vision.get("layer_norm_eps", 1e-5),
    )
