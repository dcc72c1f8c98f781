"""Model configurations of published checkpoints: the reference code's options."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mt_deepspeed.config.model import (
    CrossModalConfig,
    HeadsConfig,
    LinkConfig,
    ModelConfig,
    TextTowerConfig,
    VisionTowerConfig,
)
from mt_deepspeed.models.weight_sources import read_torch_file

Options = Mapping[str, Any]

# Encoders that the reference code names without giving their sizes.
_VISION = {
    "CLIP-ViT-B/32": {"width": 768, "layers": 12, "heads": 12},
    "CLIP-ViT-B/16": {"width": 768, "layers": 12, "heads": 12},
    "CLIP-ViT-L/14": {"width": 1024, "layers": 24, "heads": 16},
}
_TEXT = {
    "roberta-base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "roberta-large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
}


@dataclass(frozen=True)
class ForeignSetup:
    """What a foreign configuration means here."""

    model: ModelConfig
    heads: HeadsConfig
    unused: tuple[str, ...] = ()
    """Shell patterns (plain names) of tensors that the configured model holds and never reads; pass them to
    `import_checkpoint(allow_unexpected=...)`."""


def published_options(path: Path) -> dict[str, Any]:
    """The options that a published ManagerTower / BridgeTower `.ckpt` carries; see `from_reference`.

    Raises:
        ValueError: Not such a file.
    """
    content = read_torch_file(path)
    hyper = content.get("hyper_parameters") if isinstance(content, dict) else None
    options = hyper.get("config") if isinstance(hyper, dict) else None
    if not isinstance(options, dict):
        raise ValueError(f"{path}: found no hyper_parameters['config'], expected a published checkpoint")
    return options


def from_reference(options: Options, sizes: Options | None = None) -> ForeignSetup:
    """Reads the options of the published ManagerTower / BridgeTower code.

    Args:
        options: The run configuration, `hyper_parameters["config"]` in a published `.ckpt`.
        sizes: Encoder sizes beside the options, where the encoders are not the named ones: mappings
            `text_encoder`, `vision_encoder`, `cross_modal`, `managers` or `bridges`, all optional.

    Raises:
        ValueError: An option that is not supported.
    """
    sizes = sizes or {}
    is_manager = one_of(options, "model_type", {"MT": True, "BT": False})
    text, vision = _reference_text(options, sizes), _reference_vision(options, sizes)
    unused: tuple[str, ...] = ()
    if not is_manager:
        # The reference advances both towers together, as many layers as the text tower has.
        vision, unused = cut_vision(vision, text.num_layers)
    cross = _reference_cross_modal(options, sizes)
    link_sizes = sizes.get("managers" if is_manager else "bridges", {})
    model = ModelConfig(
        text=text,
        vision=vision,
        cross_modal=cross,
        link=_reference_link(options, link_sizes, is_manager),
        mask_padding_in_managers=False,
    )
    heads = _reference_heads(options, cross)
    if heads.rank and not heads.itm:
        unused += ("itm_score.*",)  # the ranking head starts as a copy of its second row
    return ForeignSetup(model, heads, unused)


def one_of(options: Options, key: str, known: Mapping[str, Any]) -> Any:
    """What the value of an option means here.

    Raises:
        ValueError: It is none of the known ones.
    """
    value: Any = options.get(key)
    if value not in known:
        raise ValueError(f"{key}: found {value!r}, expected one of {', '.join(known)}")
    return known[value]


def cut_vision(vision: VisionTowerConfig, depth: int) -> tuple[VisionTowerConfig, tuple[str, ...]]:
    """A vision tower of `depth` layers, and patterns of the layers that are cut off; bridges advance both alike.

    Raises:
        ValueError: It has fewer.
    """
    if vision.num_layers < depth:
        raise ValueError(
            f"bridges: the vision tower has {vision.num_layers} layers, "
            f"expected at least the text tower's {depth}"
        )
    extra = tuple(
        f"vit_model.visual.transformer.resblocks.{layer}.*" for layer in range(depth, vision.num_layers)
    )
    return replace(vision, num_layers=depth), extra


def _reference_text(options: Options, sizes: Options) -> TextTowerConfig:
    text: Options = sizes.get("text_encoder") or one_of(options, "tokenizer", _TEXT)
    if text.get("type", "roberta") != "roberta":
        raise ValueError(f"text_encoder.type: found {text['type']!r}, expected 'roberta'")
    width = text["hidden_size"]
    return TextTowerConfig(
        vocab_size=text.get("vocab_size", options["vocab_size"]),
        hidden_size=width,
        num_layers=text["num_hidden_layers"],
        num_heads=text["num_attention_heads"],
        intermediate_size=text.get("intermediate_size", 4 * width),
        max_positions=text.get("max_position_embeddings", 514),
        type_vocab_size=text.get("type_vocab_size", 1),
        pad_token_id=text.get("pad_token_id", 1),
        hidden_act=text.get("hidden_act", "gelu"),
        layer_norm_eps=text.get("layer_norm_eps", 1e-5),
    )


def _reference_vision(options: Options, sizes: Options) -> VisionTowerConfig:
    vision = sizes.get("vision_encoder") or one_of(options, "vit", _VISION)
    return VisionTowerConfig(
        image_size=options["image_size"],
        patch_size=vision.get("patch_size", options["patch_size"]),
        width=vision["width"],
        num_layers=vision["layers"] - bool(options.get("vit_remove_last", False)),
        num_heads=vision["heads"],
        mlp_ratio=vision.get("mlp_ratio", 4),
        hidden_act=vision.get("hidden_act", "quick_gelu"),
        layer_norm_eps=vision.get("layer_norm_eps", 1e-5),
    )


def _reference_cross_modal(options: Options, sizes: Options) -> CrossModalConfig:
    cross = sizes.get("cross_modal", {})
    size = cross.get("hidden_size", options["hidden_size"])
    return CrossModalConfig(
        hidden_size=size,
        num_layers=cross.get("num_layers", options["num_layers"]),
        num_heads=cross.get("num_heads", options["num_heads"]),
        intermediate_size=cross.get("intermediate_size", int(size * options["mlp_ratio"])),
        hidden_act=cross.get("hidden_act", "gelu"),
        layer_norm_eps=cross.get("layer_norm_eps", 1e-12),
        dropout=options["drop_rate"],
        num_token_types=3 if options["loss_names"].get("nlvr2", 0) > 0 else 2,
    )


def _reference_link(options: Options, sizes: Options, is_manager: bool) -> LinkConfig:
    eps = sizes.get("layer_norm_eps", 1e-5)
    if not is_manager:
        return LinkConfig(kind="bridge_add", layer_norm_eps=eps)
    return LinkConfig(
        kind=one_of(options, "manager_type", {"SAUE": "saue", "AAUE": "aaue"}),
        num_text_experts=options["managed_layers_text"],
        num_image_experts=options["managed_layers_image"],
        weight=one_of(options, "manager_weight_type", {"vector": "vector", "scalar": "scalar"}),
        temperature=options["manager_softmax_temperature"],
        learnable_temperature=options["manager_softmax_temperature_learnable"],
        learnable_weight=options["manager_learnable"],
        layer_norm_eps=eps,
    )


def _reference_heads(options: Options, cross: CrossModalConfig) -> HeadsConfig:
    active = {name for name, weight in options["loss_names"].items() if weight > 0}
    contrastive = active & {"itc", "itm_itc", "irtr_itm_itc"}
    return HeadsConfig(
        mlm="mlm" in active,
        mlm_layer_norm_eps=cross.layer_norm_eps,
        mlm_hidden_act=cross.hidden_act,
        itm=bool(active & {"itm", "itm_itc", "irtr_itm_itc"}),
        itc_size=options["contrastive_hidden_size"] if contrastive else None,
        itc_temperature=options["temperature"],
        rank="irtr" in active,
        vqa_answers=options["vqav2_label_size"] if "vqa" in active else None,
        nlvr2="nlvr2" in active,
        snli_ve="snli" in active,
        classifier_layers=options["task_head_layers"],
        classifier_scale=options["head_hidden_scale"],
    )
