"""The batches of fine-tuning tasks: what `collate.BatchMaker` makes of the texts and images, and these keys.

Letters: B samples, A answers of the vocabulary, n false texts, L tokens, S pixels per side.

| task | key | shape, type | meaning |
|---|---|---|---|
| all | dataset_ids | [B] int64 | number of the data set in the configuration's list |
| vqa | answer_scores | [B, A] float32 | score of each answer; all 0 where answers are not published |
| vqa | question_ids | [B] int64 | the data set's own number of the question |
| snli_ve | labels | [B] int64 | 0 contradiction, 1 neutral, 2 entailment |
| cifar | labels | [B] int64 | class, from 0 |
| glue | labels | [B] int64 or float32 | class, from 0; stsb: score, 0 to 5 |
| nlvr2 | labels | [B] int64 | 1: the statement is true |
| nlvr2 | pixels | [2B, 3, S, S] uint8 | the B first images, then the B second ones |
| retrieval | image_ids | [B] int64 | number of the image; texts of one image share it |
| retrieval by false texts | choice_ids, choice_mask | [B, 1 + n, L] int64 | the own text, then texts of other images |
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mt_deepspeed.config.run import TASKS_WITH_ANSWERS, RunConfig
from mt_deepspeed.data.collate import Batch, BatchMaker, Made, MicroBatch, tokens_and_mask
from mt_deepspeed.data.corpus import Corpus, Sample
from mt_deepspeed.data.keyed import Purpose, keyed_generator
from mt_deepspeed.data.shards import ShardReadError

SCHEMA_OF_TASK = {
    "pretrain": "caption",
    "vqa": "vqa",
    "snli_ve": "entailment",
    "nlvr2": "nlvr2",
    "retrieval": "caption",
    "cifar": "class",
    "glue": "glue",
}
"""The kind of shards each task reads (key of `data_tools.shard_format.SCHEMAS`)."""

GLUE_SCORE = 5
"""The highest score of STS-B."""

_CHECKED = 64  # questions looked at before training starts: a split has answers for all, or for none


@dataclass(frozen=True, kw_only=True)
class TaskBatchMaker:
    """Makes the batches of `config.task`; see the module docstring.

    Attributes:
        config: The run.
        maker: Makes pixels and texts.
        training: Samples must have labels.
    """

    config: RunConfig
    maker: BatchMaker
    training: bool

    def __call__(self, plan: MicroBatch) -> Made:
        """Reads, decodes and collates; also returns what was skipped.

        Raises:
            ShardReadError: A sample that cannot be read or has no usable label; names file and row.
        """
        batch, skipped = self.maker(plan)
        plan = replace(plan, pairs=batch["sample_ids"].numpy())  # with those that took a skipped one's place
        return batch | self._notes(plan), skipped

    def _notes(self, plan: MicroBatch) -> Batch:
        """The keys of the task."""
        corpus = self.maker.corpus
        samples = [corpus.sample(index) for index in plan.pairs.tolist()]
        batch: Batch = {}
        batch["dataset_ids"] = torch.tensor([sample.dataset for sample in samples], dtype=torch.int64)
        task = self.config.task
        if task == "retrieval":
            return batch | self._retrieval(plan, samples)
        notes = [corpus.annotations(index) for index in plan.pairs.tolist()]
        return batch | (self._answers if task == "vqa" else self._labels)(samples, notes)

    def images(self, plan: MicroBatch) -> Made:
        """The images of pairs [B] without their texts."""
        samples = [self.maker.corpus.sample(index) for index in plan.pairs.tolist()]
        size = self.maker.transform.size
        pixels = torch.empty(len(samples), 3, size, size, dtype=torch.uint8)
        for out, sample, position in zip(pixels, samples, plan.positions.tolist(), strict=True):
            generator = keyed_generator(self.maker.seed, position, Purpose.IMAGE)
            out.copy_(self.maker.picture(sample.dataset, sample.row, generator))
        return {"pixels": pixels, "image_ids": self._image_ids(samples)}, []

    def _image_ids(self, samples: Sequence[Sample]) -> Tensor:
        return torch.tensor([self.maker.corpus.image_number(one) for one in samples], dtype=torch.int64)

    def _answers(self, samples: Sequence[Sample], notes: Sequence[dict[str, Any]]) -> Batch:
        num_answers = self.config.classifier.num_answers
        scores_BA = torch.zeros(len(samples), num_answers)
        for row, (sample, note) in enumerate(zip(samples, notes, strict=True)):
            wrong = [label for label in note["labels"] if not 0 <= label < num_answers]
            if wrong or (self.training and not note["labels"]):
                found = f"label {wrong[0]}" if wrong else "no answer"
                raise ShardReadError(
                    f"{self._where(sample)}: question {note['question_ids']}: found {found}, "
                    f"expected labels from 0 to {num_answers - 1}"
                )
            scores_BA[row, note["labels"]] = torch.tensor(note["scores"], dtype=torch.float32)
        ids = torch.tensor([note["question_ids"] for note in notes], dtype=torch.int64)
        return {"answer_scores": scores_BA, "question_ids": ids}

    def _labels(self, samples: Sequence[Sample], notes: Sequence[dict[str, Any]]) -> Batch:
        highest = self._highest_label()
        for sample, note in zip(samples, notes, strict=True):
            if not 0 <= note["labels"] <= highest:
                raise ShardReadError(
                    f"{self._where(sample)}: found label {note['labels']}, expected 0 to {highest}"
                )
        scored = self.config.task == "glue" and not self.config.glue.num_classes
        kind = torch.float32 if scored else torch.int64
        return {"labels": torch.tensor([note["labels"] for note in notes], dtype=kind)}

    def _highest_label(self) -> int:
        if self.config.task == "cifar":
            return self.config.classifier.num_answers - 1
        if self.config.task == "glue":
            return self.config.glue.num_classes - 1 if self.config.glue.num_classes else GLUE_SCORE
        return {"snli_ve": 2, "nlvr2": 1}[self.config.task]

    def _retrieval(self, plan: MicroBatch, samples: Sequence[Sample]) -> Batch:
        ids = self._image_ids(samples)
        if self.config.retrieval.objective != "false_texts":
            return {"image_ids": ids}
        texts = [
            text
            for sample, position in zip(samples, plan.positions.tolist(), strict=True)
            for text in [sample.caption, *self._false_texts(sample, position)]
        ]
        tokenizer = self.maker.tokenizer
        assert tokenizer is not None
        encoded = [tokenizer.encode(text).ids for text in texts]
        length = self.maker.pad_to or max((len(one) for one in encoded), default=1)
        shape = (len(samples), 1 + self.config.retrieval.num_false_texts, length)
        choice_ids, choice_mask = tokens_and_mask(encoded, length, tokenizer.pad_id)
        return {
            "image_ids": ids,
            "choice_ids": choice_ids.view(shape),
            "choice_mask": choice_mask.view(shape),
        }

    def _false_texts(self, sample: Sample, position: int) -> list[str]:
        """Texts of other images of the same data set."""
        corpus = self.maker.corpus
        generator = keyed_generator(self.maker.seed, position, Purpose.FALSE_TEXT)
        start, stop = corpus.offsets[sample.dataset : sample.dataset + 2].tolist()
        found: list[str] = []
        while len(found) < self.config.retrieval.num_false_texts:
            other = corpus.sample(int(generator.integers(start, stop)))
            if other.row != sample.row:
                found.append(other.caption)
        return found

    def _where(self, sample: Sample) -> str:
        return self.maker.corpus.datasets[sample.dataset].where(sample.row)


def check_annotations(config: RunConfig, corpus: Corpus, key: str, training: bool) -> None:
    """Checks what can be told before the first batch about the labels of a task.

    Args:
        config: The run.
        corpus: Its training or evaluation data.
        key: Name of that list in the configuration, for messages.
        training: Labels are needed.

    Raises:
        ValueError: Other answers or classes than the configured number, or data without answers to train on.
    """
    if config.task not in TASKS_WITH_ANSWERS:
        return
    answer_vocabulary(config, corpus)
    if training and config.task == "vqa":
        for index in (
            np.linspace(0, corpus.num_pairs - 1, min(_CHECKED, corpus.num_pairs)).astype(int).tolist()
        ):
            if not corpus.annotations(index)["labels"]:
                sample = corpus.sample(index)
                raise ValueError(
                    f"{key}: {corpus.datasets[sample.dataset].folder}: a question has no answers "
                    f"({sample.caption!r:.80}); splits without published answers serve for predictions only"
                )


def answer_vocabulary(config: RunConfig, corpus: Corpus) -> list[str]:
    """The answers, or classes, that the labels of all data sets of a corpus stand for.

    Raises:
        ValueError: They differ between data sets, or their number is not the configured one.
    """
    answers: list[str] = []
    for dataset in corpus.datasets:
        own = dataset.options.get("answers")
        if not isinstance(own, list):
            raise ValueError(
                f"{dataset.folder}: the manifest names no answers (options.answers); convert it again"
            )
        if len(own) != config.classifier.num_answers:
            raise ValueError(
                f"{dataset.folder}: {len(own)} answers, classifier.num_answers is "
                f"{config.classifier.num_answers}; set it, or convert with --answers of the wanted vocabulary"
            )
        if answers and own != answers:
            first = next(i for i, (a, b) in enumerate(zip(answers, own, strict=True)) if a != b)
            raise ValueError(
                f"{dataset.folder}: answer {first} is {own[first]!r}, but {answers[first]!r} in "
                f"{corpus.datasets[0].folder}; convert both with the same --answers"
            )
        answers = own
    return answers
