"""From a pre-trained run to every task: starting weights, training on two ranks, evaluation on any number."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mt_deepspeed.config import load_config
from mt_deepspeed.engine.launch import Place
from mt_deepspeed.export import export
from mt_deepspeed.models.state_dicts import KeyMismatchError
from mt_deepspeed.pretrained.loading import load
from mt_deepspeed.pretrained.starting_weights import check_start, load_starting_weights
from mt_deepspeed.scoring.classification import check_questions, classify, official_accuracy, vqa_answers
from mt_deepspeed.tasks import build_task
from mt_deepspeed.tasks.false_texts import FalseTextsTask
from mt_deepspeed.tasks.nlvr2 import Nlvr2Task
from mt_deepspeed.tasks.pretrain import PretrainTask
from tests.helpers.ranks import run_ranks
from tests.helpers.task_runs import ANSWERS, evaluate_run, task_config, train_run, write_task_root

RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "vqa": ("vqa", {"model": {"vision": {"image_size": 24}}}),  # position embeddings are resized
    "snli_ve": ("snli_ve", {}),
    "nlvr2": ("nlvr2", {}),
    "retrieval": ("retrieval", {}),
    "false_texts": ("retrieval", {"retrieval": {"objective": "false_texts"}}),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a pre-trained run, and a run of each task started from it."""
    folder = write_task_root(tmp_path_factory.mktemp("tasks"))
    run_ranks(2, train_everything, folder)
    return folder


def train_everything(place: Place, root: Path) -> None:
    train_run(place, task_config(root, "pretrain", root / "pretrain"))
    start = {"init_from": str(root / "pretrain")}
    for name, (task, changes) in RUNS.items():
        metrics = train_run(place, task_config(root, task, root / name, checkpoint=start, **changes))
        assert "eval/score" in metrics, name


def evaluate_everything(place: Place, root: Path) -> dict[str, Any]:
    return {name: evaluate_run(place, root / name) for name in [*RUNS, "pretrain"]}


def test_evaluation_is_the_same_on_any_number_of_ranks(root: Path) -> None:
    alone = run_ranks(1, evaluate_everything, root)[0]
    many = run_ranks(4, evaluate_everything, root)  # more ranks than NLVR2 has pairs in a batch
    assert alone["snli_ve"]["predictions"].keys() == set(range(15))
    assert alone["nlvr2"]["metrics"].keys() == {"accuracy", "accuracy/dev", "accuracy/test1", "nlvr2_loss"}
    for found in many:
        for name, wanted in alone.items():
            assert found[name].get("predictions") == wanted.get("predictions"), name
            assert found[name]["metrics"] == pytest.approx(wanted["metrics"]), name
    recalls = {f"{way}@{k}" for way in ("tr", "ir") for k in (1, 5, 10)}
    for name in ("retrieval", "false_texts", "pretrain"):
        assert alone[name]["metrics"].keys() == recalls | {"tr_mean", "ir_mean", "r_mean"}
        assert alone[name]["metrics"]["tr@10"] >= alone[name]["metrics"]["tr@1"]


def submission(place: Place, root: Path, split: str) -> tuple[dict[int, str], dict[str, float]]:
    pretrained = load(root / "vqa")
    data = dataclasses.replace(
        pretrained.config.data, eval=(dataclasses.replace(pretrained.config.data.eval[0], splits=(split,)),)
    )
    classified = classify(pretrained, dataclasses.replace(pretrained.config, data=data), place)
    return vqa_answers(pretrained, classified), classified.metrics


def test_vqa_submission_and_official_accuracy(root: Path, tmp_path: Path) -> None:
    answers, metrics = run_ranks(3, submission, root, "test")[2]
    assert "vqa_score" not in metrics  # nobody knows the answers
    assert set(answers.values()) <= set(ANSWERS)
    questions = {"questions": [{"question_id": number, "question": "?"} for number in answers]}
    (tmp_path / "questions.json").write_text(json.dumps(questions))
    check_questions(answers, tmp_path / "questions.json")
    first = min(answers)
    with pytest.raises(ValueError, match=f"1 questions without a prediction .question_id {first}"):
        check_questions({k: v for k, v in answers.items() if k != first}, tmp_path / "questions.json")

    answers, metrics = run_ranks(1, submission, root, "val")[0]
    people = [{"answer": "answer 0"}] * 10
    notes = [{"question_id": number, "answers": people, "answer_type": "other"} for number in answers]
    notes.append({"question_id": 9999, "answers": [{"answer": "unheard of"}] * 10, "answer_type": "number"})
    (tmp_path / "annotations.json").write_text(json.dumps({"annotations": notes}))
    found = official_accuracy(answers, tmp_path / "annotations.json", tuple(ANSWERS))
    right = sum(answer == "answer 0" for answer in answers.values())
    assert found["vqa_accuracy"] == pytest.approx(right / (len(answers) + 1))
    assert found["vqa_accuracy/number"] == 0
    assert 0 <= metrics["vqa_score"] <= 1


def test_what_a_task_inherits(root: Path) -> None:
    start = {"init_from": str(root / "pretrain")}
    before = load(root / "pretrain").task
    nlvr2 = task_config(root, "nlvr2", checkpoint=start)
    task = build_task(nlvr2)
    assert isinstance(task, Nlvr2Task)
    (report,) = load_starting_weights(task, nlvr2)
    table, old = task.model.token_type_embeddings.weight, before.model.token_type_embeddings.weight
    assert torch.equal(table[:2], old)
    assert torch.equal(table[2], old[1])
    assert report.resized == ("token_type_embeddings.weight",)
    assert {name.split(".")[0] for name in report.missing} == {"nlvr2_classifier"}
    assert {name.split(".")[0] for name in report.unexpected} == {"mlm_score", "itm_score"}

    larger = task_config(root, "vqa", checkpoint=start, **RUNS["vqa"][1])
    (report,) = load_starting_weights(build_task(larger), larger)
    assert report.resized == ("vit_model.visual.positional_embedding",)

    ranking = task_config(root, "retrieval", checkpoint=start, **RUNS["false_texts"][1])
    task = build_task(ranking)
    load_starting_weights(task, ranking)
    assert isinstance(task, FalseTextsTask)
    assert isinstance(before, PretrainTask)
    assert torch.equal(task.rank_output.weight[0], before.itm_score.fc.weight[1])


def test_wrong_starting_points_are_refused(root: Path, tmp_path: Path) -> None:
    def start(task: str, init_from: Path, **changes: Any) -> None:
        config = task_config(root, task, checkpoint={"init_from": str(init_from)}, **changes)
        check_start(config)
        load_starting_weights(build_task(config), config)

    with pytest.raises(ValueError, match=r"another model: model\.vision\.num_heads is 4, there 2"):
        start("vqa", root / "pretrain", model={"vision": {"num_heads": 4}})
    with pytest.raises(ValueError, match=r"model\.text\.hidden_size is 32, there 16"):
        start("vqa", root / "pretrain", model={"text": {"hidden_size": 32}})
    with pytest.raises(
        KeyMismatchError, match=r"vqa_classifier\.3\.weight: found \[6, 64\], expected \[9, 64\]"
    ):
        start("vqa", root / "vqa", classifier={"num_answers": 9})
    with pytest.raises(ValueError, match=r"token_type.* found \[3, 16\], expected \[2, 16\]"):
        start("vqa", root / "nlvr2")
    with pytest.raises(ValueError, match="no matching head"):
        start("retrieval", root / "vqa", retrieval={"objective": "false_texts"})
    with pytest.raises(ValueError, match="no such file"):
        start("vqa", tmp_path / "ManagerTower_pt_base.ckpt")

    other = write_task_root(tmp_path / "other")
    merges = (other / "tokenizer" / "vocab.json").read_text("utf-8")
    vocabulary = json.loads(merges)
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    vocabulary[tokens[40]], vocabulary[tokens[41]] = vocabulary[tokens[41]], vocabulary[tokens[40]]
    (other / "tokenizer" / "vocab.json").write_text(json.dumps(vocabulary), "utf-8")
    with pytest.raises(ValueError, match="it was trained with the tokenizer"):
        start("vqa", root / "pretrain", data={"tokenizer": str(other / "tokenizer")})


def test_every_task_is_exported(root: Path, tmp_path: Path) -> None:
    for name in RUNS:
        export(load(root / name), tmp_path / name)
        again = load(tmp_path / name)
        assert again.config.task == RUNS[name][0]
        assert again.answers == (tuple(ANSWERS) if name == "vqa" else ())
        with pytest.raises(ValueError, match=f"trained for task {RUNS[name][0]} and has no mlm_score"):
            again.fill_mask("none.png", "a <mask>")
    (tmp_path / "vqa" / "answers.json").unlink()
    with pytest.raises(ValueError, match=r"answers\.json: the model's answers cannot be read"):
        load(tmp_path / "vqa")


def test_published_and_quickstart_presets_load() -> None:
    for name, task, size in (
        ("vqav2-base", "vqa", 576),
        ("snli-ve-base", "snli_ve", 384),
        ("nlvr2-base", "nlvr2", 384),
        ("coco-retrieval-bridgetower-base", "retrieval", 384),
        ("vqav2-bridgetower-large", "vqa", 574),
        ("quickstart-nlvr2", "nlvr2", 48),
    ):
        config = load_config(name)
        assert (config.task, config.model.vision.image_size) == (task, size)
    assert load_config("vqav2-base").data.padding == "max_length"  # starts from the published file
    assert load_config("vqav2-base-scratch").checkpoint.init_from is None
