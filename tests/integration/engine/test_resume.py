"""Kill and resume: bit for bit on the same ranks, within rounding on others, and safe when files are bad."""

from __future__ import annotations

import functools
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mt_deepspeed.engine import durable
from mt_deepspeed.engine.build import build
from mt_deepspeed.engine.checkpoint import base_state, take_snapshot, write_snapshot
from mt_deepspeed.engine.launch import Place
from tests.helpers.ranks import RankError, run_ranks
from tests.helpers.runs import CPU_OPTIMIZER, Case, final_weights, logged, train_until
from tests.helpers.toy import make_task

STEPS = 10
NO_COMPILE = {"zero_force_ds_cpu_optimizer": False}
OFFLOAD_ALL = {"offload_optimizer": CPU_OPTIMIZER, "offload_param": {"device": "cpu"}}
SAME_RANKS = {
    **{f"stage {stage}": Case(stage, 2, STEPS, dropout=0.2) for stage in range(4)},
    "stage 3 offload": Case(3, 2, STEPS, dropout=0.2, zero=OFFLOAD_ALL, ds=NO_COMPILE),
    "stage 2 bf16 checkpointing": Case(2, 4, STEPS, dropout=0.2, precision="bf16", checkpointing=1),
}


def straight_and_interrupted(place: Place, root: Path) -> None:
    for name, case in SAME_RANKS.items():
        train_until(place, case, root / name / "straight", None)
        train_until(place, case, root / name / "resumed", 6)
        train_until(place, case, root / name / "resumed", None, resume="must")


@pytest.fixture(scope="module")
def same_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("same")
    run_ranks(2, straight_and_interrupted, root)
    return root


@pytest.mark.parametrize("name", list(SAME_RANKS))
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(same_ranks: Path, name: str) -> None:
    straight, resumed = same_ranks / name / "straight", same_ranks / name / "resumed"
    assert logged(straight) == logged(resumed)
    assert len(logged(straight)) == STEPS
    weights = final_weights(straight, STEPS)
    for key, value in final_weights(resumed, STEPS).items():
        assert torch.equal(value, weights[key]), key
    start = make_task()
    assert not torch.equal(weights["mlm_score.weight"], start.mlm_score.weight)  # it did train


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("reference")
    run_ranks(1, train_until, Case(0, 8, STEPS), root, None)
    return root


# Saves happen every 4 steps: each start repeats what came after its predecessor's last save.
CHAINS: dict[str, list[tuple[int, Case, int | None]]] = {
    "2 ranks stage 3 -> 1 rank stage 2 -> 2 ranks stage 0": [
        (2, Case(3, 4, STEPS), 5),
        (1, Case(2, 4, STEPS), 9),
        (2, Case(0, 2, STEPS), None),
    ],
    "1 rank stage 0 -> 4 ranks stage 3 offload -> 2 ranks stage 1": [
        (1, Case(0, 8, STEPS), 5),
        (4, Case(3, 2, STEPS, zero=OFFLOAD_ALL, ds=NO_COMPILE), 9),
        (2, Case(1, 4, STEPS), None),
    ],
}


@pytest.mark.parametrize("name", list(CHAINS))
def test_resume_at_other_rank_counts_and_stages(tmp_path: Path, reference: Path, name: str) -> None:
    """Tolerance as in test_equivalence; largest measured 4e-7."""
    for ranks, case, stop in CHAINS[name]:
        run_ranks(ranks, train_until, case, tmp_path, stop)
    expected, found = logged(reference), logged(tmp_path)
    assert list(found) == list(expected)
    for step, figures in expected.items():
        for key, value in figures.items():
            assert found[step][key] == pytest.approx(value, abs=2e-5), (step, key)
    weights = final_weights(reference, STEPS)
    for key, tensor in final_weights(tmp_path, STEPS).items():
        assert torch.allclose(tensor, weights[key], atol=2e-5), key


def test_resume_after_sigkill(tmp_path: Path, reference: Path) -> None:
    case = Case(2, 4, STEPS)
    with pytest.raises(RankError, match="died without a word"):
        run_ranks(2, train_until, case, tmp_path, 6, "auto", True)
    run_ranks(2, train_until, case, tmp_path, None, "must")
    assert logged(tmp_path)[STEPS]["train/loss/mlm"] == pytest.approx(
        logged(reference)[STEPS]["train/loss/mlm"], abs=2e-5
    )


def flip_byte(folder: Path) -> None:
    file = folder / "moments-00001-of-00002.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def cut_tail(folder: Path) -> None:
    file = folder / "weights-00000-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-7])


def lose_rank_file(folder: Path) -> None:
    (folder / "weights-00001-of-00002.safetensors").unlink()


def lose_marker(folder: Path) -> None:
    (folder / "COMPLETE").unlink()


def stale_pointer(folder: Path) -> None:
    (folder.parent / "latest").write_text("step-00009999\n")


def resume_and_listen(
    place: Place, case: Case, run_dir: Path, stop: int | None, resume: str = "auto"
) -> list[str]:
    """Messages of a (re)start, or its error."""
    messages: list[str] = []

    class Listen(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    logger = logging.getLogger("mt_deepspeed")
    handler = Listen()
    logger.addHandler(handler)
    try:
        train_until(place, case, run_dir, stop, resume)
    except ValueError as error:
        messages.append(f"error: {error}")
    finally:
        logger.removeHandler(handler)
    return messages


DAMAGES: dict[Callable[[Path], None], str] = {
    flip_byte: "another sha256",
    cut_tail: "bytes, expected",
    lose_rank_file: "is missing",
    lose_marker: "was interrupted",
    stale_pointer: "",
}


def resume_damaged(place: Place, root: Path) -> dict[str, list[str]]:
    """One run, saved at steps 4 and 8; copies of it with different damage to the newer one are resumed."""
    case = Case(1, 4, STEPS)
    train_until(place, case, root / "run", 9)
    found = {}
    for damage in DAMAGES:
        copy = root / damage.__name__
        if place.rank == 0:
            shutil.copytree(root / "run", copy)
            damage(copy / "checkpoints" / "step-00000008")
        torch.distributed.barrier()
        found[damage.__name__] = resume_and_listen(place, case, copy, 9)
    found["must"] = resume_and_listen(place, case, root / "nothing", 2, "must")
    return found


def test_damaged_checkpoint_is_passed_over(tmp_path: Path) -> None:
    on_ranks = run_ranks(2, resume_damaged, tmp_path)
    for damage, said in DAMAGES.items():
        messages = on_ranks[0][damage.__name__]
        resumed = next(message for message in messages if message.startswith("resuming from"))
        assert f"step {4 if said else 8}," in resumed, damage.__name__
        if said:
            assert any(said in message and "step-00000008" in message for message in messages)
    for found in on_ranks:
        assert "checkpoint.resume=must" in found["must"][-1]


def refusals(place: Place, run_dir: Path) -> dict[str, list[str]]:
    from dataclasses import replace

    case = Case(0, 8, STEPS)
    train_until(place, case, run_dir, 5)
    found = {}

    class OtherBatch(Case):
        def run_config(self, run_dir: str = "") -> Any:
            config = super().run_config(run_dir)
            return replace(config, train=replace(config.train, global_batch_size=16))

    found["batch"] = resume_and_listen(place, OtherBatch(0, 8, STEPS), run_dir, 6)
    import tests.helpers.runs as runs

    small = runs.make_task
    try:
        runs.make_task = functools.partial(small, num_layers=1)  # type: ignore[assignment]
        found["model"] = resume_and_listen(place, case, run_dir, 6)
    finally:
        runs.make_task = small
    found["difference"] = resume_and_listen(place, Case(0, 8, STEPS, clip=0.5), run_dir, 6)
    found["never"] = resume_and_listen(place, case, run_dir, 2, "never")
    return found


def test_what_a_resume_refuses_and_says(tmp_path: Path) -> None:
    found = run_ranks(1, refusals, tmp_path)[0]
    assert "another sample stream" in found["batch"][-1]
    assert "global_batch_size: 8 -> 16" in found["batch"][-1]
    assert "checkpoint of another model" in found["model"][-1]
    assert "image.layers.1" in found["model"][-1]
    assert any("optim.max_grad_norm: 0.0 -> 0.5" in message for message in found["difference"])
    assert any("moved to" in message for message in found["never"])
    assert (tmp_path / "checkpoints.old-1" / "step-00000004" / "COMPLETE").is_file()


def failing_save(place: Place, run_dir: Path) -> list[str]:
    """Saves once; then rank 1's disk is full; then there is no room at all."""
    session = build(
        Case(1, 4).run_config(str(run_dir)), {"zero_optimization": {"stage": 1}}, make_task(), place
    )
    root = run_dir / "checkpoints"
    write_snapshot(take_snapshot(session, base_state(session, 1, 1)), root)
    errors = []
    write, usage = durable.write_tensors, shutil.disk_usage

    def full(path: Path, tensors: Any) -> Any:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    try:
        if place.rank == 1:
            durable.write_tensors = full  # type: ignore[assignment]
        write_snapshot(take_snapshot(session, base_state(session, 2, 2)), root)
    except ValueError as error:
        errors.append(str(error))
    finally:
        durable.write_tensors = write
    try:
        shutil.disk_usage = lambda path: usage(path)._replace(free=1000)  # type: ignore[assignment]
        write_snapshot(take_snapshot(session, base_state(session, 3, 3)), root)
    except ValueError as error:
        errors.append(str(error))
    finally:
        shutil.disk_usage = usage
    return errors


def test_failed_save_is_an_error_on_all_ranks_and_leaves_the_older_one(tmp_path: Path) -> None:
    for full_disk, no_room in run_ranks(2, failing_save, tmp_path):
        assert "rank 1" in full_disk
        assert "No space left on device" in full_disk
        assert "0.00 GiB are free" in no_room
    root = tmp_path / "checkpoints"
    assert sorted(path.name for path in root.iterdir() if path.name.startswith("step-")) == ["step-00000001"]
    assert json.loads((root / "step-00000001" / "state.json").read_text())["step"] == 1
