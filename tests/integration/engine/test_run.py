"""A whole run: what it writes, evaluation on uneven ranks, the best checkpoint, mistakes in the configuration."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch

from mt_deepspeed.config import load_config
from mt_deepspeed.engine import store
from mt_deepspeed.engine.build import build
from mt_deepspeed.engine.context import building
from mt_deepspeed.engine.ds_config import DsConfigError
from mt_deepspeed.engine.evaluate import evaluate, evaluate_task
from mt_deepspeed.engine.launch import Place
from mt_deepspeed.engine.loop import train
from mt_deepspeed.engine.watchdog import Watchdog
from mt_deepspeed.engine.weights import choose_weights, read_weights
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import CPU_OPTIMIZER, GLOBAL_BATCH, Case, largest_difference, run_steps
from tests.helpers.toy import Batch, ToyStream, make_batch, make_task

EVAL_SAMPLES = 21


def eval_batches(rank: int, shares: list[list[int]]) -> list[Batch]:
    """Rank r's batches, of the given sizes, from one sequence of samples."""
    start = sum(sum(sizes) for sizes in shares[:rank])
    batches = []
    for size in shares[rank]:
        batches.append(make_batch(list(range(start, start + size))) if size else empty_batch())
        start += size
    return batches


def empty_batch() -> Batch:
    return {key: value[:0] for key, value in make_batch([0]).items()}


def evaluations(place: Place, shares: dict[str, list[list[int]]]) -> dict[str, dict[str, float]]:
    found = {}
    for stage in (0, 3):
        session = build(Case(stage, 4).run_config(), Case(stage, 4).ds_config(), make_task(0.5), place)
        for name, sizes in shares.items():
            found[f"{stage} {name}"] = evaluate(session.engine, eval_batches(place.rank, sizes), place.device)
        assert session.engine.module.training  # left as it was
        session.engine.destroy()
    found["task"] = evaluate_task(make_task(0.5), eval_batches(place.rank, shares["even"]), place, "fp32")
    return found


def test_evaluation_counts_every_sample_once_on_uneven_ranks() -> None:
    shares = {
        "even": [[7, 4], [6, 4]],
        "short": [[8, 8, 2], [3]],
        "one rank has none": [[], [8, 8, 5]],
        "one rank has empty ones": [[8, 8, 5], [0, 0]],
    }
    alone = run_ranks(1, evaluations, {"even": [[8, 8, 5]]})[0]["0 even"]
    assert set(alone) == {"itm_accuracy", "itm_loss"}
    for found in run_ranks(2, evaluations, shares):
        for name, metrics in found.items():
            assert metrics == pytest.approx(alone, abs=1e-6), name


def whole_run(place: Place, run_dir: Path) -> dict[str, float]:
    case = Case(2, 4, 12)
    config = case.run_config(str(run_dir))
    config = replace(
        config,
        train=replace(config.train, log_every_steps=5, eval_every_steps=4),
        checkpoint=replace(config.checkpoint, every_steps=0, every_minutes=1e-9, best_metric="eval/score"),
    )
    shares = [[8, 2], [8, 3]]
    stream = ToyStream(GLOBAL_BATCH, case.micro, place.rank, place.world_size)
    watchdog = Watchdog(config, place.rank, place.world_size)
    result = train(
        config,
        case.ds_config(),
        make_task(),
        stream,
        lambda: eval_batches(place.rank, shares),
        place,
        watchdog,
    )
    assert result.steps == 12
    return result.metrics


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, float]]]:
    run_dir = tmp_path_factory.mktemp("run")
    return run_dir, run_ranks(2, whole_run, run_dir)


def test_run_writes_its_records(finished: tuple[Path, list[dict[str, float]]]) -> None:
    run_dir, metrics = finished
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    training = [record for record in records if "train/loss/mlm" in record]
    assert [record["step"] for record in training] == [5, 10, 12]
    assert [record["step"] for record in records if "eval/score" in record] == [4, 8, 12]
    expected = {"train/itm_accuracy", "train/grad_norm", "speed/samples_per_s", "speed/data_wait_share"}
    expected |= {
        "memory/peak_gib",
        "speed/tflops_per_device",
        "lr/tower/decay",
        "lr/head/no_decay",
        "steps/skipped",
    }
    assert expected <= set(training[0])
    assert training[0]["lr/head/decay"] == pytest.approx(5 * training[0]["lr/tower/decay"])
    assert 0 <= training[0]["speed/data_wait_share"] <= 1
    assert metrics[0]["eval/score"] == metrics[1]["eval/score"] == records[-1]["eval/score"]


def test_tensorboard_has_scalars_and_pictures(finished: tuple[Path, list[dict[str, float]]]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(finished[0] / "tensorboard"))
    board.Reload()
    assert {"train/loss/mlm", "eval/score", "lr/tower/decay"} <= set(board.Tags()["scalars"])
    assert board.Tags()["images"] == ["mix"]


def test_configuration_and_versions_are_kept(finished: tuple[Path, list[dict[str, float]]]) -> None:
    run_dir = finished[0]
    config = load_config(files=[run_dir / "config.yaml"])
    assert config.run_dir == str(run_dir)
    assert json.loads((run_dir / "versions.json").read_text())["deepspeed"] == deepspeed.__version__
    assert json.loads((run_dir / "deepspeed.json").read_text())["gradient_clipping"] == 0.0


def test_best_and_newest_checkpoints_are_kept(finished: tuple[Path, list[dict[str, float]]]) -> None:
    run_dir = finished[0]
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    scores = {record["step"]: record["eval/score"] for record in records if "eval/score" in record}
    best = max(scores, key=lambda step: scores[step])
    assert store.read_best(run_dir / "checkpoints") == {
        "step": best,
        "metric": "eval/score",
        "value": scores[best],
    }
    # The clock asked for a save after every step; two newest and the best stay.
    assert store.list_steps(run_dir / "checkpoints") == sorted({best, 11, 12})
    assert choose_weights(run_dir).name == store.folder_name(best)
    task = make_task()
    task.load_state_dict(dict(read_weights(choose_weights(run_dir))))


def mistakes(place: Place) -> list[str]:
    said = []
    config = Case(0, 4).run_config()
    for change in ({"micro_batch_size": 3}, {"precision": "fp16"}):
        try:
            building(replace(config, train=replace(config.train, **change)), {}, place)  # type: ignore[arg-type]
        except DsConfigError as error:
            said.append(str(error))
    return said


def test_mistakes_are_found_before_anything_is_built() -> None:
    split, precision = run_ranks(2, mistakes)[0]
    assert "Valid train.micro_batch_size with 2 ranks: 1 (accumulation 4), 2 (accumulation 2), 4" in split
    assert "fp16 needs a GPU" in precision


def built_in_parts(place: Place) -> list[float]:
    """Runs of a task that was built whole, and of one built under ZeRO-3's partitioning."""
    case = Case(3, 4, 5)
    session = None
    histories = []
    for partitioned in (False, True):
        task = make_task()
        if partitioned:
            whole = {name: value.detach().clone() for name, value in task.state_dict().items()}
            with building(case.run_config(), case.ds_config(), place):
                task = make_task()
            assert all(parameter.numel() == 0 for parameter in task.parameters())
            for name, parameter in task.named_parameters():
                with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                    parameter.data.copy_(whole[name])
        session = build(case.run_config(), case.ds_config(), task, place)
        stream = ToyStream(GLOBAL_BATCH, case.micro, place.rank, place.world_size).steps(0)
        histories.append([session.stepper.step(step, next(stream), {}).grad_norm for step in range(5)])
    return [abs(a - b) for a, b in zip(*histories, strict=True)]


def test_task_may_be_built_in_parts() -> None:
    assert max(run_ranks(2, built_in_parts)[0]) < 1e-5


def cpu_adam(place: Place) -> dict[str, Any]:
    offload = {"offload_optimizer": CPU_OPTIMIZER}
    return {
        "plain": run_steps(place, Case(0, 4, 10)),
        "stage 2": run_steps(place, Case(2, 4, 10, zero=offload)),
        "stage 3": run_steps(place, Case(3, 4, 10, zero={**offload, "offload_param": {"device": "cpu"}})),
    }


@pytest.mark.slow
def test_deepspeeds_cpu_adam_agrees_with_torchs() -> None:
    """Compiled on first use (about a minute). It reads bias correction off a table: differences near 1e-5."""
    found = run_ranks(2, cpu_adam, timeout_s=500)[0]
    for stage in ("stage 2", "stage 3"):
        assert largest_difference(found["plain"], found[stage]) < 1e-4


def test_toy_batches_depend_on_positions_only() -> None:
    """The equivalence tests rest on this."""
    two, one = make_batch([3, 4]), make_batch([4])
    assert all(torch.equal(two[key][1:], one[key]) for key in ("text_ids", "pixels", "mlm_labels"))
