"""VQA, SNLI-VE and NLVR2: losses, metrics, gradients of every parameter, and one text pass for two images."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mt_deepspeed.config import RunConfig, from_dict, to_dict
from mt_deepspeed.tasks import build_task
from mt_deepspeed.tasks.classification import PairClassificationTask, eval_set_names
from tests.helpers.task_runs import NUM_ANSWERS, task_config


def batch_for(task: str, rows: int = 4, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 9, (rows,), generator=generator)
    mask = (torch.arange(8) < lengths[:, None]).long()
    images = 2 * rows if task == "nlvr2" else rows
    batch = {
        "pixels": torch.randint(256, (images, 3, 16, 16), generator=generator, dtype=torch.uint8),
        "text_ids": torch.randint(4, 300, mask.shape, generator=generator) * mask + 1 - mask,
        "text_mask": mask,
        "sample_ids": torch.arange(rows),
        "dataset_ids": torch.arange(rows) % 2,
    }
    if task == "vqa":
        scores = torch.zeros(rows, NUM_ANSWERS)
        scores[torch.arange(rows - 1), torch.arange(rows - 1)] = 0.6
        return batch | {"answer_scores": scores}
    return batch | {"labels": torch.arange(rows) % (2 if task == "nlvr2" else 3)}


def build(task: str, **changes: Any) -> PairClassificationTask:
    torch.manual_seed(0)
    built = build_task(task_config(Path("none"), task, **changes))
    assert isinstance(built, PairClassificationTask)
    return built


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("name", ["vqa", "snli_ve", "nlvr2"])
def test_every_parameter_learns(name: str, layers: int) -> None:
    task = build(name, classifier={"layers": layers, "scale": 1.5})
    losses, report = task(batch_for(name))
    assert losses.keys() == task.loss_weights.keys() == task.loss_counts(batch_for(name)).keys()
    assert report[task.metric_name][1] == (3 if name == "vqa" else 4)
    torch.stack(list(losses.values())).sum().backward()
    assert [n for n, p in task.named_parameters() if p.grad is None] == []
    roles = {n: task.parameter_role(n) for n, _ in task.named_parameters()}
    assert {n.split(".")[0] for n, role in roles.items() if role == "head"} == {task.head_name}
    assert {role for n, role in roles.items() if "cross_modal_" in n} == {"cross_modal"}
    assert roles["model.token_type_embeddings.weight"] == "tower"


def test_the_vqa_metric_is_the_score_of_the_likeliest_answer() -> None:
    task, batch = build("vqa"), batch_for("vqa")
    logits = torch.zeros(4, NUM_ANSWERS)
    logits[0, 0], logits[1, 5], logits[2, 2] = 1, 1, 1
    report = task.metrics(logits, batch)
    assert report["vqa_score"].tolist() == [pytest.approx(1.2), 3]  # the last question has no answers


def test_each_split_has_a_figure_and_the_first_one_chooses() -> None:
    task, batch = build("snli_ve"), batch_for("snli_ve")
    assert task.eval_sets == ["dev", "test"]
    logits = torch.nn.functional.one_hot(torch.tensor([0, 0, 2, 2]), 3).float()  # labels 0 1 2 0
    report = task.metrics(logits, batch)
    assert report["accuracy/dev"].tolist() == [2, 2]
    assert report["accuracy/test"].tolist() == [0, 2]
    metrics = {name: float(total / count) for name, (total, count) in report.items()}
    assert task.score(metrics) == 1 != metrics["accuracy"]
    assert task.eval_step(batch).keys() == report.keys()
    assert task.heatmaps().keys() == {
        "manager_weights/text",
        "manager_weights/image",
        "attention/text_over_image",
    }


def test_names_of_evaluation_sets_are_unique() -> None:
    def names(*sets: tuple[str, str]) -> list[str]:
        eval_sets = [{"path": path, "splits": [split]} for path, split in sets]
        return eval_set_names(task_config(Path("none"), "nlvr2", data={"eval": eval_sets}))

    assert names(("a", "dev"), ("a", "test1")) == ["dev", "test1"]
    assert names(("a", "dev"), ("b", "dev")) == ["a:dev", "b:dev"]
    assert names(("a", "dev"), ("a", "dev")) == ["0:a:dev", "1:a:dev"]


def test_one_text_pass_serves_both_images_of_nlvr2() -> None:
    task, batch = build("nlvr2").double(), batch_for("nlvr2")
    batch["pixels"] = torch.randn(8, 3, 16, 16).double()
    model = task.model
    pairs = []
    for half, token_type in ((batch["pixels"][:4], 1), (batch["pixels"][4:], 2)):
        text = model.encode_text(batch["text_ids"], batch["text_mask"])
        pairs.append(model.fuse(text, model.encode_image(half), batch["text_mask"], token_type).cls_feats)
    torch.testing.assert_close(task.features(batch), torch.cat(pairs, dim=-1))


def test_dropout_on_the_features_of_nlvr2_is_for_training() -> None:
    task, batch = build("nlvr2", classifier={"dropout": 0.9}), batch_for("nlvr2")
    assert (task.features(batch) == 0).double().mean() > 0.5
    task.eval()
    assert torch.equal(task.features(batch), task.features(batch))


def test_nlvr2_needs_three_token_types() -> None:
    tree = to_dict(task_config(Path("none"), "nlvr2"))
    tree["model"]["cross_modal"]["num_token_types"] = 2
    with pytest.raises(ValueError, match=r"num_token_types: found 2, expected 3"):
        from_dict(RunConfig, tree)


def test_two_images_and_one_text_are_counted() -> None:
    one, two = build("snli_ve").flops_per_sample(), build("nlvr2").flops_per_sample()
    assert one < two < 2 * one
