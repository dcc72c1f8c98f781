"""Published configurations in our terms."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mt_deepspeed.config import load_config
from mt_deepspeed.models.foreign_configs import from_reference, published_options
from mt_deepspeed.models.hf_bridgetower import from_hf_bridgetower

OPTIONS: dict[str, Any] = {
    "model_type": "MT",
    "loss_names": {"itm": 1, "mlm": 1, "vqa": 0},
    "image_size": 288,
    "patch_size": 16,
    "tokenizer": "roberta-base",
    "vocab_size": 50265,
    "vit": "CLIP-ViT-B/16",
    "hidden_size": 768,
    "num_heads": 12,
    "num_layers": 6,
    "mlp_ratio": 4,
    "drop_rate": 0.1,
    "task_head_layers": 2,
    "head_hidden_scale": 2,
    "temperature": 0.07,
    "contrastive_hidden_size": 256,
    "vqav2_label_size": 3129,
    "manager_type": "AAUE",
    "managed_layers_text": 6,
    "managed_layers_image": 6,
    "manager_learnable": True,
    "manager_weight_type": "vector",
    "manager_softmax_temperature": 1,
    "manager_softmax_temperature_learnable": True,
}


def _without_sources(model: Any) -> Any:
    return replace(
        model, text=replace(model.text, pretrained=None), vision=replace(model.vision, pretrained=None)
    )


def test_published_managertower_is_the_preset(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "hyper_parameters": {"config": OPTIONS}}, tmp_path / "pt_base.ckpt")
    setup = from_reference(published_options(tmp_path / "pt_base.ckpt"))
    preset = _without_sources(load_config("managertower-base").model)
    assert setup.model == replace(preset, mask_padding_in_managers=False)
    assert setup.heads.mlm
    assert setup.heads.itm
    assert setup.heads.vqa_answers is None


def test_published_bridgetower_is_the_preset() -> None:
    large = {"vit": "CLIP-ViT-L/14", "patch_size": 14, "image_size": 294, "tokenizer": "roberta-large"}
    large |= {"hidden_size": 1024, "num_heads": 16, "model_type": "BT"}
    setup = from_reference(OPTIONS | large)
    preset = _without_sources(load_config("bridgetower-large").model)
    assert setup.model == replace(preset, mask_padding_in_managers=False)


def test_library_defaults_are_the_preset_but_for_epsilons() -> None:
    setup = from_hf_bridgetower({}, "BridgeTowerForImageAndTextRetrieval")
    preset = _without_sources(load_config("bridgetower-base").model)
    assert setup.model == replace(preset, cross_modal=replace(preset.cross_modal, layer_norm_eps=1e-5))
    assert setup.heads.itm
    assert not setup.heads.mlm


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "METER"}, "model_type: found 'METER', expected one of MT, BT"),
        ({"manager_type": "SAE"}, "manager_type: found 'SAE'"),
        ({"vit": "swin"}, "vit: found 'swin', expected one of CLIP-ViT-B/32"),
        ({"tokenizer": "bert-base-uncased"}, "tokenizer: found 'bert-base-uncased'"),
        ({"managed_layers_text": 13}, "top 13 layers of the text tower"),
    ],
)
def test_unsupported_options_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_reference(OPTIONS | change)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"link_tower_type": "gate"}, "link_tower_type: found 'gate'"),
        ({"hidden_size": 1024}, "text_config.hidden_size equal"),
        ({"vision_config": {"num_hidden_layers": 3}}, "vision tower has 3 layers"),
        ({"text_config": {"hidden_dropout_prob": 0.2}}, "dropout differ"),
    ],
)
def test_unsupported_library_options_are_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_hf_bridgetower(config, "BridgeTowerForMaskedLM")


def test_not_a_published_checkpoint(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"found no hyper_parameters\['config'\]"):
        published_options(tmp_path / "a.ckpt")
