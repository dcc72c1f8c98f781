"""Evaluation of fine-tuned models on all ranks: every sample once, predictions by id, recall over all pairs."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from data_tools.sources.answers import normal_answer
from data_tools.sources.json_stream import entries
from mt_deepspeed.config import RunConfig
from mt_deepspeed.data.pipeline import eval_answers, eval_batches, eval_images, eval_sample_ids, eval_texts
from mt_deepspeed.engine.evaluate import reduce_report
from mt_deepspeed.engine.launch import Place
from mt_deepspeed.engine.precision import autocast
from mt_deepspeed.engine.runner import add_reports, to_device
from mt_deepspeed.evaluation.recall import recall
from mt_deepspeed.evaluation.sums import Report
from mt_deepspeed.evaluation.vqa_accuracy import Asked, refuse_partial, vqa_accuracy
from mt_deepspeed.pretrained import Pretrained
from mt_deepspeed.tasks.classification import ClassificationTask, eval_set_names
from mt_deepspeed.tasks.retrieval import match_scores

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Classified:
    """What a classifier made of the evaluation data; the same on all ranks."""

    metrics: dict[str, float]
    predictions: dict[int, int]
    """sample id -> class."""
    question_ids: dict[int, int]
    """VQA: sample id -> the data set's own number of the question."""


def classify(pretrained: Pretrained, config: RunConfig, place: Place, max_samples: int = 0) -> Classified:
    """Runs a classifier over `data.eval`; call on all ranks.

    Args:
        pretrained: The model, on `place.device`.
        config: Says which data and which batch size.
        place: This rank.
        max_samples: Samples, spread evenly; 0: all.

    Raises:
        ValueError: VQA shards with other answers than the model's.
    """
    task = pretrained.task
    assert isinstance(task, ClassificationTask)
    if config.task == "vqa" and eval_answers(config) != list(pretrained.answers):
        raise ValueError(
            f"the answers of {config.data.eval[0].path} are not those the model was trained on; convert the data "
            "with --answers and the shards it was trained on"
        )
    total: Report = {}
    predictions: dict[int, int] = {}
    questions: dict[int, int] = {}
    task.eval_sets = eval_set_names(config)
    with torch.no_grad(), autocast(config.train.precision, place.device):
        for batch in eval_batches(config, place.rank, place.world_size, max_samples):
            if len(batch["sample_ids"]) == 0:
                continue
            on_device = to_device(batch, place.device)
            logits = task.logits(on_device).float()
            add_reports(total, task.metrics(logits, on_device))
            ids = batch["sample_ids"].tolist()
            predictions |= dict(zip(ids, logits.argmax(dim=-1).tolist(), strict=True))
            if "question_ids" in batch:
                questions |= dict(zip(ids, batch["question_ids"].tolist(), strict=True))
    predictions = merge_by_id(predictions)
    expected = eval_sample_ids(config, max_samples).tolist()
    if sorted(predictions) != expected:
        raise AssertionError(f"{len(predictions)} samples were evaluated, {len(expected)} are there")
    return Classified(reduce_report(total, place.device), predictions, merge_by_id(questions))


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
        found[question] = pretrained.answers[label]
    return found


def official_accuracy(
    predictions: Mapping[int, str], annotations: Path, answers: tuple[str, ...]
) -> dict[str, float]:
    """The official accuracy against a VQA annotation file.

    Raises:
        ValueError: The file is none, or predictions and questions do not cover each other.
    """
    return vqa_accuracy(predictions, _asked(annotations), answers, normal_answer)


def check_questions(predictions: Mapping[int, str], questions: Path) -> None:
    """Checks that predictions cover a VQA question file exactly.

    Raises:
        ValueError: They do not, or the file is none.
    """
    wanted = {int(entry["question_id"]) for _, entry in entries(questions, "questions")}
    refuse_partial(sorted(wanted - predictions.keys()), sorted(predictions.keys() - wanted))


def _asked(annotations: Path) -> Iterator[Asked]:
    for where, entry in entries(annotations, "annotations"):
        try:
            people = tuple(str(one["answer"]) for one in entry["answers"])
            yield Asked(int(entry["question_id"]), people, str(entry.get("answer_type", "other")))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{where}: expected question_id, answers and answer_type: {error!r}") from error


def retrieve(pretrained: Pretrained, config: RunConfig, place: Place) -> dict[str, float]:
    """Recall over all pairs of the images and texts of `data.eval`; call on all ranks.

    Raises:
        ValueError: The model cannot match images and texts.
    """
    scores_IT, image_of_text_T = score_all_pairs(pretrained, config, place)
    return recall(scores_IT, image_of_text_T)


@torch.no_grad()
def score_all_pairs(pretrained: Pretrained, config: RunConfig, place: Place) -> tuple[Tensor, Tensor]:
    """The matching score of every image with every text, by brute force; call on all ranks.

    Each rank encodes all texts and its share of the images, and fuses I x T / ranks pairs: exact, and meant for
    small sets.

    Returns:
        Scores `[I, T]` float32 and the row of each text's image `[T]`, on the CPU, the same on all ranks.
    """
    task, model, device = pretrained.task, pretrained.task.model, place.device
    if not (hasattr(task, "itm_score") or hasattr(task, "rank_output")):
        raise ValueError(
            "this model has no matching head (itm_score or rank_output): it cannot rank texts and images"
        )
    config = dataclasses.replace(config, task="retrieval", retrieval=pretrained.config.retrieval)
    with autocast(config.train.precision, device):
        texts = []
        image_ids: list[int] = []
        for batch in eval_texts(config):
            on_device = to_device(batch, device)
            mask = on_device["text_mask"]
            texts.append((model.text_experts(model.encode_text(on_device["text_ids"], mask)), mask))
            image_ids += batch["image_ids"].tolist()
        rows: dict[int, Tensor] = {}
        for batch in eval_images(config, place.rank, place.world_size):
            if len(batch["image_ids"]) == 0:
                continue
            images = model.image_experts(model.encode_image(batch["pixels"].to(device)))
            for number, image_id in enumerate(batch["image_ids"].tolist()):
                scores = []
                for experts, mask in texts:
                    image = [expert[number : number + 1].expand(len(mask), -1, -1) for expert in images]
                    fused = model.fuse_experts(experts, image, mask, pooled_from=0)
                    scores.append(match_scores(task, fused.cls_feats))
                rows[image_id] = torch.cat(scores).float().cpu()
    merged = merge_by_id(rows)
    row_of_image = {image_id: row for row, image_id in enumerate(merged)}
    if row_of_image.keys() != set(image_ids):
        raise AssertionError(f"{len(merged)} images were scored, {len(set(image_ids))} are there")
    return torch.stack(list(merged.values())), torch.tensor([row_of_image[one] for one in image_ids])
