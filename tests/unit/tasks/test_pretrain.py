"""The pre-training task: one forward pass for both objectives equals separate passes."""

import dataclasses
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mt_deepspeed.config import ModelConfig, ObjectivesConfig, from_dict
from mt_deepspeed.models.flops import forward_flops
from mt_deepspeed.tasks.pretrain import PretrainTask

VOCAB = 61


def tiny_model(kind: str = "aaue", **changes: object) -> ModelConfig:
    sizes = {
        "text": {
            "vocab_size": VOCAB,
            "hidden_size": 24,
            "num_layers": 3,
            "num_heads": 2,
            "intermediate_size": 48,
            "max_positions": 20,
            "dropout": 0.0,
        },
        "vision": {"image_size": 32, "patch_size": 16, "width": 16, "num_layers": 3, "num_heads": 2},
        "cross_modal": {
            "hidden_size": 24,
            "num_layers": 2,
            "num_heads": 2,
            "intermediate_size": 48,
            "dropout": 0.0,
        },
        "link": {"kind": kind, "num_text_experts": 2, "num_image_experts": 3, "noise": False},
    }
    return from_dict(ModelConfig, {**sizes, **changes})


def tiny_batch(seed: int = 0, rows: int = 5, false_images: int = 3, masked: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(5, 10, (rows,), generator=generator)
    mask = (torch.arange(9)[None] < lengths[:, None]).long()
    ids = torch.randint(4, VOCAB - 1, (rows, 9), generator=generator) * mask + (1 - mask)
    chosen = (torch.rand(rows, 9, generator=generator) < 0.3) & mask.bool() & masked
    index = torch.arange(rows)
    index[rows - false_images :] = torch.arange(rows, rows + false_images)
    return {
        "pixels": torch.randn(rows + false_images, 3, 32, 32, generator=generator),
        "text_ids": ids,
        "text_mask": mask,
        "mlm_ids": ids.masked_fill(chosen, VOCAB - 1),
        "mlm_labels": ids.masked_fill(~chosen, -100),
        "mlm_positions": chosen.flatten().nonzero()[:, 0],
        "itm_image_index": index,
        "itm_labels": (index < rows).long(),
        "sample_ids": torch.arange(rows),
    }


def gradients(task: PretrainTask) -> dict[str, Tensor]:
    found = {}
    for name, parameter in task.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad.clone()
        parameter.grad = None
    return found


@pytest.mark.parametrize("kind", ["aaue", "saue", "bridge_add"])
def test_one_pass_equals_separate_passes(kind: str) -> None:
    torch.manual_seed(0)
    task = PretrainTask(tiny_model(kind), ObjectivesConfig(mlm_weight=1.0, itm_weight=0.5)).double()
    batch = {
        key: value.double() if value.is_floating_point() else value for key, value in tiny_batch().items()
    }
    losses, _ = task(batch)
    (losses["mlm"] + 0.5 * losses["itm"]).backward()
    once = gradients(task)

    model = task.model
    masked = model(batch["mlm_ids"], batch["text_mask"], batch["pixels"][:5])
    mlm = F.cross_entropy(
        task.mlm_score(masked.text_feats).transpose(1, 2), batch["mlm_labels"], ignore_index=-100
    )
    matched = model(batch["text_ids"], batch["text_mask"], batch["pixels"][batch["itm_image_index"]])
    itm = F.cross_entropy(task.itm_score(matched.cls_feats), batch["itm_labels"])
    # The false-image rows of both passes: pictures that no objective asked for get no gradient here either.
    (mlm + 0.5 * itm).backward()
    apart = gradients(task)

    torch.testing.assert_close(losses["mlm"].double(), mlm, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(losses["itm"].double(), itm, rtol=1e-6, atol=1e-7)
    for name, gradient in once.items():
        torch.testing.assert_close(
            gradient, apart[name], rtol=1e-5, atol=1e-8, msg=partial("{}: {}".format, name)
        )


@pytest.mark.parametrize(
    "kind", ["aaue", "saue", "sae", "aaue_own_query", "bridge_add", "bridge_interpolate"]
)
def test_every_parameter_gets_a_gradient(kind: str) -> None:
    torch.manual_seed(1)
    model = tiny_model(kind)
    task = PretrainTask(
        dataclasses.replace(model, link=dataclasses.replace(model.link, noise=True)), ObjectivesConfig()
    )
    task.train()
    losses, _ = task(tiny_batch())
    sum(losses.values()).backward()  # type: ignore[union-attr]
    for name, gradient in gradients(task).items():
        if name.endswith("key.bias") or name.endswith("k_proj.bias"):
            continue  # a constant added to every key cancels in the softmax: zero by algebra
        assert gradient.abs().sum() > 0, name


def test_no_masked_token_is_a_zero_loss_with_a_graph() -> None:
    task = PretrainTask(tiny_model(), ObjectivesConfig())
    batch = tiny_batch(masked=False)
    losses, report = task(batch)
    assert losses["mlm"].item() == 0
    assert task.loss_counts(batch)["mlm"].item() == 0
    assert report["mlm_accuracy"].tolist() == [0, 0]
    losses["mlm"].backward()
    assert task.mlm_score.decoder.weight.grad is not None


def test_objectives_that_are_off_leave_no_head() -> None:
    batch = tiny_batch()
    only_itm = PretrainTask(tiny_model(), ObjectivesConfig(mlm_weight=0))
    assert not any("mlm" in name for name, _ in only_itm.named_parameters())
    assert set(only_itm({k: v for k, v in batch.items() if not k.startswith("mlm")})[0]) == {"itm"}
    only_mlm = PretrainTask(tiny_model(), ObjectivesConfig(itm_weight=0))
    batch["pixels"] = batch["pixels"][:5]
    assert set(only_mlm({k: v for k, v in batch.items() if not k.startswith("itm")})[0]) == {"mlm"}
    with pytest.raises(ValueError, match="at least one"):
        PretrainTask(tiny_model(), ObjectivesConfig(mlm_weight=0, itm_weight=0))


def test_eval_step_reports_sums_and_manager_weights() -> None:
    task = PretrainTask(tiny_model(), ObjectivesConfig()).eval()
    batch = tiny_batch()
    passes: list[int] = []
    task.model.vit_model.register_forward_hook(lambda *_: passes.append(1))
    with torch.no_grad():
        report = task.eval_step(batch)
    assert len(passes) == 1, "pictures are taken of the same pass"
    assert set(report) == {"mlm_accuracy", "mlm_loss", "itm_accuracy", "itm_loss"}
    assert report["itm_accuracy"][1] == 5
    maps = task.heatmaps()
    assert maps["manager_weights/text"].shape == (2, 2)
    assert maps["manager_weights/image"].shape == (2, 3)
    torch.testing.assert_close(maps["manager_weights/image"].sum(dim=1), torch.ones(2))
    assert maps["attention/text_over_image"].shape == (320, 640, 3)
    assert task.heatmaps() == {}


def test_roles() -> None:
    task = PretrainTask(tiny_model(), ObjectivesConfig())
    assert task.parameter_role("model.vit_model.visual.conv1.weight") == "tower"
    assert task.parameter_role("model.token_type_embeddings.weight") == "tower"
    assert task.parameter_role("model.cross_modal_text_transform.bias") == "cross_modal"
    assert task.parameter_role("itm_score.fc.weight") == "head"


def test_flops_agree_with_the_published_count() -> None:
    # ManagerTower base, 384 px, 50 tokens: 105.52 G multiply-adds (arXiv 2306.00103), which leaves out or
    # counts some element-wise work; BridgeTower base: 101.25 G. Our five adaptive managers of each modality
    # project the 50 text tokens twice instead of these and the 577 image tokens once.
    spared = 10 * (577 - 50) * 768**2 / 1e9
    base = ModelConfig()
    at_384 = dataclasses.replace(base, vision=dataclasses.replace(base.vision, image_size=384))
    assert forward_flops(at_384, 50, 1, 1, 0) / 2e9 == pytest.approx(105.52 - spared, rel=0.01)
    # Class features alone: the last image layer's 12 D^2 per token and two attentions for one token instead of 577;
    # keys and values, of 577 and 50 tokens, are then met by the 12 heads' readers instead of matrices.
    class_only = (576 * 768 * (12 * 768 + 2 * 577 + 2 * 50) + (577 + 50) * 2 * 768 * (768 - 12)) / 1e9
    whole, pooled = (forward_flops(at_384, 50, 1, 1, 0, pooled=count) / 2e9 for count in (None, 1))
    assert whole - pooled == pytest.approx(class_only, rel=0.001)
    bridge = dataclasses.replace(at_384, link=dataclasses.replace(base.link, kind="bridge_add"))
    assert forward_flops(bridge, 50, 1, 1, 0) / 2e9 == pytest.approx(101.25, rel=0.01)
