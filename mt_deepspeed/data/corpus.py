"""Several data sets as one: pairs numbered through, in the order of the configuration."""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mt_deepspeed.config.run import DatasetConfig
from mt_deepspeed.data.shards import CaptionDataset, EncodedImage
from mt_deepspeed.data.shuffle import WINDOW_BLOCKS, pairs_per_block

_Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class Sample:
    """One (image, text) pair; `dataset` and `row` together name the image."""

    pair: int
    dataset: int
    row: int
    caption: str


class Corpus:
    """The data sets of a run.

    Args:
        configs: What to read.
        root: Folder that relative paths start from.
        key: Name of this list in the configuration, for messages.
        task: What the folders must hold (key of `data_tools.shard_format.SCHEMAS`).

    Raises:
        ValueError: No data set, weights on some of them only, one without pairs, or a broken folder.
    """

    def __init__(self, configs: Sequence[DatasetConfig], root: str, key: str, task: str = "caption") -> None:
        if not configs:
            raise ValueError(f"{key}: empty; name at least one data set folder")
        weights = [config.weight for config in configs if config.weight is not None]
        if weights and len(weights) != len(configs):
            raise ValueError(
                f"{key}: {len(weights)} of {len(configs)} data sets have a weight; set all or none"
            )
        self.weights = weights or None
        base = Path(root).expanduser()
        self.datasets = [
            CaptionDataset(base / Path(config.path).expanduser(), config.splits, task) for config in configs
        ]
        for dataset in self.datasets:
            if dataset.num_pairs == 0:
                raise ValueError(f"{dataset.folder}: splits {list(dataset.splits)} hold no texts")
        self.sizes = [dataset.num_pairs for dataset in self.datasets]
        self.blocks = [pairs_per_block(dataset.num_pairs, dataset.num_bytes) for dataset in self.datasets]
        self.offsets = np.concatenate([[0], np.cumsum(self.sizes, dtype=np.int64)])
        self._row_offsets = np.cumsum([0, *(dataset.num_rows for dataset in self.datasets)])

    @property
    def num_pairs(self) -> int:
        """Number of (image, caption) pairs."""
        return int(self.offsets[-1])

    @property
    def digest(self) -> str:
        """Names the content: shard hashes and splits in order; folders may move."""
        parts = [f"{dataset.digest} {' '.join(dataset.splits)}" for dataset in self.datasets]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def check(self, part: int, num_parts: int) -> None:
        """Opens this part of the shards and compares them with the manifests (see `CaptionDataset.check`)."""
        for dataset in self.datasets:
            dataset.check(part, num_parts)

    def caption_bytes(self, samples_K: _Int64) -> _Int64:
        """Length of the captions of pairs [K] in UTF-8 bytes: [K]."""
        lengths_K = np.empty(len(samples_K), dtype=np.int64)
        dataset_K = np.searchsorted(self.offsets, samples_K, side="right") - 1
        for number in np.unique(dataset_K).tolist():
            here = dataset_K == number
            lengths_K[here] = self.datasets[number].caption_bytes(samples_K[here] - self.offsets[number])
        return lengths_K

    def sample(self, index: int) -> Sample:
        """Reads pair `index`, without its image."""
        number = int(np.searchsorted(self.offsets, index, side="right")) - 1
        pair = self.datasets[number].pair(index - int(self.offsets[number]))
        return Sample(index, number, pair.row, pair.caption)

    def annotations(self, index: int) -> dict[str, Any]:
        """What belongs to the text of pair `index` (see `CaptionDataset.annotations`)."""
        number = int(np.searchsorted(self.offsets, index, side="right")) - 1
        return self.datasets[number].annotations(index - int(self.offsets[number]))

    def first_pairs(self) -> _Int64:
        """The first pair of every image that has one, in order."""
        starts = zip(self.datasets, self.offsets, strict=False)
        return np.concatenate([dataset.first_pairs() + start for dataset, start in starts])

    def image_number(self, sample: Sample) -> int:
        """Number of the sample's image among those of all data sets."""
        return int(self._row_offsets[sample.dataset]) + sample.row

    def range_of(self, index: int) -> tuple[int, int]:
        """First and last + 1 of the pairs of the data set that pair `index` belongs to."""
        number = int(np.searchsorted(self.offsets, index, side="right"))
        return int(self.offsets[number - 1]), int(self.offsets[number])

    def image(self, dataset: int, row: int, number: int = 0) -> EncodedImage:
        """The encoded image `number` in row `row` of data set number `dataset`."""
        return self.datasets[dataset].image(row, number)


class ReadAhead:
    """Has the system read blocks of the files in one go, once each while they are in use.

    Single pictures are some 100 kB; file servers and disks like larger pieces.
    """

    def __init__(self, corpus: Corpus) -> None:
        self._corpus = corpus
        self._recent: OrderedDict[int, None] = OrderedDict()

    def __call__(self, blocks_K: _Int64) -> None:
        """Announces that the blocks that begin with pairs [K] will be used."""
        for start in np.unique(blocks_K).tolist():
            if start not in self._recent:
                first, last = self._corpus.range_of(start)
                number = int(np.searchsorted(self._corpus.offsets, start, side="right")) - 1
                stop = min(start + self._corpus.blocks[number], last)
                self._corpus.datasets[number].read_ahead(start - first, stop - first)
                self._recent[start] = None
            self._recent.move_to_end(start)
        while len(self._recent) > 2 * WINDOW_BLOCKS:
            self._recent.popitem(last=False)
