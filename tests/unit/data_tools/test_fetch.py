"""Whole tables: counts, lists, politeness, going on after a stop, and what `convert` makes of it."""

import contextlib
import json
import random
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_tools.cli import main
from data_tools.fetch.failures import FailureListError, read_failures
from data_tools.fetch.links import TABLES, Link
from data_tools.fetch.request import Limits
from data_tools.fetch.run import Outcome, Settings, fetch_table
from data_tools.fetch.schedule import Politeness
from data_tools.lock import folder_lock
from data_tools.shard_format import read_manifest
from data_tools.sources import AnnotationError
from tests.helpers.picture_server import PNG, PictureServer, serving

EAGER = Politeness(per_host=16, interval=0)
SETTINGS = Settings(Limits(60, 1 << 20, True), EAGER, threads=16, retries=1, backoff=0.0)
TRAIN = "Train_GCC-training.tsv"


@pytest.fixture
def server() -> Iterator[PictureServer]:
    with serving() as found:
        yield found


def links(server: PictureServer, kinds: list[str]) -> list[Link]:
    return [Link(i, server.url(f"{kind}/{i}"), f"train_image/{i}.jpg") for i, kind in enumerate(kinds)]


def fetch(raw: Path, found: list[Link], settings: Settings = SETTINGS) -> Outcome:
    return fetch_table(Path("table.tsv"), found, raw, settings)


def listed(raw: Path) -> list[tuple[int, str]]:
    return [(failure.row, failure.reason) for failure in read_failures(raw / "table.failures.jsonl")]


KINDS = {
    "ok": "",
    "mislabelled": "",
    "moved": "",
    "flaky": "",
    "404": "http_404",
    "500": "http_500",
    "html": "not_an_image",
    "empty": "empty_body",
    "cut": "cut_body",
    "cutchunk": "cut_body",
    "endless": "too_large",
    "announced": "too_large",
    "garbage": "bad_response",
    "noai": "opted_out",
    "loop": "redirect_loop",
    "chain": "too_many_redirects",
    "tofile": "bad_scheme",
}


def test_every_link_is_counted_once(tmp_path: Path, server: PictureServer) -> None:
    kinds = random.Random(0).choices(list(KINDS), k=400)
    found = links(server, kinds)
    outcome = fetch(tmp_path, found)
    expected = Counter(KINDS[kind] for kind in kinds)
    there = expected.pop("")
    assert outcome == Outcome(400, there, there, dict(expected))
    assert list(outcome.failed.values()) == sorted(outcome.failed.values(), reverse=True)
    assert listed(tmp_path) == [(i, KINDS[kind]) for i, kind in enumerate(kinds) if KINDS[kind]]
    files = {int(path.stem): path.read_bytes() for path in (tmp_path / "train_image").iterdir()}
    assert files == {i: PNG for i, kind in enumerate(kinds) if not KINDS[kind]}
    counts = json.loads((tmp_path / "table.fetch.json").read_text("utf-8"))
    assert counts == {"table": "table.tsv", "links": 400, "there": there, "failed": dict(expected)}
    asked = Counter(path.split("/")[1] for path in server.asked.elements())
    for kind in ("500", "cut", "garbage", "flaky"):  # one more try, and no more
        assert asked[kind] == 2 * kinds.count(kind), kind
    for kind in ("ok", "404", "html", "noai", "endless"):
        own = sum(
            n for path, n in server.asked.items() if path.startswith(f"/{kind}/") and "after" not in path
        )
        assert own == kinds.count(kind), kind


def test_slow_links_time_out_and_hold_up_nobody(tmp_path: Path, server: PictureServer) -> None:
    slow = Settings(Limits(0.4, 1 << 20, True), EAGER, threads=16, retries=0)
    kinds = ["silent", "drip", "dripbody", "silent"]
    assert fetch(tmp_path, links(server, kinds), slow) == Outcome(4, 0, 0, {"timeout": 4})


def test_again(tmp_path: Path, server: PictureServer) -> None:
    """Pictures stay, final failures are not asked for again, others are."""
    found = links(server, ["ok", "once", "404", "500", "html"] * 3)
    settings = Settings(SETTINGS.limits, EAGER, 4, retries=0)
    first = fetch(tmp_path, found, settings)
    assert (first.there, first.fetched) == (3, 3)
    assert first.failed == {"http_404": 6, "http_500": 3, "not_an_image": 3}
    before = server.asked.copy()
    (tmp_path / found[0].file).write_bytes(b"")  # a crash of the machine may leave an empty file
    second = fetch(tmp_path, found, settings)
    assert second == Outcome(15, 3, 1, first.failed)
    assert Counter(path.split("/")[1] for path in (server.asked - before).elements()) == {"500": 3, "ok": 1}
    assert listed(tmp_path) == [(i, r) for i, r in listed(tmp_path) if i % 5]
    third = fetch(tmp_path, found, Settings(SETTINGS.limits, EAGER, 4, retries=0, retry_all=True))
    assert (third.there, third.fetched) == (6, 3)
    assert third.failed == {"http_404": 3, "http_500": 3, "not_an_image": 3}
    changed = [
        Link(link.row, server.url("ok/new"), link.file) for link in found
    ]  # another table of that name
    assert fetch(tmp_path, changed, settings) == Outcome(15, 15, 9, {})
    assert listed(tmp_path) == []


class Stopped(Exception):
    pass


@pytest.mark.parametrize("stops", [[0], [1], [30], [30, 10], [10, 30], [59, 5, 60]])
def test_stopped_and_run_again(stops: list[int], tmp_path: Path, server: PictureServer) -> None:
    kinds = random.Random(1).choices(["ok", "404", "html"], k=60)
    found = links(server, kinds)
    settings = Settings(SETTINGS.limits, EAGER, 3, retries=0)
    for stop in stops:

        def report(done: int, _: int, at: int = stop) -> None:
            if done == at:
                raise Stopped

        def dying(at: int = stop) -> Iterator[Link]:
            if at == 0:
                raise Stopped
            yield from found

        with contextlib.suppress(Stopped):
            fetch_table(Path("table.tsv"), dying(), tmp_path, settings, report)
        for thread in threading.enumerate():  # in life they end with the process
            if thread.name == "fetch":
                thread.join(60)
        partial = tmp_path / ".table.failures.jsonl.partial"
        if partial.exists():  # the last line was cut short
            with partial.open("a") as file:
                file.write('{"row": 5')
    outcome = fetch(tmp_path, found, settings)
    assert (outcome.links, outcome.there) == (60, kinds.count("ok"))
    assert listed(tmp_path) == [(i, KINDS[kind]) for i, kind in enumerate(kinds) if KINDS[kind]]
    assert not list(tmp_path.glob(".*"))
    # What the first run has reported is not asked for again.
    asked = [n for path, n in server.asked.items() if int(path.split("/")[2]) < stops[0] - 1]
    assert all(n == 1 for n in asked)


def test_few_from_one_host_at_a_time(tmp_path: Path, server: PictureServer) -> None:
    settings = Settings(SETTINGS.limits, Politeness(3, 0), threads=12, retries=0)
    fetch(tmp_path, links(server, ["pause"] * 30), settings)
    assert server.most <= 3
    assert server.agents == {SETTINGS.limits.user_agent}


def test_cc3m_from_links_to_shards(
    tmp_path: Path, server: PictureServer, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    kinds = {
        TRAIN: ["ok", "404", "mislabelled", "html", "ok"],
        "Validation_GCC-1.1.0-Validation.tsv": ["404", "ok"],
    }
    for name, own in kinds.items():
        lines = [f"caption {i}\t{server.url(f'{kind}/{name}{i}')}" for i, kind in enumerate(own)]
        (raw / name).write_text("\n".join([*lines, ""]), "utf-8")
    command = ["fetch", "cc3m", "--raw", str(raw), "--retries", "0", "--host-interval", "0"]
    assert main(command) == 0
    assert "failed private_address: 5" in capsys.readouterr().out
    assert not server.asked
    command += ["--allow-private", "--retry-all", "--user-agent", "me"]
    assert main(command) == 0
    output = capsys.readouterr().out
    assert f"{TRAIN}: 5 links, 3 pictures, 3 fetched now" in output
    assert f"{TRAIN}: failed http_404: 1" in output
    assert f"{TRAIN}: failed not_an_image: 1" in output
    assert server.agents == {"me"}
    assert sorted(path.name for path in (raw / "train_image").iterdir()) == ["0.jpg", "2.jpg", "4.jpg"]
    out = ["--out", str(tmp_path / "out"), "--workers", "1"]
    assert main(["convert", "cc3m", "--raw", str(raw), *out]) == 0
    manifest = read_manifest(tmp_path / "out")
    assert {name: split.rows for name, split in manifest.splits.items()} == {"train": 3, "val": 1}
    assert manifest.dropped == {"missing_file": 3}


def test_sbu_and_cc12m_from_links_to_shards(tmp_path: Path, server: PictureServer) -> None:
    raw = tmp_path / "sbu"
    raw.mkdir()
    paths = ["ok/a.jpg", "404/b.jpg", "ok/c.jpg", "ok/a.jpg", "mislabelled/a.jpg", "ok/", "ok/" + "x" * 300]
    tree = {
        "image_urls": [server.url(path) for path in paths],
        "captions": [f"c{i}" for i in range(len(paths))],
    }
    (raw / "sbu-captions-all.json").write_text(json.dumps(tree), "utf-8")
    more = ["--allow-private", "--host-interval", "0"]
    assert main(["fetch", "sbu", "--raw", str(raw), *more]) == 0
    counts = json.loads((raw / "sbu-captions-all.fetch.json").read_text("utf-8"))
    failed = {"bad_url": 2, "duplicate_name": 1, "http_404": 1}
    assert counts == {"table": "sbu-captions-all.json", "links": 7, "there": 3, "failed": failed}
    assert sorted(path.name for path in (raw / "SBU").iterdir()) == ["a.jpg", "c.jpg"]
    (tmp_path / "cc12m").mkdir()
    (tmp_path / "cc12m" / "cc12m.tsv").write_text(f"{server.url('ok/1')}\ta caption\n", "utf-8")
    assert main(["fetch", "cc12m", "--raw", str(tmp_path / "cc12m"), *more]) == 0
    for name, rows in (("sbu", 4), ("cc12m", 1)):
        out = str(tmp_path / f"{name}-shards")
        assert main(["convert", name, "--raw", str(tmp_path / name), "--out", out, "--workers", "1"]) == 0
        assert read_manifest(Path(out)).splits["train"].rows == rows


def test_wrong_tables(tmp_path: Path) -> None:
    (tmp_path / TRAIN).write_text("caption only\n", "utf-8")
    for path, message in (
        (tmp_path / TRAIN, "line 1: found 1 field"),
        (tmp_path / "no.tsv", "cannot be read"),
    ):
        with pytest.raises(AnnotationError, match=message):
            list(TABLES["cc3m"][1](path))
    table = tmp_path / "sbu-captions-all.json"
    for tree in ({"image_urls": ["a", "b"], "captions": ["a"]}, {"image_urls": [1], "captions": ["a"]}):
        table.write_text(json.dumps(tree), "utf-8")
        with pytest.raises(AnnotationError):
            list(TABLES["sbu"][1](table))


def test_command_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["fetch", "cc3m", "--raw", str(tmp_path)]
    assert main(command) == 1
    assert TRAIN in capsys.readouterr().err
    (tmp_path / TRAIN).write_text("", "utf-8")
    for more in (["--workers", "0"], ["--per-host", "0"], ["--retries", "-1"], ["--max-mib", "0"]):
        assert main([*command, *more]) == 2
        assert " ".join(more[:1]) in capsys.readouterr().err
    for more in (["--timeout", "0"], ["--timeout", "nan"], ["--host-interval", "-1"]):
        assert main([*command, *more]) == 2
    with folder_lock(tmp_path):
        assert main(command) == 1
    assert "is being written by" in capsys.readouterr().err
    (tmp_path / "Train_GCC-training.failures.jsonl").write_text("{}\n", "ascii")
    assert main(command) == 1
    assert "failures.jsonl: line 1" in capsys.readouterr().err


def test_faults_of_the_machine_stop_the_run(
    tmp_path: Path, server: PictureServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        fetch(tmp_path, links(server, ["ok"] * 5))


def test_lists_that_are_something_else(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"row": 1, "url": "", "reason": "", "detail": ""}\n[]\n', "ascii")
    with pytest.raises(FailureListError, match="line 2"):
        list(read_failures(path))
