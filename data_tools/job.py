"""What is to be converted, and how."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from data_tools import TOOL_VERSION
from data_tools.dropped import ALL_ALLOWED, NOTHING_ALLOWED, Budget
from data_tools.files import hash_file
from data_tools.merge import PART
from data_tools.resize import Resize
from data_tools.shard_format import FORMAT_VERSION, SourceInfo
from data_tools.sources.base import Row

POLICIES = ("skip", "error")
_HASH_THREADS = 8


class ConversionError(ValueError):
    """A conversion that cannot go on."""


@dataclass(frozen=True)
class Job:
    """What to convert.

    Attributes:
        dataset: Name for the manifest.
        task: Key of `SCHEMAS`.
        rows: The source rows, all rows of a split together.
        raw: Raw folder; source files are named relative to it.
        annotations: Files the rows come from.
        options: Options that change the shards, for the manifest.
        policy: "skip": count rows whose pictures are refused; "error": stop at the first.
        budget: How many may be refused under "skip".
        resize: How pictures are made smaller; None: they are not.
        part: (I, N): only every N-th stretch of `ROWS_PER_SHARD` source rows, from the I-th on.
    """

    dataset: str
    task: str
    rows: Iterable[Row]
    raw: Path
    annotations: tuple[Path, ...]
    options: dict[str, Any]
    policy: str = "skip"
    budget: Budget = ALL_ALLOWED
    resize: Resize | None = None
    part: tuple[int, int] = (1, 1)

    @property
    def limit(self) -> Budget:
        """The budget under the policy."""
        return self.budget if self.policy == "skip" else NOTHING_ALLOWED

    def check(self) -> None:
        """Refuses impossible settings.

        Raises:
            ValueError: Names the setting.
        """
        if self.policy not in POLICIES:
            raise ConversionError(f"policy {self.policy!r}: expected one of {POLICIES}")
        self.budget.check()
        if self.resize is not None:
            self.resize.check()


def header_of(job: Job) -> dict[str, Any]:
    """What is being converted: equal headers mean equal shards."""
    options = dict(job.options)
    if job.resize is not None:
        options |= {"resize_short_side": job.resize.short_side, "quality": job.resize.quality}
    if job.part != (1, 1):
        options[PART] = "{}/{}".format(*job.part)
    with ThreadPoolExecutor(_HASH_THREADS) as pool:  # tars and the like are as large as the data set
        sources = list(pool.map(partial(_source_info, job.raw), job.annotations))
    return {
        "format_version": FORMAT_VERSION,
        "dataset": job.dataset,
        "task": job.task,
        "tool_version": TOOL_VERSION,
        "options": options,
        "sources": [source.__dict__ for source in sources],
    }


def _source_info(raw: Path, path: Path) -> SourceInfo:
    name = path.relative_to(raw).as_posix() if path.is_relative_to(raw) else path.name
    return SourceInfo(name, path.stat().st_size, hash_file(path))
