"""Streams of batches: the endless training stream of one rank, and one pass of evaluation.

    plan (order.py)  ->  read, decode, tokenise, mask, collate (collate.py)  ->  pin  ->  steps
    stream position      `num_workers` threads or processes, in order            CUDA only

A plan follows from the position alone and a batch from its plan alone, so the stream has no state to save: to
resume is to start at another step, with any number of ranks and workers.
"""

import itertools
import signal
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset
from torchdata.nodes import BaseNode, IterableWrapper, ParallelMapper, PinMemory

from mt_deepspeed.config.run import TASKS_WITH_ANSWERS, DataConfig, DatasetConfig, RunConfig
from mt_deepspeed.data.collate import Batch, BatchMaker, Made, MicroBatch, Negatives
from mt_deepspeed.data.corpus import Corpus, ReadAhead
from mt_deepspeed.data.keyed import Purpose, keyed_bits
from mt_deepspeed.data.order import SampleOrder, evaluated_pairs, micro_batches
from mt_deepspeed.data.skipped import SkippedList
from mt_deepspeed.data.task_batches import (
    SCHEMA_OF_TASK,
    TaskBatchMaker,
    answer_vocabulary,
    check_annotations,
)
from mt_deepspeed.data.text import load_tokenizer
from mt_deepspeed.data.transforms import ImageTransform

Maker = Callable[[MicroBatch], Made]
_Int64 = NDArray[np.int64]

EVALUATION_SEED = 0
"""Masks and negatives of evaluation are the same in every run, whatever its seed."""


class TrainStream:
    """The training samples of one rank, from any step on, for ever.

    A step consumes `global_batch_size` positions of the stream, whose order is that of `order.SampleOrder`.

    Args:
        config: The run; `data`, `objectives`, `train` and the sizes in `model` are read.
        rank: This rank.
        world_size: Number of ranks.

    Raises:
        ValueError: Data, tokenizer and configuration do not fit together; everything that can be told before
            training starts is told here, for the evaluation data too.
    """

    def __init__(self, config: RunConfig, rank: int, world_size: int) -> None:
        train = config.train
        if train.global_batch_size % (train.micro_batch_size * world_size):
            raise ValueError(
                f"train.global_batch_size {train.global_batch_size} is no multiple of train.micro_batch_size "
                f"{train.micro_batch_size} x {world_size} ranks"
            )
        self._corpus, self._maker = prepare(config, rank, world_size, training=True)
        if config.data.eval:
            prepare(config, rank, world_size, training=False)
        if self._corpus.num_pairs < train.global_batch_size:
            raise ValueError(
                f"data.train holds {self._corpus.num_pairs} pairs, fewer than train.global_batch_size "
                f"{train.global_batch_size}; lower it or add data"
            )
        self._config, self._rank, self._world_size = config, rank, world_size
        corpus = self._corpus
        self._order = SampleOrder(corpus.sizes, corpus.blocks, corpus.weights, corpus.digest, train.seed)
        listed = Path(config.run_dir) / f"skipped-rank{rank:05d}.jsonl"
        self._skipped = SkippedList(listed, config.data.max_skipped_share)
        self._running: list[Generator[list[Batch], None, None]] = []

    @property
    def num_pairs(self) -> int:
        """(image, caption) pairs in the training data: one epoch, without weights."""
        return self._corpus.num_pairs

    @property
    def answers(self) -> list[str]:
        """The answers, or classes, that labels stand for; empty for tasks whose shards do not name them."""
        named = self._config.task in TASKS_WITH_ANSWERS
        return answer_vocabulary(self._config, self._corpus) if named else []

    @property
    def identity(self) -> dict[str, Any]:
        """What the sample order follows from: a run continues only on a stream of the same identity."""
        return {
            "data": self._corpus.digest,
            "weights": self._corpus.weights,
            "seed": self._config.train.seed,
        }

    @property
    def counters(self) -> dict[str, float]:
        """What this rank has met since it started."""
        skips = self._config.data.on_bad_sample == "skip"
        return {"data/skipped_samples": float(self._skipped.num_skipped)} if skips else {}

    def steps(self, first_step: int) -> Iterator[list[Batch]]:
        """Yields this rank's micro-batches, one per accumulation step, of every step from `first_step` on.

        Raises:
            ShardReadError: A sample cannot be read, or too many cannot; names file, row and reason.
        """
        running = self._steps(first_step)
        self._running.append(running)
        return running

    def close(self) -> None:
        """Stops the workers of all streams begun with `steps`."""
        for running in self._running:
            running.close()
        self._running.clear()

    def plan(self, step: int) -> list[MicroBatch]:
        """This rank's micro-batches of one optimizer step."""
        train = self._config.train
        positions_G = np.arange(step * train.global_batch_size, (step + 1) * train.global_batch_size)
        found = self._order.locate(positions_G).found
        offsets_G = self._corpus.offsets[found.dataset]
        pairs_G, others_G = offsets_G + found.index, offsets_G + found.neighbour
        # Retrieval contrasts the texts of a micro-batch: their length should tell nothing. CIFAR's are its classes.
        by_length = self._config.data.padding == "longest" and self._config.task not in ("retrieval", "cifar")
        dealt = micro_batches(
            found.depth,
            self._corpus.caption_bytes(pairs_G) if by_length else None,
            train.micro_batch_size,
            self._rank,
            self._world_size,
        )
        starts_G = offsets_G + found.start
        return [MicroBatch(positions_G[own], pairs_G[own], others_G[own], starts_G[own]) for own in dealt]

    def _plans(self, first_step: int) -> Iterator[MicroBatch]:
        """The plans of all steps; what a step reads is announced to the system a step before."""
        read_ahead = ReadAhead(self._corpus)
        coming = self.plan(first_step)
        for step in itertools.count(first_step + 1):
            now, coming = coming, self.plan(step)
            read_ahead(np.concatenate([plan.blocks for plan in coming]))
            yield from now

    def _steps(self, first_step: int) -> Generator[list[Batch], None, None]:
        batches = produce(self._plans(first_step), self._maker, self._config.data)
        accumulation = self._config.train.global_batch_size // (
            self._config.train.micro_batch_size * self._world_size
        )
        try:
            while True:
                made = list(itertools.islice(batches, accumulation))
                for batch, skipped in made:
                    self._skipped.add(len(batch["sample_ids"]), skipped)
                yield [batch for batch, _ in made]
        finally:
            batches.close()


def eval_batches(
    config: RunConfig, rank: int, world_size: int, max_samples: int | None = None
) -> Iterator[Batch]:
    """One pass over the evaluation data: every pair once over all ranks, in order, the same in every run.

    All ranks yield the same number of batches of at most `train.micro_batch_size`; the last may be shorter on
    some ranks, or empty (B = 0). Negatives are drawn from the data set whatever `objectives.itm_negatives`
    says, so that the figures do not depend on batch size and number of ranks.

    Args:
        config: The run; `data.eval` is read.
        rank: This rank.
        world_size: Number of ranks.
        max_samples: Pairs, spread evenly over the data; 0: all; None: `train.eval_max_samples`.

    Raises:
        ValueError: Data, tokenizer and configuration do not fit together.
        ShardReadError: A sample cannot be read (while iterating).
    """
    corpus, maker = prepare(config, rank, world_size, training=False)
    if max_samples is None:
        max_samples = config.train.eval_max_samples
    count = min(max_samples or corpus.num_pairs, corpus.num_pairs)
    rounds = range(0, count, config.train.micro_batch_size * world_size)
    plans = (
        _eval_plan(corpus, count, np.array_split(np.arange(i, min(i + rounds.step, count)), world_size)[rank])
        for i in rounds
    )
    return (batch for batch, _ in produce(plans, maker, config.data))


def eval_sample_ids(config: RunConfig, max_samples: int = 0) -> NDArray[np.int64]:
    """The pairs that `eval_batches` yields over all ranks, in ascending order."""
    num_pairs = _eval_corpus(config).num_pairs
    count = min(max_samples or num_pairs, num_pairs)
    return evaluated_pairs(np.arange(count), num_pairs, count, EVALUATION_SEED)


def eval_answers(config: RunConfig, labelled: bool) -> list[str]:
    """The answers, or classes, that the labels of evaluation data stand for.

    Raises:
        ValueError: Data sets differ in them; a question without answers, where `labelled` asks for some.
    """
    corpus = _eval_corpus(config)
    check_annotations(config, corpus, "data.eval", training=labelled)
    return answer_vocabulary(config, corpus)


def _eval_corpus(config: RunConfig) -> Corpus:
    return Corpus(config.data.eval, config.data.root, "data.eval", SCHEMA_OF_TASK[config.task])


def _eval_plan(corpus: Corpus, count: int, positions_B: _Int64) -> MicroBatch:
    """Positions of an evaluation of `count` pairs, one from each equal stretch; false images from the data set."""
    pairs_B = evaluated_pairs(positions_B, corpus.num_pairs, count, EVALUATION_SEED)
    dataset_B = np.searchsorted(corpus.offsets, pairs_B, side="right") - 1
    bits_B = keyed_bits(EVALUATION_SEED, positions_B, Purpose.NEGATIVE)
    drawn_B = (bits_B % np.asarray(corpus.sizes, np.uint64)[dataset_B]).astype(np.int64)
    return MicroBatch(positions_B, pairs_B, corpus.offsets[dataset_B] + drawn_B, pairs_B)


def prepare(config: RunConfig, rank: int, world_size: int, training: bool) -> tuple[Corpus, Maker]:
    """Opens the data and checks that data, tokenizer and configuration fit together."""
    data, objectives, pretraining = config.data, config.objectives, config.task == "pretrain"
    key = "data.train" if training else "data.eval"
    corpus = Corpus(data.train if training else data.eval, data.root, key, SCHEMA_OF_TASK[config.task])
    if corpus.weights and not training:
        raise ValueError("data.eval: weights have no meaning in evaluation; every pair is taken once")
    if not training:
        _refuse_repeats(data.eval)
    tokenizer = None
    if config.reads_texts:
        tokenizer = load_tokenizer(data.tokenizer, data.root, data.max_text_len)
        _check_text(config, tokenizer.vocab_size, tokenizer.pad_id)
    negatives: Negatives | None = objectives.itm_negatives if training and pretraining else "dataset"
    if not _has_random_matching(config):
        negatives = None
    elif negatives == "in_batch" and config.train.micro_batch_size < 2:
        raise ValueError("objectives.itm_negatives in_batch needs train.micro_batch_size >= 2")
    elif negatives == "dataset" and min(dataset.num_rows for dataset in corpus.datasets) < 2:
        raise ValueError("ITM needs at least two images in every data set to draw negatives from")
    if config.task == "retrieval" and config.retrieval.objective == "false_texts":
        for dataset in corpus.datasets:
            if len(dataset.first_pairs()) < 2:
                raise ValueError(
                    f"{key}: {dataset.folder}: false texts are drawn from other images of a data set, and fewer than "
                    "two have a text here"
                )
    corpus.check(rank, world_size)
    name = data.train_transform if training else data.eval_transform
    padded = data.padding == "max_length" or (config.task == "retrieval" and world_size > 1)
    maker = BatchMaker(
        corpus=corpus,
        tokenizer=tokenizer,
        transform=ImageTransform(name, config.model.vision.image_size, train=training),
        seed=config.train.seed if training else EVALUATION_SEED,
        pad_to=data.max_text_len if padded else None,  # ranks that exchange texts need one length
        mlm_probability=objectives.mlm_probability if pretraining and objectives.mlm_weight > 0 else None,
        whole_words=objectives.whole_word_masking,
        negatives=negatives,
        num_images={"nlvr2": 2, "glue": 0}.get(config.task, 1),
        skip_bad=training and data.on_bad_sample == "skip",
        second_text="second_sentences" if config.task == "glue" else None,
    )
    if pretraining:
        return corpus, maker
    check_annotations(config, corpus, key, training)
    return corpus, TaskBatchMaker(config=config, maker=maker, training=training)


def _refuse_repeats(datasets: Sequence[DatasetConfig]) -> None:
    """Evaluation takes every sample once."""
    named = Counter((dataset.path, split) for dataset in datasets for split in dataset.splits)
    for (path, split), count in named.items():
        if count > 1:
            raise ValueError(f"data.eval: split {split!r} of {path} is named {count} times; name it once")


def _has_random_matching(config: RunConfig) -> bool:
    """Whether texts are matched with randomly drawn images."""
    if config.task == "pretrain":
        return config.objectives.itm_weight > 0
    return config.task == "retrieval" and config.retrieval.objective == "false_texts"


def _check_text(config: RunConfig, vocab_size: int, pad_id: int) -> None:
    data, text = config.data, config.model.text
    if vocab_size != text.vocab_size:
        raise ValueError(
            f"tokenizer {data.tokenizer} has {vocab_size} tokens, model.text.vocab_size is {text.vocab_size}"
        )
    if pad_id != text.pad_token_id:
        raise ValueError(
            f"tokenizer {data.tokenizer} pads with {pad_id}, model.text.pad_token_id is {text.pad_token_id}"
        )
    longest = text.max_positions - pad_id - 1  # RoBERTa's positions start after the padding row
    if not 3 <= data.max_text_len <= longest:
        raise ValueError(f"data.max_text_len {data.max_text_len}: choose 3 to {longest} for this model")


class _Maker(Dataset["Made | ValueError"]):
    """What the workers run; for `DataLoader` a map-style view whose key is the plan itself.

    An error comes back as a value: raised in a worker, it would arrive with the worker's traceback in its message.
    """

    def __init__(self, maker: Maker) -> None:
        self._maker = maker

    def __call__(self, plan: MicroBatch) -> Made | ValueError:
        try:
            return self._maker(plan)
        except ValueError as error:
            return error

    def __getitem__(self, plan: MicroBatch) -> Made | ValueError:
        return self(plan)


def _ignore_stop_signals(worker: int) -> None:
    """Schedulers signal whole process groups; the trainer stops its workers when it has saved."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def produce(plans: Iterator[MicroBatch], maker: Maker, data: DataConfig) -> Generator[Made, None, None]:
    """Makes the batches of `plans`, in order, by the workers the configuration asks for.

    Threads do well because decoding, resizing and tokenising run outside the interpreter's lock. Processes go
    through `DataLoader`, which notices a worker that dies and ends workers whose trainer has died; they start
    from a fork server, since forking a process with CUDA, NCCL or OpenMP threads is not safe.
    """
    cuda = torch.cuda.is_available()
    made: Iterable[Made | ValueError]
    if data.num_workers > 0 and data.worker_kind == "process":
        made = DataLoader(
            _Maker(maker),
            batch_size=None,
            sampler=plans,
            num_workers=data.num_workers,
            multiprocessing_context="forkserver",
            pin_memory=cuda,
            worker_init_fn=_ignore_stop_signals,
        )
    else:
        node: BaseNode[Made | ValueError] = ParallelMapper(
            IterableWrapper(plans), _Maker(maker), data.num_workers
        )
        made = PinMemory(node) if cuda else node
    for one in made:
        if isinstance(one, ValueError):
            raise one
        yield one
