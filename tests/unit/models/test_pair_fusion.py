"""One image against many texts gives what the model gives for each pair."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mt_deepspeed.config.model import ModelConfig
from mt_deepspeed.models.pair_fusion import PairFusion
from mt_deepspeed.models.two_tower import TwoTowerModel
from tests.helpers.tiny_model import KINDS, tiny_batch, tiny_config


def random_model(config: ModelConfig) -> TwoTowerModel:
    """Every parameter is drawn, so that none hides behind its initial 0 or 1."""
    torch.manual_seed(0)
    model = TwoTowerModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2 or "layer_scores" in name:
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
            if name.endswith(".bias"):
                parameter.sub_(1)
    return model


def both_ways(model: TwoTowerModel, lengths: tuple[int, ...], images: int = 2) -> tuple[Tensor, Tensor]:
    """`cls_feats` `[images, texts, 2D]` pair by pair, and one image at a time."""
    batch = tiny_batch(model.config, lengths)
    mask = batch["text_mask"]
    with torch.no_grad():
        texts = model.text_experts(model.encode_text(batch["text_ids"], mask))
        pictures = model.image_experts(model.encode_image(batch["pixels"][:images]))
        plain = [
            model.fuse_experts(
                texts, [expert[i : i + 1].expand(len(mask), -1, -1) for expert in pictures], mask
            ).cls_feats
            for i in range(images)
        ]
    fusion = PairFusion(model, torch.float32)
    side = fusion.texts(torch.stack(texts, dim=2), mask)
    stacked = torch.stack(pictures, dim=2)
    return torch.stack(plain), torch.stack([fusion(fusion.image(one), side) for one in stacked])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_equals_the_model(kind: str, layers: int) -> None:
    config = tiny_config(kind)
    config = replace(config, cross_modal=replace(config.cross_modal, num_layers=layers))
    plain, fast = both_ways(random_model(config), (9, 6, 4))
    torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-5)
    assert plain.std() > 0.1  # not the same numbers everywhere


@pytest.mark.parametrize("changes", [{"weight": "scalar"}, {"temperature": 0.5}])
def test_equals_the_model_with_other_managers(changes: dict[str, Any]) -> None:
    plain, fast = both_ways(random_model(tiny_config("aaue", **changes)), (5, 9, 1), images=3)
    torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-5)


def test_equals_the_model_whose_managers_read_padding() -> None:
    config = replace(tiny_config(), mask_padding_in_managers=False)
    plain, fast = both_ways(random_model(config), (9, 3))
    torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-5)


def test_half_precision_stays_near() -> None:
    model = random_model(tiny_config())
    batch = tiny_batch(model.config)
    with torch.no_grad():
        texts = torch.stack(
            model.text_experts(model.encode_text(batch["text_ids"], batch["text_mask"])), dim=2
        )
        image = torch.stack(model.image_experts(model.encode_image(batch["pixels"])), dim=2)[0]
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        fusion = PairFusion(model, dtype)
        found.append(fusion(fusion.image(image), fusion.texts(texts, batch["text_mask"])))
    assert found[1].dtype == torch.bfloat16
    torch.testing.assert_close(found[1].float(), found[0], rtol=0.0, atol=0.15)


def test_does_not_change_the_model() -> None:
    model = random_model(tiny_config())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    both_ways(model, (4, 4))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in model.parameters())
