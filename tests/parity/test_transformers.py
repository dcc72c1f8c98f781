"""BridgeTower against the public library's port on tiny random configurations: outputs and gradients."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BridgeTowerConfig,
    BridgeTowerForContrastiveLearning,
    BridgeTowerForImageAndTextRetrieval,
    BridgeTowerForMaskedLM,
)

from mt_deepspeed.models.hf_bridgetower import from_hf_bridgetower
from mt_deepspeed.models.key_maps import own_name, plain_name
from mt_deepspeed.models.state_dicts import import_checkpoint
from mt_deepspeed.objectives.classification import cross_entropy
from mt_deepspeed.objectives.contrastive import three_way_contrastive_loss
from mt_deepspeed.objectives.mlm import gather_labelled
from tests.parity.cases import ModelWithHeads
from tests.parity.trace import Tensors, forward

TEXT: dict[str, Any] = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT |= {"intermediate_size": 48, "max_position_embeddings": 20, "layer_norm_eps": 1e-4}
VISION = {"hidden_size": 64, "num_hidden_layers": 3, "patch_size": 8, "image_size": 32}

VARIANTS: dict[str, tuple[type[Any], dict[str, Any], dict[str, Any]]] = {
    "add_mlm": (BridgeTowerForMaskedLM, {}, {}),
    "scaled_add_mlm": (BridgeTowerForMaskedLM, {"link_tower_type": "scaled_add"}, {}),
    "interpolate_itm": (BridgeTowerForImageAndTextRetrieval, {"link_tower_type": "interpolate"}, {}),
    "own_transforms_itm": (
        BridgeTowerForImageAndTextRetrieval,
        {"share_cross_modal_transformer_layers": False, "num_hidden_layers": 3},
        {},
    ),
    "one_layer_mlm": (BridgeTowerForMaskedLM, {"num_hidden_layers": 1, "layer_norm_eps": 1e-3}, {}),
    "deeper_vision_itm": (BridgeTowerForImageAndTextRetrieval, {}, {"num_hidden_layers": 4}),
    "contrastive": (
        BridgeTowerForContrastiveLearning,
        # The library's contrastive model needs one width throughout.
        {"hidden_size": 64, "contrastive_hidden_size": 12, "logit_scale_init_value": 1.5},
        {"share_layernorm": False},
    ),
    "interpolated_positions_mlm": (BridgeTowerForMaskedLM, {}, {}),
}


def _library_model(variant: str) -> Any:
    kind, options, vision = VARIANTS[variant]
    options = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, **options}
    config = BridgeTowerConfig(
        **options,
        text_config=TEXT | {"hidden_size": options["hidden_size"]},
        vision_config=VISION | vision,
        # With SDPA the library (5.x) makes the image stream's self-attention causal.
        attn_implementation="eager",
    )
    torch.manual_seed(len(variant))
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def _batch(variant: str) -> Tensors:
    size = (40, 56) if variant.startswith("interpolated") else (32, 32)
    ids = torch.randint(3, 61, (3, 9))
    mask = torch.ones_like(ids)
    for row, length in enumerate((9, 6, 4)):
        ids[row, length:], mask[row, length:] = 1, 0
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(3, 3, *size)}


def _ours(module: Any, batch: Tensors, labels: Tensor) -> tuple[Tensor, Tensors]:
    seen = forward(module.model, batch["input_ids"], batch["attention_mask"], batch["pixel_values"])
    if hasattr(module, "mlm_score"):
        feats, targets = gather_labelled(seen["text_feats"], labels)
        return cross_entropy(module.mlm_score(feats), targets), {
            "logits": module.mlm_score(seen["text_feats"])
        }
    if hasattr(module, "itm_score"):
        logits = module.itm_score(seen["cls_feats"])
        return cross_entropy(logits, labels), {"logits": logits}
    text = module.itc_text_head(seen["text.last_state"][:, 0])
    image = module.itc_image_head(seen["image.last_expert"][:, 0])
    fused = module.itc_cross_modal_head(seen["cls_feats"])
    loss = three_way_contrastive_loss(text, image, fused, module.logit_scale)
    return loss, {"text_embeds": text, "image_embeds": image, "cross_embeds": fused}


@pytest.mark.parametrize("variant", VARIANTS)
def test_library_bridgetower(variant: str, tmp_path: Path) -> None:
    library = _library_model(variant)
    library.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    setup = from_hf_bridgetower(config, config["architectures"][0])
    ours = ModelWithHeads(setup).eval()
    report = import_checkpoint(ours, tmp_path, allow_unexpected=setup.unused)
    assert report.layout == "hf_bridgetower"
    assert not report.missing

    batch = _batch(variant)
    if variant.startswith("interpolated"):
        extra: dict[str, Any] = {"interpolate_pos_encoding": True}
    else:
        extra = {}
    if setup.heads.mlm:
        labels = torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)
        labels[:, ::2] = -100
    else:
        labels = torch.tensor([1, 0, 1])
    wanted = {"return_loss": True} if setup.heads.fused_itc_size else {"labels": labels}
    expected = library(**batch, **wanted, **extra)
    loss, outputs = _ours(ours, batch, labels)

    _assert_close("loss", loss, expected.loss)
    for name, tensor in outputs.items():
        _assert_close(name, tensor, expected[name])
    expected.loss.backward()
    loss.backward()
    gradients = {plain_name(name): parameter.grad for name, parameter in ours.named_parameters()}
    compared = 0
    for name, parameter in library.named_parameters():
        if parameter.grad is None:
            continue
        gradient = gradients[own_name(name, "hf_bridgetower")]
        assert gradient is not None, name
        _assert_close(name, gradient.reshape(parameter.shape), parameter.grad)
        compared += 1
    assert compared > 100


def _assert_close(name: str, found: Tensor, expected: Tensor) -> None:
    worst = float(((found - expected).abs() / (1e-5 + 1e-4 * expected.abs())).max().detach())
    assert worst <= 1, f"{name}: {worst:.3g} times the bound"
