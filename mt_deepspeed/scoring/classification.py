"""Evaluation of fine-tuned classifiers on all ranks: every sample once, predictions by id."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from data_tools.sources.answers import normal_answer
from data_tools.sources.json_stream import entries
from mt_deepspeed.config import RunConfig
from mt_deepspeed.config.run import TASKS_WITH_ANSWERS
from mt_deepspeed.data.pipeline import eval_answers, eval_batches, eval_sample_ids
from mt_deepspeed.engine.agreement import together
from mt_deepspeed.engine.evaluate import Tally
from mt_deepspeed.engine.launch import Place
from mt_deepspeed.engine.precision import autocast
from mt_deepspeed.engine.runner import to_device
from mt_deepspeed.evaluation.vqa_accuracy import Asked, refuse_partial, vqa_accuracy
from mt_deepspeed.pretrained.loading import Pretrained
from mt_deepspeed.tasks.classification import ClassificationTask, eval_set_names

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Classified:
    """What a classifier made of the evaluation data; the same on all ranks."""

    metrics: dict[str, float]
    predictions: dict[int, float]
    """sample id -> class (a whole number), or score."""
    question_ids: dict[int, int]
    """VQA: sample id -> the data set's own number of the question."""


def classify(
    pretrained: Pretrained, config: RunConfig, place: Place, max_samples: int = 0, labelled: bool = False
) -> Classified:
    """Runs a classifier over `data.eval`; call on all ranks.

    Args:
        pretrained: The model, on `place.device`.
        config: Says which data and which batch size.
        place: This rank.
        max_samples: Samples, spread evenly; 0: all.
        labelled: Refuse questions without answers before anything is computed.

    Raises:
        ValueError: Shards with other answers or classes than the model's, or without any; a sample that cannot be
            read; on all ranks, also where one rank met it.
    """
    task = pretrained.task
    assert isinstance(task, ClassificationTask)
    if config.task in TASKS_WITH_ANSWERS and eval_answers(config, labelled) != list(pretrained.answers):
        raise ValueError(
            f"the answers of {config.data.eval[0].path} are not those the model was trained on; convert the data "
            "with --answers and the shards it was trained on"
        )
    tally = Tally(task)
    predictions: dict[int, float] = {}
    questions: dict[int, int] = {}
    task.eval_sets = eval_set_names(config)

    def own_share() -> None:
        for batch in eval_batches(config, place.rank, place.world_size, max_samples):
            if len(batch["sample_ids"]) == 0:
                continue
            on_device = to_device(batch, place.device)
            logits = task.logits(on_device).float()
            tally.add(task.metrics(logits, on_device))
            ids = batch["sample_ids"].tolist()
            predictions.update(zip(ids, task.predictions(logits).tolist(), strict=True))
            if "question_ids" in batch:
                questions.update(zip(ids, batch["question_ids"].tolist(), strict=True))

    with torch.no_grad(), autocast(config.train.precision, place.device):
        together(own_share, "evaluation")
    predictions = merge_by_id(predictions)
    expected = eval_sample_ids(config, max_samples).tolist()
    if sorted(predictions) != expected:
        raise AssertionError(f"{len(predictions)} samples were evaluated, {len(expected)} are there")
    return Classified(tally.reduce(place.device), predictions, merge_by_id(questions))


def merge_by_id(own: Mapping[int, T]) -> dict[int, T]:
    """The entries of all ranks in order of their ids; a collective.

    Raises:
        AssertionError: Two ranks have the same id.
    """
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, dict(own))
    merged = {number: value for part in found for number, value in part.items()}
    if len(merged) != sum(map(len, found)):
        raise AssertionError("a sample was evaluated by two ranks")
    return dict(sorted(merged.items()))


def vqa_answers(pretrained: Pretrained, classified: Classified) -> dict[int, str]:
    """question_id -> predicted answer.

    Raises:
        ValueError: A question stands in the data twice.
    """
    found: dict[int, str] = {}
    for sample, label in classified.predictions.items():
        question = classified.question_ids[sample]
        if question in found:
            raise ValueError(
                f"question_id {question} stands in the evaluation data twice; name each split once"
            )
        found[question] = pretrained.answers[int(label)]
    return found


def official_accuracy(
    predictions: Mapping[int, str], annotations: Path, answers: tuple[str, ...]
) -> dict[str, float]:
    """The official accuracy against a VQA annotation file.

    Raises:
        ValueError: The file is none, or predictions and questions do not cover each other.
    """
    return vqa_accuracy(predictions, _asked(annotations), answers, normal_answer)


def check_vqa_files(questions: Path | None, annotations: Path | None) -> None:
    """Reads the first entry of each, to tell a wrong file before anything is computed.

    Raises:
        ValueError: It cannot be read, or is another kind of file.
    """
    if questions is not None:
        next(_question_ids(questions), None)
    if annotations is not None:
        next(_asked(annotations), None)


def check_questions(predictions: Mapping[int, str], questions: Path) -> None:
    """Checks that predictions cover a VQA question file exactly.

    Raises:
        ValueError: They do not, or the file is none.
    """
    wanted = set(_question_ids(questions))
    refuse_partial(sorted(wanted - predictions.keys()), sorted(predictions.keys() - wanted))


def _question_ids(questions: Path) -> Iterator[int]:
    for where, entry in entries(questions, "questions"):
        try:
            yield int(entry["question_id"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{where}: expected question_id: {error!r}") from error


def _asked(annotations: Path) -> Iterator[Asked]:
    for where, entry in entries(annotations, "annotations"):
        try:
            people = tuple(str(one["answer"]) for one in entry["answers"])
            yield Asked(int(entry["question_id"]), people, str(entry.get("answer_type", "other")))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{where}: expected question_id, answers and answer_type: {error!r}") from error
