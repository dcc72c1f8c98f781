"""Fetches the links of a table: what is there stays, what failed for good is not asked for again."""

import errno
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from data_tools.fetch.failures import Failure, FailureList
from data_tools.fetch.links import Link
from data_tools.fetch.request import TRANSIENT, FetchError, Limits, download, host_of
from data_tools.fetch.schedule import Politeness, run_in_order
from data_tools.files import write_atomically
from data_tools.options import BadOption

_MAX_WAIT = 60.0  # seconds between two tries, whatever a server asks for

Report = Callable[[int, int], None]
"""Told (links done, failed so far)."""


@dataclass(frozen=True)
class Settings:
    """How a table is fetched.

    Attributes:
        limits: Of one request.
        politeness: Towards a host.
        threads: Downloads at a time.
        retries: Further tries after a failure that may pass.
        backoff: Seconds before the first of them; twice as many before each further one.
        retry_all: Whether links that failed for good before are tried again.
    """

    limits: Limits = field(default_factory=Limits)
    politeness: Politeness = field(default_factory=Politeness)
    threads: int = 64
    retries: int = 2
    backoff: float = 1.0
    retry_all: bool = False

    def check(self) -> None:
        """Refuses impossible settings.

        Raises:
            ValueError: Names the setting.
        """
        self.politeness.check()
        for option, value, least in (
            ("--workers", self.threads, 1),
            ("--retries", self.retries, 0),
            ("--max-mib", self.limits.max_bytes, 1),
        ):
            if value < least:
                raise BadOption(f"{option} {value}: expected at least {least}")
        if not 0 < self.limits.timeout < float("inf"):
            raise BadOption(f"--timeout {self.limits.timeout}: expected seconds, more than 0")


@dataclass(frozen=True)
class Outcome:
    """What became of the links of a table.

    Attributes:
        links: Links in all.
        there: Pictures that are there now.
        fetched: Those of them that this run fetched.
        failed: Reason -> links, most frequent first.
    """

    links: int
    there: int
    fetched: int
    failed: dict[str, int]


def fetch_table(
    table: Path, links: Iterable[Link], raw: Path, settings: Settings, report: Report | None = None
) -> Outcome:
    """Fetches the pictures of a table into `raw`.

    Writes `<table>.failures.jsonl` (a line for each link that failed) and `<table>.fetch.json` (counts) into
    `raw`, named after the table's file without its suffix.

    Raises:
        ValueError: Impossible settings, or a list of failures that cannot be read.
        AnnotationError: From the table.
        OSError: A fault of this machine, such as a full disk.
    """
    settings.check()
    failures = FailureList(raw / f"{table.stem}.failures.jsonl")
    number = there = fetched = 0
    failed: Counter[str] = Counter()

    def work(task: tuple[Link, Failure | None]) -> Failure | None:
        link, known = task
        return known or _fetch(link, raw, settings)

    try:
        tasks = _tasks(links, raw, failures, settings)
        results = run_in_order(tasks, work, settings.threads, settings.politeness)
        for _, failure in results:
            number += 1
            if failure is None or failure is _THERE:
                there += 1
                fetched += failure is None
            else:
                failures.add(failure)
                failed[failure.reason] += 1
            if report is not None:
                report(number, sum(failed.values()))
        failures.finish()
    finally:
        failures.close()
    outcome = Outcome(number, there, fetched, dict(failed.most_common()))
    counts = {"table": table.name, "links": number, "there": there, "failed": outcome.failed}
    text = json.dumps(counts, indent=1, sort_keys=True) + "\n"
    write_atomically(raw / f"{table.stem}.fetch.json", text.encode("ascii"))
    return outcome


_THERE = Failure(-1, "", "", "")  # stands for a picture that need not be fetched


def _tasks(
    links: Iterable[Link], raw: Path, failures: FailureList, settings: Settings
) -> Iterator[tuple[str, tuple[Link, Failure | None]]]:
    """(host, (link, what is known of it already)); known ones need no host."""
    for link in links:
        before = failures.before(link.row, link.url)
        if link.fault:
            known: Failure | None = Failure(link.row, link.url, link.fault, "")
        elif _size(raw / link.file):
            known = _THERE
        elif before is not None and before.reason not in TRANSIENT and not settings.retry_all:
            known = before
        else:
            known = None
        yield "" if known is not None else host_of(link.url), (link, known)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _fetch(link: Link, raw: Path, settings: Settings) -> Failure | None:
    """Fetches one picture; returns why it failed, None if it did not. Runs in a thread."""
    for attempt in range(settings.retries + 1):
        try:
            data = download(link.url, settings.limits)
            break
        except FetchError as error:
            if error.reason not in TRANSIENT or attempt == settings.retries:
                return Failure(link.row, link.url, error.reason, error.detail)
            time.sleep(min(_MAX_WAIT, max(error.wait, settings.backoff * 2**attempt)))
    path = raw / link.file
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{link.row}.tmp")  # a link that stands in two rows is fetched by two threads
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno in (errno.EINVAL, errno.EILSEQ, errno.ENAMETOOLONG):  # no file can have such a name
            return Failure(link.row, link.url, "bad_url", str(error))
        raise
    return None
