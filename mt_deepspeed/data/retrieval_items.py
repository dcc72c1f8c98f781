"""The images and texts of the evaluation data, each once, for retrieval."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mt_deepspeed.config.run import RetrievalConfig, RunConfig
from mt_deepspeed.data.collate import MicroBatch
from mt_deepspeed.data.pipeline import prepare, produce
from mt_deepspeed.data.task_batches import TaskBatchMaker


class RetrievalItems:
    """What `data.eval` holds; images and texts are numbered in its order.

    Attributes:
        tokens: Token ids of each text, special ones included, without padding.
        image_of_text: `[T]` int64, number of each text's image.

    Args:
        config: The run; `data.eval`, the tokenizer and the image transform are read.
        rank: This rank, which checks its part of the files.
        world_size: Number of ranks.

    Raises:
        ValueError: Data, tokenizer and configuration do not fit together; a split is named twice.
    """

    def __init__(self, config: RunConfig, rank: int, world_size: int) -> None:
        # False texts and negatives are a matter of training: here every item is met once.
        config = replace(config, task="retrieval", retrieval=RetrievalConfig())
        self._config = config
        self._corpus, maker = prepare(config, rank, world_size, training=False)
        assert isinstance(maker, TaskBatchMaker)
        tokenizer = maker.maker.tokenizer
        assert tokenizer is not None
        self._maker, self._tokenizer = maker, tokenizer
        self._first_pairs = self._corpus.first_pairs()
        samples = [self._corpus.sample(index) for index in range(self._corpus.num_pairs)]
        self.tokens: list[NDArray[np.int64]] = [tokenizer.encode(sample.caption).ids for sample in samples]
        numbers = np.array([self._corpus.image_number(sample) for sample in samples])
        # Images without a text have a number too, but take no part.
        self.image_of_text = torch.from_numpy(np.searchsorted(np.unique(numbers), numbers))

    @property
    def num_images(self) -> int:
        """Images that have a text."""
        return len(self._first_pairs)

    @property
    def num_texts(self) -> int:
        """Texts, equal ones counted apart."""
        return len(self.tokens)

    @property
    def pad_id(self) -> int:
        """Token id of padding."""
        return self._tokenizer.pad_id

    @property
    def digest(self) -> str:
        """Names images and texts."""
        return self._corpus.digest

    def pixels(self, batches: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        """Pixels `[B, 3, S, S]` uint8 of each batch of images.

        Raises:
            ShardReadError: An image cannot be read; names file and row.
        """
        chosen = (self._first_pairs[np.asarray(batch)] for batch in batches)
        plans = (MicroBatch(pairs, pairs, pairs, pairs) for pairs in chosen)
        for batch, _ in produce(plans, self._maker.images, self._config.data):
            yield batch["pixels"]
