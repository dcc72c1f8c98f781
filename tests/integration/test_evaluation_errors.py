"""What is wrong with an evaluation is told in one sentence, by all ranks alike."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mt_deepspeed.data.text import load_tokenizer
from mt_deepspeed.engine.launch import Place
from mt_deepspeed.evaluate import figures, parse
from mt_deepspeed.pretrained.loading import Pretrained, keep_answers, save
from mt_deepspeed.tasks import build_task
from tests.helpers.datasets import make_rows, write_dataset
from tests.helpers.ranks import run_ranks
from tests.helpers.task_datasets import entailment_rows, vqa_rows
from tests.helpers.task_runs import ANSWERS, NUM_ANSWERS, task_config, train_run, write_task_root

BROKEN = b"no picture at all"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exported models, and data with one thing wrong each."""
    folder = write_task_root(tmp_path_factory.mktemp("errors"))
    for task in ("vqa", "snli_ve", "retrieval", "pretrain"):
        config = task_config(folder, task)
        torch.manual_seed(0)
        tokenizer = load_tokenizer("tokenizer", folder, config.data.max_text_len)
        model = Pretrained(config, build_task(config), tokenizer, {}, ANSWERS if task == "vqa" else ())
        save(model, folder / f"model-{task}")
        if task == "retrieval":
            model.task.cross_modal_itc_image_head.fc.weight.data[0, 0] = float("nan")
            save(model, folder / "model-damaged")
    write_dataset(folder / "empty", {"val": []})
    others = {"answers": ["other", *ANSWERS[1:]]}
    write_dataset(folder / "other-answers", {"val": vqa_rows(3, NUM_ANSWERS)}, task="vqa", options=others)
    unknown = entailment_rows(6)
    unknown[4]["labels"] = [2, 7, 1]
    write_dataset(folder / "unknown-label", {"val": unknown}, task="entailment")
    torn = make_rows(6)
    torn[4]["image"] = BROKEN
    write_dataset(folder / "torn", {"val": torn})
    (folder / "not-a-model").mkdir()
    (folder / "questions.json").write_text('{"questions": [{"question_id": 7}]}')
    return folder


CASES: dict[str, tuple[list[str], str]] = {
    "empty split": (["model-retrieval", "empty"], r"empty: splits \['val'\] hold no texts"),
    "unknown split": (["model-retrieval", "captions", "--splits", "dev"], r"splits \['dev'\] asked for"),
    "split twice": (
        ["model-snli_ve", "snli", "--splits", "dev", "dev"],
        "split 'dev' of .* is named 2 times",
    ),
    "no model": (["not-a-model", "captions"], "found neither config.json"),
    "checkpoint of another task": (["model-vqa", "captions", "--retrieval"], "no matching head"),
    "data of another task": (["model-vqa", "captions"], "task 'caption', expected 'vqa'"),
    "no contrastive heads": (
        ["model-pretrain", "captions", "--retrieval", "--top-k", "3"],
        "no contrastive heads",
    ),
    "damaged embeddings": (
        ["model-damaged", "captions", "--top-k", "2"],
        "contrastive embeddings are not numbers",
    ),
    "other answers": (["model-vqa", "other-answers"], "are not those the model was trained on"),
    "missing answers": (
        ["model-vqa", "vqa", "--splits", "test"],
        "a question has no answers .* predictions only",
    ),
    "unknown label": (["model-snli_ve", "unknown-label"], r"unknown-label.* found label 7, expected 0 to 2"),
    "no annotations": (["model-vqa", "vqa", "--annotations", "nowhere.json"], "nowhere.json: cannot be read"),
    "questions for annotations": (
        ["model-vqa", "vqa", "--annotations", "{root}/questions.json"],
        "field 'annotations' is missing",
    ),
    "a part against all questions": (
        ["model-vqa", "vqa", "--questions", "{root}/questions.json", "--max-samples", "2"],
        "--max-samples: has no meaning .* with --annotations or --questions",
    ),
    "a part of all pairs": (
        ["model-retrieval", "captions", "--max-samples", "2"],
        "--max-samples: has no meaning",
    ),
    "words of another task": (
        ["model-vqa", "vqa", "--visual-words", "nowhere.json"],
        "--visual-words: has no meaning for a model of task vqa",
    ),
    "a folder for a file": (["model-vqa", "vqa", "--out", "{root}"], "cannot be written: a folder"),
    "below a file": (
        ["model-vqa", "vqa", "--predictions", "{root}/questions.json/p.json"],
        "cannot be written",
    ),
    "broken image": (["model-retrieval", "torn"], r"torn.*val-00000\.arrow.* row"),
}


def attempts(place: Place, root: Path) -> dict[str, str]:
    found = {}
    for name, ((model, shards, *rest), _) in CASES.items():
        more = [one.format(root=root) for one in rest]
        arguments = ["--checkpoint", str(root / model), "--shards", str(root / shards), *more]
        with pytest.raises(ValueError, match=r"\S") as caught:
            figures(place, parse([*arguments, "--batch-size", "2"]))
        found[name] = str(caught.value)
    return found


@pytest.fixture(scope="module")
def messages(root: Path) -> list[dict[str, str]]:
    return run_ranks(2, attempts, root)


@pytest.mark.parametrize("name", CASES)
def test_one_clear_error_on_all_ranks(messages: list[dict[str, str]], name: str) -> None:
    assert messages[0][name] == messages[1][name]
    with pytest.raises(ValueError, match=CASES[name][1]):
        raise ValueError(messages[0][name])
    assert "\n" not in messages[0][name]


def test_a_tokenizer_of_another_size(root: Path, tmp_path: Path) -> None:
    """An exported model brings its own; a run names one, whose file may have been replaced."""
    config = task_config(root, "vqa", model={"text": {"vocab_size": 40}})
    tokenizer = load_tokenizer("tokenizer", root, config.data.max_text_len)
    save(Pretrained(config, build_task(config), tokenizer, {}, ANSWERS), tmp_path / "model")
    keep_answers(tmp_path / "model", ANSWERS)
    (found,) = run_ranks(1, wrong_tokenizer, root, tmp_path / "model")
    assert "tokens, model.text.vocab_size is 40" in found


def wrong_tokenizer(place: Place, root: Path, model: Path) -> Any:
    with pytest.raises(ValueError, match=r"\S") as caught:
        figures(place, parse(["--checkpoint", str(model), "--shards", str(root / "vqa")]))
    return str(caught.value)


def test_other_splits_and_an_incomplete_submission(root: Path, tmp_path: Path) -> None:
    """Without `--shards` the splits are of the run's own data; what covers not all questions is kept aside."""
    message, questions = run_ranks(2, split_without_shards, root, tmp_path)[0]
    assert questions["val"].isdisjoint(questions["test"])
    assert len(questions["test"]) > 0
    assert "questions without a prediction" in message
    assert str(tmp_path / "wrong.json.unchecked") in message
    kept = json.loads((tmp_path / "wrong.json.unchecked").read_text())
    assert {one["question_id"] for one in kept} == questions["val"]
    assert not (tmp_path / "wrong.json").exists()
    assert not (tmp_path / "test.json.unchecked").exists()


def split_without_shards(place: Place, root: Path, folder: Path) -> tuple[str, dict[str, set[int]]]:
    train_run(place, task_config(root, "vqa", folder / "run"))
    model, found = ["--checkpoint", str(folder / "run")], {}
    for split in ("val", "test"):
        figures(place, parse([*model, "--splits", split, "--predictions", str(folder / f"{split}.json")]))
        torch.distributed.barrier()  # the first rank writes
        found[split] = {one["question_id"] for one in json.loads((folder / f"{split}.json").read_text())}
    wrong = ["--predictions", str(folder / "wrong.json"), "--questions", str(root / "questions.json")]
    with pytest.raises(ValueError, match=r"\S") as caught:
        figures(place, parse([*model, *wrong]))
    return str(caught.value), found


@pytest.mark.parametrize(("flag", "value"), [("--batch-size", "0"), ("--max-samples", "-1")])
def test_numbers_that_cannot_be(flag: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--checkpoint", "model", flag, value])
    assert f"{flag} {value}: expected at least" in capsys.readouterr().err
