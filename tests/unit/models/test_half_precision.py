"""Half-precision experts: as near to float32 as before they were kept in bfloat16."""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mt_deepspeed.models.two_tower import Transform, TwoTowerModel
from tests.helpers.tiny_model import tiny_batch, tiny_config, with_link


def _loss_and_gradients(model: TwoTowerModel, half: bool) -> tuple[Tensor, list[Tensor]]:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
        fused = model(**tiny_batch(model.config))
    loss = fused.cls_feats.float().sin().sum() + fused.text_feats.float().square().mean()
    gradients = torch.autograd.grad(loss, [*model.parameters()], allow_unused=True)
    return loss.detach(), [one for one in gradients if one is not None]


def _afterwards(self: Any, state: Tensor, offset: Tensor) -> Tensor:
    return F.linear(state, self.weight, self.bias) + offset


def _distance(found: tuple[Tensor, list[Tensor]], true: tuple[Tensor, list[Tensor]]) -> float:
    """Of all gradients together, relative."""
    squares = sum(float((a - b).square().sum()) for a, b in zip(found[1], true[1], strict=True))
    return float((squares / sum(float(b.square().sum()) for b in true[1])) ** 0.5)


def _experts_of(model: TwoTowerModel) -> list[Tensor]:
    batch = tiny_batch(model.config)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model.image_experts(model.encode_image(batch["pixels"]))


@pytest.mark.parametrize("kind", ["saue", "aaue"])
def test_half_precision_experts(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MT_KERNELS", "reference")  # as on a GPU
    torch.manual_seed(0)
    model = TwoTowerModel(with_link(tiny_config(kind), noise=False))
    assert {expert.dtype for expert in _experts_of(model)} == {torch.bfloat16}
    true = _loss_and_gradients(model, half=False)
    now = _distance(_loss_and_gradients(model, half=True), true)
    afterwards: Callable[..., Tensor] = _afterwards
    with patch.object(Transform, "forward", afterwards):
        assert {expert.dtype for expert in _experts_of(model)} == {torch.float32}
        before = _distance(_loss_and_gradients(model, half=True), true)
    # Rounding of bfloat16 is 2^-9 of a number; through six towers' layers both ways end a few of these away.
    print(f"{kind}: gradients are {before:.4f} from float32 with float32 experts, {now:.4f} with bfloat16")
    assert now < 1.3 * before
