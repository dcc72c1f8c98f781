"""Building, importing, evaluating, differentiating and exporting while ZeRO-3 splits every parameter over two ranks."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mt_deepspeed.config.model import HeadsConfig
from mt_deepspeed.models import TwoTowerModel, attach_heads
from mt_deepspeed.models.state_dicts import KeyMismatchError, import_checkpoint, plain_state_dict
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny_model import tiny_batch, tiny_config

DS_CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


def _module(kind: Any, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    module, config = nn.Module(), tiny_config(kind)
    # 17 image tokens: texts of up to 4 tokens then bear all projections of their attention to pictures.
    config = replace(config, vision=replace(config.vision, image_size=32))
    module.model = TwoTowerModel(config)
    attach_heads(module, config, HeadsConfig(mlm=True))
    return module


def _evaluate(module: Any, longest: int) -> torch.Tensor:
    batch = tiny_batch(module.model.config, (longest, 3, 2))
    cls_feats: torch.Tensor = module.eval().model(**batch).cls_feats
    return cls_feats


def _partitioned(place: Any, kind: str, longest: int, folder: str) -> dict[str, Any]:
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    with deepspeed.zero.Init(config_dict_or_path=DS_CONFIG):
        module = _module(kind, seed=place.rank)  # rank 0's draws count
    local = sum(parameter.numel() for parameter in module.parameters())
    initial = plain_state_dict(module, keep=place.rank == 0)
    try:
        import_checkpoint(module, {**plain_state_dict(module), "surplus.weight": torch.zeros(1)})
    except KeyMismatchError as error:
        refused = str(error)
    report = import_checkpoint(module, f"{folder}/other.safetensors")
    optimizer = torch.optim.AdamW(module.parameters())
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=DS_CONFIG)
    # Before any training step and not through the engine: nothing has taught ZeRO which layer uses what.
    with torch.no_grad():
        feats = {"cls_feats": _evaluate(engine.module, longest)}
    engine.backward(_evaluate(engine.module, longest).square().sum())
    gradients = {name: safe_get_full_grad(one) for name, one in engine.module.named_parameters()}
    exported = plain_state_dict(engine.module, keep=place.rank == 0)
    for name, tensors in (
        ("initial", initial),
        ("exported", exported),
        ("feats", feats),
        ("gradients", gradients),
    ):
        torch.save(tensors, f"{folder}/{name}{place.rank}.pt")
    return {"local": local, "refused": refused, "loaded": len(report.loaded)}


@pytest.mark.parametrize(("kind", "longest"), [("aaue", 9), ("bridge_interpolate", 9), ("aaue", 4)])
def test_two_ranks_equal_one(kind: str, longest: int, tmp_path: Path) -> None:
    first, other = _module(kind, seed=0), _module(kind, seed=9)
    expected = plain_state_dict(other)
    save_file(expected, tmp_path / "other.safetensors")
    results = run_ranks(2, _partitioned, kind, longest, str(tmp_path))
    feats = _evaluate(other, longest)
    feats.square().sum().backward()
    for name, wanted in (("initial", plain_state_dict(first)), ("exported", expected)):
        found = torch.load(tmp_path / f"{name}0.pt")
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
        assert torch.load(tmp_path / f"{name}1.pt") == {}
    for rank, result in enumerate(results):
        assert result["local"] == 0, "parameters were not split"
        assert "unexpected: surplus.weight" in result["refused"]
        assert result["loaded"] == len(expected)
        found = torch.load(tmp_path / f"feats{rank}.pt")["cls_feats"]
        torch.testing.assert_close(found, feats.detach(), rtol=1e-5, atol=1e-6)
        gradients = torch.load(tmp_path / f"gradients{rank}.pt")
        for name, parameter in other.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-5, msg=name)
