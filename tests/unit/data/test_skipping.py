"""Samples that cannot be read: an error by default; skipped only when told, and then said, counted, listed."""

import dataclasses
import itertools
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from mt_deepspeed.config.run import DatasetConfig, RunConfig
from mt_deepspeed.data import skipped
from mt_deepspeed.data.collate import Batch
from mt_deepspeed.data.pipeline import TrainStream, eval_batches
from mt_deepspeed.data.shards import CaptionDataset, ShardReadError
from tests.helpers.datasets import configuration, make_rows, write_dataset
from tests.helpers.task_datasets import nlvr2_rows
from tests.helpers.task_runs import task_config, write_task_root

BAD_ROWS = (3, 17, 29)
STEPS = 12


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 images, three of them cut short."""
    rows = make_rows(30)
    for row in BAD_ROWS:
        rows[row]["image"] = rows[row]["image"][:-60]
    return write_dataset(tmp_path_factory.mktemp("damaged") / "set", {"train": rows})


def skipping(root: Path, damaged: Path, run_dir: Path, **changes: Any) -> RunConfig:
    data = {"train": (DatasetConfig(path=str(damaged)),), "eval": ()}
    changes = {"on_bad_sample": "skip", "max_skipped_share": 1.0, **data, **changes}
    return dataclasses.replace(configuration(root, **changes), run_dir=str(run_dir))


def taken(
    config: RunConfig, rank: int = 0, world_size: int = 1, first: int = 0
) -> tuple[list[Batch], TrainStream]:
    stream = TrainStream(config, rank, world_size)
    batches = list(itertools.chain(*itertools.islice(stream.steps(first), STEPS)))
    stream.close()
    return batches, stream


def listed(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in run_dir.glob("skipped-*") for line in path.read_text().splitlines()]


@pytest.mark.parametrize("negatives", ["dataset", "in_batch"])
def test_skipped_samples_are_replaced_said_counted_and_listed(
    root: Path, damaged: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, negatives: str
) -> None:
    with caplog.at_level(logging.WARNING):
        batches, stream = taken(skipping(root, damaged, tmp_path, itm_negatives=negatives))
    dataset = CaptionDataset(damaged, ["train"])
    shown = [dataset.pair(pair).row for batch in batches for pair in batch["sample_ids"].tolist()]
    assert len(shown) == STEPS * 8
    assert not set(shown) & set(BAD_ROWS)
    records = listed(tmp_path)
    assert len(records) > 5
    assert stream.counters == {"data/skipped_samples": len(records)}
    assert len(caplog.records) == len(records)
    for record, said in zip(records, caplog.messages, strict=True):
        assert dataset.pair(record["instead"]).row not in BAD_ROWS
        assert "cannot decode" in record["fault"]
        assert record["fault"] in said
        row = int(record["fault"].split("picture-0-")[1].split(".")[0])
        assert row in BAD_ROWS


def test_ranks_workers_and_restarts_skip_alike(root: Path, damaged: Path, tmp_path: Path) -> None:
    def made(name: str, ranks: int = 1, first: int = 0, **changes: Any) -> list[Batch]:
        config = skipping(root, damaged, tmp_path / name, **changes)
        found = [taken(config, rank, ranks, first)[0] for rank in range(ranks)]
        share = 4 // ranks
        steps = [[b for part in found for b in part[s * share : (s + 1) * share]] for s in range(STEPS)]
        return list(itertools.chain(*steps))

    alone = made("alone")
    records = sorted(listed(tmp_path / "alone"), key=lambda record: record["position"])
    others = {
        "two": made("two", ranks=2),
        "threads": made("threads", num_workers=2),
        "later": [*alone[:20], *made("later", first=5)],
    }
    for name, batches in others.items():
        for one, other in zip(alone, batches, strict=False):
            assert all(torch.equal(one[key], other[key]) for key in one), name
        if name != "later":
            assert sorted(listed(tmp_path / name), key=lambda record: record["position"]) == records


def test_worker_processes_tell_what_they_skip(root: Path, damaged: Path, tmp_path: Path) -> None:
    config = skipping(root, damaged, tmp_path, num_workers=1, worker_kind="process")
    assert taken(config)[1].counters["data/skipped_samples"] == len(listed(tmp_path)) > 5


def test_too_many_end_the_run(
    root: Path, damaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(skipped, "JUDGED_FROM", 50)
    with pytest.raises(ShardReadError, match=r"more than data\.max_skipped_share 0\.04 .*picture-0-"):
        taken(skipping(root, damaged, tmp_path, max_skipped_share=0.04))
    assert len(listed(tmp_path)) >= 3


def test_nothing_readable_ends_the_run(root: Path, tmp_path: Path) -> None:
    rows = [row | {"image": b"nothing"} for row in make_rows(10)]
    folder = write_dataset(tmp_path / "set", {"train": rows})
    with pytest.raises(ShardReadError, match="10 other samples could not be read either"):
        taken(skipping(root, folder, tmp_path))


@pytest.mark.parametrize("image", ["image_0", "image_1"])
def test_a_pair_of_pictures_is_skipped_when_either_is_damaged(tmp_path: Path, image: str) -> None:
    rows = nlvr2_rows(10)
    rows[4][image] = rows[4][image][:-60]
    write_task_root(tmp_path)
    folder = write_dataset(tmp_path / "damaged", {"train": rows}, task="nlvr2")
    data = {
        "train": [{"path": str(folder), "splits": ["train"]}],
        "on_bad_sample": "skip",
        "max_skipped_share": 1.0,
    }
    batches, stream = taken(task_config(tmp_path, "nlvr2", tmp_path, data=data))
    dataset = CaptionDataset(folder, ["train"], "nlvr2")
    shown = [pair for batch in batches for pair in batch["sample_ids"].tolist()]
    assert 4 not in {dataset.pair(pair).row for pair in shown}
    records = listed(tmp_path)
    assert stream.counters == {"data/skipped_samples": len(records)}
    assert len(records) > 2
    assert all("cannot decode" in record["fault"] for record in records)
    labels = [label for batch in batches for label in batch["labels"].tolist()]
    assert labels == [dataset.annotations(pair)["labels"] for pair in shown]


def test_evaluation_never_skips(root: Path, damaged: Path, tmp_path: Path) -> None:
    config = skipping(root, damaged, tmp_path, eval=(DatasetConfig(path=str(damaged)),))
    with pytest.raises(ShardReadError, match=r"picture-0-3\.jpg"):
        list(eval_batches(config, 0, 1))


def test_clean_data_leave_no_list(root: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(configuration(root, on_bad_sample="skip"), run_dir=str(tmp_path))
    assert taken(config)[1].counters == {"data/skipped_samples": 0}
    assert not list(tmp_path.iterdir())
    assert TrainStream(configuration(root), 0, 1).counters == {}
