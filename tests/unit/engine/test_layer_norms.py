"""apex is not installable everywhere: a stand-in with its interface takes its place."""

import sys
import types

import pytest
import torch
from torch import nn

from mt_deepspeed.config import ObjectivesConfig
from mt_deepspeed.engine.layer_norms import fuse_layer_norms
from mt_deepspeed.tasks.pretrain import PretrainTask
from tests.unit.tasks.test_pretrain import tiny_batch, tiny_model


class FusedLayerNorm(nn.Module):
    """The constructor and attributes of apex.normalization.FusedLayerNorm."""

    calls = 0

    def __init__(self, normalized_shape: tuple[int, ...], eps: float = 1e-5) -> None:
        super().__init__()
        self.normalized_shape, self.eps = normalized_shape, eps
        self.weight = nn.Parameter(torch.empty(normalized_shape))
        self.bias = nn.Parameter(torch.empty(normalized_shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        FusedLayerNorm.calls += 1
        return nn.functional.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


@pytest.fixture
def apex(monkeypatch: pytest.MonkeyPatch) -> None:
    package, module = types.ModuleType("apex"), types.ModuleType("apex.normalization")
    module.FusedLayerNorm = FusedLayerNorm  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "apex", package)
    monkeypatch.setitem(sys.modules, "apex.normalization", module)


@pytest.mark.usefixtures("apex")
def test_apex_norms_replace_torchs_and_change_nothing_else() -> None:
    torch.manual_seed(0)
    task = PretrainTask(tiny_model(), ObjectivesConfig())
    before, _ = task(tiny_batch())
    names = {name: id(parameter) for name, parameter in task.named_parameters()}
    FusedLayerNorm.calls = 0
    replaced = fuse_layer_norms(task, torch.device("cuda"))
    after, _ = task(tiny_batch())
    assert {name: id(parameter) for name, parameter in task.named_parameters()} == names
    assert replaced > 20
    assert FusedLayerNorm.calls > 20
    for name, loss in before.items():
        assert torch.equal(loss, after[name])


@pytest.mark.usefixtures("apex")
def test_torchs_norms_stay_on_a_cpu() -> None:
    task = PretrainTask(tiny_model("bridge_add"), ObjectivesConfig())
    assert fuse_layer_norms(task, torch.device("cpu")) == 0


def test_torchs_norms_stay_without_apex(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apex.normalization", None)
    assert fuse_layer_norms(nn.Sequential(nn.LayerNorm(3)), torch.device("cuda")) == 0
