"""CIFAR and GLUE on one tower: the library's model, weights of two-tower checkpoints, what trains, what is counted."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import RobertaForMaskedLM, RobertaForSequenceClassification

from mt_deepspeed.engine.optim import parameter_groups
from mt_deepspeed.evaluation.sums import SAMPLES
from mt_deepspeed.models.state_dicts import KeyMismatchError, plain_state_dict
from mt_deepspeed.models.text_tower import roberta_config
from mt_deepspeed.models.vision_tower import resize_positions
from mt_deepspeed.pretrained.starting_weights import load_starting_weights
from mt_deepspeed.tasks import build_task
from mt_deepspeed.tasks.cifar import CifarTask
from mt_deepspeed.tasks.classification import ClassificationTask
from mt_deepspeed.tasks.glue import GlueTask
from tests.helpers.task_runs import task_config

NOWHERE = Path("none")
POSITIONS = "vit_model.visual.positional_embedding"


def build(task: str, **changes: Any) -> ClassificationTask:
    torch.manual_seed(0)
    built = build_task(task_config(NOWHERE, task, **changes))
    assert isinstance(built, ClassificationTask)
    return built


def glue(name: str, **changes: Any) -> ClassificationTask:
    sets = {"train": [], "eval": [{"path": "glue", "splits": [f"{name}-dev"]}]}
    return build("glue", glue={"name": name}, data=sets, **changes)


TASKS = {"cifar": lambda: build("cifar"), "mnli": lambda: glue("mnli"), "stsb": lambda: glue("stsb")}


@pytest.mark.parametrize("name", TASKS)
def test_one_tower_and_its_head_learn(name: str) -> None:
    task = TASKS[name]()
    batch = task.fake_batch(4, 7)
    losses, report = task(batch)
    assert losses.keys() == task.loss_weights.keys() == task.loss_counts(batch).keys()
    assert report[task.metric_name][1] == 4
    torch.stack(list(losses.values())).sum().backward()
    assert [n for n, p in task.named_parameters() if p.grad is None] == []
    names = {n.split(".")[0 if n.startswith(task.head_name) else 1] for n, _ in task.named_parameters()}
    assert names == {task.head_name, "vit_model" if name == "cifar" else "text_transformer"}
    # The published code leaves CIFAR's classifier out of its optimizer.
    roles = {n: task.parameter_role(n) for n, _ in task.named_parameters()}
    groups = parameter_groups(task.named_parameters(), roles, task_config(NOWHERE, "cifar").optim)
    trained = {n: group["label"] for group in groups for n in group["names"]}
    assert trained.keys() == roles.keys()
    assert {n.split(".")[0] for n, label in trained.items() if label.startswith("head")} == {task.head_name}


def test_cifar_reads_the_class_token_after_ln_post() -> None:
    task = build("cifar", classifier={"num_answers": 10})
    assert isinstance(task, CifarTask)
    seen: list[Tensor] = []
    visual = task.model.vit_model.visual
    visual.transformer.resblocks[-1].register_forward_hook(lambda *args: seen.append(args[2]))
    batch = task.fake_batch(3, 0)
    logits = task.logits(batch)
    wanted = visual.ln_post(seen[0])[:, 0] @ task.cifar_classifier.weight.T + task.cifar_classifier.bias
    assert logits.shape == (3, 10)
    torch.testing.assert_close(logits, wanted)


@pytest.mark.parametrize("name", ["rte", "mnli", "stsb"])
def test_glue_is_the_librarys_sequence_classifier(name: str) -> None:
    task = glue(name).eval()
    assert isinstance(task, GlueTask)
    config = roberta_config(task_config(NOWHERE, "glue").model.text, num_labels=max(1, task.num_classes))
    library = RobertaForSequenceClassification(config).eval()
    state = {
        key.replace("model.text_transformer", "roberta").replace("glue_classifier", "classifier"): value
        for key, value in task.state_dict().items()
    }
    assert library.load_state_dict(state, strict=False).missing_keys == []
    batch = task.fake_batch(4, 9)
    for row, length in enumerate((9, 4, 6, 5)):
        batch["text_ids"][row, length:], batch["text_mask"][row, length:] = 1, 0
    labels = batch["labels"]
    with torch.no_grad():
        wanted = library(input_ids=batch["text_ids"], attention_mask=batch["text_mask"], labels=labels)
        losses, _ = task(batch)
        torch.testing.assert_close(task.logits(batch), wanted.logits)
        torch.testing.assert_close(losses["glue"], wanted.loss)


def start(task: str, init_from: Path, **changes: Any) -> tuple[ClassificationTask, Any]:
    config = task_config(NOWHERE, task, checkpoint={"init_from": str(init_from)}, **changes)
    built = build_task(config)
    assert isinstance(built, ClassificationTask)
    (report,) = load_starting_weights(built, config)
    return built, report


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """A pre-trained two-tower model as a published `.ckpt`."""
    torch.manual_seed(7)
    state = plain_state_dict(build_task(task_config(NOWHERE, "pretrain")))
    torch.save({"state_dict": state}, tmp_path / "pretrained.ckpt")
    return tmp_path / "pretrained.ckpt", state


def test_towers_come_out_of_a_two_tower_checkpoint(checkpoint: tuple[Path, dict[str, Tensor]]) -> None:
    file, before = checkpoint
    for task, tower, other in (
        ("cifar", "vit_model", "text_transformer"),
        ("glue", "text_transformer", "vit_model"),
    ):
        built, report = start(task, file)
        after = plain_state_dict(built)
        own = {name for name in after if name.startswith(f"{tower}.")}
        assert own == {name for name in before if name.startswith(f"{tower}.")} == set(report.loaded)
        assert all(torch.equal(after[name], before[name]) for name in own)
        assert (
            set(report.missing) == after.keys() - own == {n for n in after if n.startswith(built.head_name)}
        )
        assert {name.split(".")[0] for name in report.unexpected} >= {other, "mlm_score", "itm_score"}
        assert len(report.unexpected) == len(before) - len(own)


def test_positions_are_resized_for_another_resolution(checkpoint: tuple[Path, dict[str, Tensor]]) -> None:
    file, before = checkpoint
    built, report = start("cifar", file, model={"vision": {"image_size": 32}})
    assert report.resized == (POSITIONS,)
    assert torch.equal(plain_state_dict(built)[POSITIONS], resize_positions(before[POSITIONS], (4, 4)))


def test_a_checkpoint_without_the_tower_is_refused(tmp_path: Path) -> None:
    torch.save(plain_state_dict(build("cifar")), tmp_path / "vision.pt")
    with pytest.raises(KeyMismatchError, match=r"missing: text_transformer\.embeddings"):
        start("glue", tmp_path / "vision.pt")


def test_only_the_own_towers_weights_are_read(tmp_path: Path) -> None:
    torch.manual_seed(5)
    sizes = task_config(NOWHERE, "glue").model.text
    roberta = RobertaForMaskedLM(roberta_config(sizes))
    roberta.save_pretrained(tmp_path / "roberta")
    vision = plain_state_dict(build("cifar"))
    clip = {
        n.removeprefix("vit_model."): torch.randn_like(t) for n, t in vision.items() if n.startswith("vit")
    }
    torch.save(
        clip | {"visual.proj": torch.zeros(16, 8), "logit_scale": torch.zeros(())}, tmp_path / "clip.pt"
    )
    towers = {
        "text": {"pretrained": str(tmp_path / "roberta")},
        "vision": {"pretrained": str(tmp_path / "clip.pt")},
    }
    for task, layout in (("cifar", "clip"), ("glue", "hf_roberta")):
        config = task_config(NOWHERE, task, model=towers)
        built = build_task(config)
        (report,) = load_starting_weights(built, config)
        assert report.layout == layout
        after = plain_state_dict(built)
        if task == "cifar":
            assert all(torch.equal(after[f"vit_model.{name}"], tensor) for name, tensor in clip.items())
        else:
            own = roberta.roberta.encoder.state_dict()
            assert all(torch.equal(after[f"text_transformer.encoder.{name}"], own[name]) for name in own)


def test_figures_of_all_samples() -> None:
    sets = {
        "train": [],
        "eval": [{"path": "glue", "splits": [f"mnli-{one}"]} for one in ("dev_matched", "dev_mismatched")],
    }
    task = build("glue", glue={"name": "mnli"}, data=sets)
    assert isinstance(task, GlueTask)
    samples = torch.tensor(
        [[0, 1, 1], [0, 2, 1], [0, 0, 0], [0, 0, 0], [1, 2, 2], [1, 0, 1]], dtype=torch.float64
    )
    figures = task.figures(samples)
    assert figures == {
        "accuracy": 0.625,  # the mean of both sets, not of the samples
        "accuracy/mnli-dev_matched": 0.75,
        "accuracy/mnli-dev_mismatched": 0.5,
    }
    assert task.score(figures) == 0.625
    paraphrases = glue("mrpc")
    assert isinstance(paraphrases, GlueTask)
    found = paraphrases.figures(samples[:2])
    assert found.keys() == {"f1", "accuracy"}
    assert paraphrases.score(found) == found["f1"]


def test_reports_of_an_evaluation() -> None:
    task = glue("stsb")
    batch = task.fake_batch(3, 5)
    batch["dataset_ids"] = torch.tensor([0, 0, 0])
    logits = torch.tensor([[1.0], [2.0], [3.5]])
    report = task.metrics(logits, batch)
    assert report.keys() == {"glue_loss", SAMPLES}
    assert report[SAMPLES][:, 1].tolist() == [1, 2, 3.5]
    assert report[SAMPLES][:, 2].tolist() == pytest.approx(batch["labels"].tolist())
    assert task.predictions(logits).tolist() == [1, 2, 3.5]
    assert "accuracy" in build("cifar").metrics(torch.zeros(2, 6), build("cifar").fake_batch(2, 0))


def test_operations_of_one_tower() -> None:
    pair = build("snli_ve").flops_per_sample(7)
    cifar, text = build("cifar").flops_per_sample(), glue("rte").flops_per_sample(7)
    assert 0 < cifar < pair
    assert 0 < text < pair
    assert glue("rte").flops_per_sample(14) > 2 * text  # attention grows with the square
