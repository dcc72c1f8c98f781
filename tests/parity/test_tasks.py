"""The tasks give the losses and gradients of the reference cases, and of cases made here for every kind of head."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mt_deepspeed.config import ClassifierConfig, DataConfig, ObjectivesConfig, RetrievalConfig, RunConfig
from mt_deepspeed.models.key_maps import plain_name
from mt_deepspeed.models.state_dicts import import_checkpoint, plain_state_dict
from mt_deepspeed.tasks import ALONE, build_task
from tests.parity.cases import GOLDEN, Case, ModelWithHeads, find_cases
from tests.parity.compute import compute

TASKS = {
    frozenset({"mlm", "itm"}): "pretrain",
    frozenset({"vqa"}): "vqa",
    frozenset({"snli"}): "snli_ve",
    frozenset({"nlvr2"}): "nlvr2",
    frozenset({"irtr_itm_itc"}): "retrieval",
    frozenset({"irtr", "itm"}): "retrieval",
    frozenset({"irtr"}): "retrieval",
}
"""Active objectives of a case -> task."""


def task_of(case: Case) -> str | None:
    return None if case.from_library else TASKS.get(frozenset(case.active))


def run_config(case: Case) -> RunConfig:
    setup, task = case.setup, task_of(case)
    assert task is not None
    heads = setup.heads
    return RunConfig(
        task=task,  # type: ignore[arg-type]
        model=setup.model,
        data=DataConfig(padding="max_length"),
        objectives=ObjectivesConfig(),
        classifier=ClassifierConfig(
            layers=heads.classifier_layers,
            scale=heads.classifier_scale,
            num_answers=heads.vqa_answers or 1,
        ),
        retrieval=RetrievalConfig(
            objective="false_texts" if heads.rank else "itc_itm",
            itc_size=heads.itc_size or 1,
            num_false_texts=len(false_texts(case.inputs)),
        ),
    )


def false_texts(data: dict[str, Tensor]) -> list[str]:
    names = sorted(
        key.removesuffix("_ids") for key in data if key.startswith("false_text_") and key.endswith("_ids")
    )
    return sorted(names, key=lambda name: int(name.rpartition("_")[2]))


def batch_of(case: Case) -> dict[str, Tensor]:
    """The inputs of a case under the keys of our batches."""
    data, rows = case.inputs, len(case.inputs["text_ids"])
    batch = {"text_ids": data["text_ids"], "text_mask": data["text_masks"], "sample_ids": torch.arange(rows)}
    names = {
        "vqa_targets": "answer_scores",
        "labels": "labels",
        "answers": "labels",
        "img_index": "image_ids",
    }
    batch |= {ours: data[theirs] for theirs, ours in names.items() if theirs in data}
    if "image_1" in data:
        return batch | {"pixels": torch.cat([data["image_0"], data["image_1"]])}
    batch["pixels"] = data["image"]
    if "text_ids_mlm" in data:
        batch |= {"mlm_ids": data["text_ids_mlm"], "mlm_labels": data["text_labels_mlm"]}
        batch["mlm_positions"] = (batch["mlm_labels"].flatten() != -100).nonzero()[:, 0]
    if "itm_labels" in data:
        batch["itm_labels"] = data["itm_labels"]
        batch["itm_image_index"] = torch.arange(rows) + rows * (1 - data["itm_labels"])
        batch["pixels"] = torch.cat([data["image"], data["false_image_0"]])
    chosen = false_texts(data)
    if chosen:
        batch.setdefault("itm_labels", torch.ones(rows, dtype=torch.int64))
        batch.setdefault("itm_image_index", torch.arange(rows))
        batch["choice_ids"] = torch.stack([data["text_ids"], *(data[f"{one}_ids"] for one in chosen)], dim=1)
        batch["choice_mask"] = torch.stack(
            [data["text_masks"], *(data[f"{one}_masks"] for one in chosen)], dim=1
        )
    return batch


def losses_and_gradients(case: Case) -> dict[str, Tensor]:
    """`total_loss`, `grad.*` and `grad_norm.*` by the task."""
    config = run_config(case)
    task: Any = build_task(config)
    allowed = (*case.setup.unused, "itm_score.*", "temperature", "mlm_score.*")
    import_checkpoint(
        task, case.folder / "state_dict.safetensors", allow_unexpected=allowed, allow_missing=("itm_score.*",)
    )
    task.eval()
    batch = batch_of(case)
    # Reference cases pin the draws to the largest weight, as our evaluation does.
    if config.task == "retrieval" and not case.setup.heads.rank:
        losses, _ = task._losses(batch, ALONE, drawn=False)
    else:
        losses, _ = task(batch)
    if "itm" in losses and "itm" not in case.active and case.setup.heads.rank:
        del losses["itm"]
    total = torch.stack(list(losses.values())).sum()
    total.backward()
    found = {plain_name(name): p.grad for name, p in task.named_parameters() if p.grad is not None}
    norms = {f"grad_norm.{name}": gradient.norm() for name, gradient in found.items()}
    return {"total_loss": total.detach(), **{f"grad.{name}": g for name, g in found.items()}, **norms}


def assert_equal(case: Case, expected: dict[str, Tensor]) -> None:
    found = losses_and_gradients(case)
    compared = 0
    for name, tensor in found.items():
        if name in expected:
            largest = max(float(expected[name].abs().max()), 1e-6)
            difference = float((tensor.reshape(expected[name].shape) - expected[name]).abs().max())
            bound = 5e-5 if name == "total_loss" else 5e-4
            assert difference <= bound * largest + 1e-7, (
                f"{case.name}: {name}: {difference:.2e} of {largest:.2e}"
            )
            compared += 1
    assert compared > 100, f"{case.name}: only {compared} tensors were compared"


@pytest.mark.parametrize("case", [case for case in find_cases() if task_of(case)], ids=lambda case: case.name)
def test_tasks_meet_the_reference(case: Case) -> None:
    assert_equal(case, case.outputs)


MADE: dict[str, tuple[dict[str, float], dict[str, Any]]] = {
    "vqa-one-layer": ({"vqa": 1}, {"task_head_layers": 1, "vqav2_label_size": 11}),
    "vqa": ({"vqa": 1}, {"task_head_layers": 2, "head_hidden_scale": 1.5, "vqav2_label_size": 11}),
    "snli": ({"snli": 1}, {"task_head_layers": 2, "head_hidden_scale": 2}),
    "snli-one-layer": ({"snli": 1}, {"task_head_layers": 1}),
    "nlvr2-one-layer": ({"nlvr2": 1}, {"task_head_layers": 1}),
    "irtr": ({"irtr": 1}, {}),
    "irtr-itm": ({"irtr": 1, "itm": 1}, {}),
    "retrieval": ({"irtr_itm_itc": 1}, {"contrastive_hidden_size": 20}),
    "pretraining-hard": ({"itm_itc": 1, "mlm": 1}, {"contrastive_hidden_size": 20}),
    "itc": ({"itc": 1}, {"contrastive_hidden_size": 20}),
}
WANTED = {
    "vqa": {"vqa.logits", "vqa.loss"},
    "snli": {"snli.logits", "snli.loss"},
    "nlvr2": {"second_image.cls_feats", "nlvr2.logits", "nlvr2.loss"},
    "irtr": {"irtr.score", "irtr.loss", "irtr.cls_feats"},
    "itc": {"itc.text_feats", "itc.image_feats", "itc.logits_i2t", "itc.logits_t2i"},
    "itm_itc": {
        "itm_itc.sampling_weights_t2i",
        "itm_itc.neg_text_index",
        "itm_itc.itm_logits",
        "itm_itc.itc_loss",
    },
    "irtr_itm_itc": {"itm_itc.sampling_weights_i2t", "itm_itc.itm_loss", "itm_itc.cls_feats", "rerank.final"},
}
"""Objective -> tensors that reference cases with it hold."""


def make_case(folder: Path, losses: dict[str, float], options: dict[str, Any]) -> Case:
    """A case of random weights and inputs; its outputs are what `compute` finds."""
    config = json.loads((GOLDEN / "mt-saue-scalar" / "config.json").read_text("utf-8"))
    names = {"loss_names": losses, "contrastive_hidden_size": 16, "temperature": 0.2, "task_head_layers": 2}
    config["config"] |= {"head_hidden_scale": 1, "vqav2_label_size": 7, **names, **options}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(3)
    torch.manual_seed(3)
    case = Case(folder)
    module: nn.Module = ModelWithHeads(case.setup)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    save_file({k: v.clone() for k, v in plain_state_dict(module).items()}, folder / "state_dict.safetensors")
    size, vocab = config["config"]["image_size"], case.setup.model.text.vocab_size
    mask = (torch.arange(10) < torch.tensor([[10], [6], [8]])).long()

    def text() -> Tensor:
        return torch.randint(3, vocab - 1, mask.shape, generator=generator) * mask + 1 - mask

    def picture() -> Tensor:
        return torch.randn(3, 3, size, size, generator=generator)

    plain = text()
    data = {
        "text_ids": plain,
        "text_masks": mask,
        "text_ids_mlm": plain.masked_fill(torch.arange(10) % 3 == 1, vocab - 1),
        "text_labels_mlm": plain.masked_fill(torch.arange(10) % 3 != 1, -100).masked_fill(mask == 0, -100),
        "img_index": torch.tensor([5, 2, 5]),
        "labels": torch.tensor([2, 0, 1]),
        "answers": torch.tensor([1, 0, 1]),
        "vqa_targets": torch.rand(3, config["config"]["vqav2_label_size"], generator=generator),
    }
    if "irtr" in losses:
        data |= {f"false_text_{n}_ids": text() for n in range(2)}
        data |= {f"false_text_{n}_masks": mask.clone() for n in range(2)}
    data |= {name: picture() for name in (("image_0", "image_1") if "nlvr2" in losses else ("image",))}
    if "itm" in losses:
        data |= {"itm_labels": torch.tensor([1, 0, 0]), "false_image_0": picture()}
    del data["labels" if "nlvr2" in losses else "answers"]
    save_file(data, folder / "inputs.safetensors")
    save_file({"cls_feats": torch.zeros(1)}, folder / "outputs.safetensors")
    return case


@pytest.mark.parametrize("name", sorted(MADE))
def test_every_head_is_computed(name: str, tmp_path: Path) -> None:
    case = make_case(tmp_path / name, *MADE[name])
    expected = compute(dataclasses.replace(case))
    for objective in case.active:
        assert WANTED.get(objective, set()) <= expected.keys()
    assert all(bool(torch.isfinite(tensor).all()) for tensor in expected.values())
    if task_of(case):
        assert_equal(case, expected)
