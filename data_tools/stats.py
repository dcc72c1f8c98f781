"""Counts of a data set, beside the published ones."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.compute as pc

from data_tools.shard_file import open_shard
from data_tools.shard_format import TEXT_COLUMNS, Manifest, SplitInfo, read_manifest
from data_tools.sources import SOURCES
from data_tools.sources.base import Published

_MAX_WORDS = 1000  # longer texts count as this long


@dataclass(frozen=True)
class SplitStats:
    """Counts of one split.

    Attributes:
        rows: Images (or rows).
        texts: Texts.
        bytes: Bytes of the shards.
        words: Quantiles 0, 0.5, 0.95 and 1 of the words of a text.
        mean_words: Mean words of a text.
        published: (images, texts) as usually counted.
    """

    rows: int
    texts: int
    bytes: int
    words: tuple[int, int, int, int]
    mean_words: float
    published: Published


def collect(folder: Path) -> tuple[Manifest, dict[str, SplitStats]]:
    """Counts every split of a data set; texts are read, pictures are not.

    Raises:
        ShardFormatError: The folder breaks the contract.
    """
    manifest = read_manifest(folder)
    published = _published(manifest)
    stats = {}
    for name, split in manifest.splits.items():
        lengths = _lengths(folder, manifest.task, split)
        stats[name] = SplitStats(
            rows=split.rows,
            texts=split.texts,
            bytes=sum(shard.bytes for shard in split.shards),
            words=_quantiles(lengths),
            mean_words=float((lengths * np.arange(len(lengths))).sum() / max(1, lengths.sum())),
            published=published.get(name, (None, None)),
        )
    return manifest, stats


def _published(manifest: Manifest) -> dict[str, Published]:
    source = SOURCES.get(manifest.dataset)
    counts: dict[str, Published] = {}
    for file in manifest.sources:
        own: Mapping[str, Published] = {}
        if source is not None:
            own = source.published.get(Path(file.file).name, {})
        counts.update(own)
    return counts


def _lengths(folder: Path, task: str, split: SplitInfo) -> np.ndarray:
    """Number of texts of each length in words: int64 [_MAX_WORDS + 1]."""
    counts = np.zeros(_MAX_WORDS + 1, np.int64)
    for shard in split.shards:
        reader = open_shard(folder / shard.file, task)
        for number in range(reader.num_record_batches):
            texts = reader.get_batch(number).column(TEXT_COLUMNS[task]).flatten()
            words = pc.list_value_length(pc.utf8_split_whitespace(texts)).to_numpy(zero_copy_only=False)
            counts += np.bincount(np.minimum(words, _MAX_WORDS), minlength=len(counts))
    return counts


def _quantiles(counts: np.ndarray) -> tuple[int, int, int, int]:
    total = int(counts.sum())
    if total == 0:
        return 0, 0, 0, 0
    places = [0, (total - 1) // 2, int((total - 1) * 0.95), total - 1]
    low, middle, high, top = np.searchsorted(np.cumsum(counts), places, side="right").tolist()
    return low, middle, high, top


def as_text(manifest: Manifest, stats: Mapping[str, SplitStats]) -> str:
    """A table for people."""
    lines = [f"{manifest.dataset} ({manifest.task}), digest {manifest.digest()[:16]}"]
    form = "{:<12} {:>12} {:>12} {:>12} {:>12} {:>9}  {}"
    lines.append(
        form.format(
            "split", "images", "published", "texts", "published", "MiB", "words: min median 95% max mean"
        )
    )
    for name, split in stats.items():
        images, texts = ("-" if number is None else number for number in split.published)
        words = " ".join(map(str, split.words)) + f" {split.mean_words:.1f}"
        size = f"{split.bytes / 2**20:.1f}"
        lines.append(form.format(name, split.rows, images, split.texts, texts, size, words))
    lines += [f"dropped {reason}: {number}" for reason, number in manifest.dropped.items()]
    return "\n".join(lines)
