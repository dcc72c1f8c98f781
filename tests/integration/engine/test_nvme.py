"""ZeRO-Infinity: optimizer states in files. Needs libaio's headers and a compiler; skipped without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mt_deepspeed.engine.build import build
from mt_deepspeed.engine.launch import Place
from mt_deepspeed.engine.slices import Ownership
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import (
    GLOBAL_BATCH,
    Case,
    ExtraSometimes,
    final_weights,
    largest_difference,
    logged,
    run_steps,
    train_until,
)
from tests.helpers.toy import ToyStream, make_task

pytestmark = pytest.mark.slow  # compiles DeepSpeed's async_io operator on first use


@pytest.fixture(scope="module", autouse=True)
def _async_io() -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("DeepSpeed's async_io cannot be compiled here (install libaio-dev)")


def nvme_case(folder: Path, micro: int, steps: int, stream: type[ToyStream] = ToyStream) -> Case:
    """Blocks and groups so small that the toy's states really go to files."""
    optimizer = {"device": "nvme", "nvme_path": str(folder), "buffer_count": 8}
    aio = {"block_size": 1024, "queue_depth": 8, "thread_count": 1, "overlap_events": False}
    zero = {"offload_optimizer": optimizer, "sub_group_size": 1000}
    return Case(
        3, micro, steps, zero=zero, ds={"aio": aio, "zero_force_ds_cpu_optimizer": False}, stream=stream
    )


def everything(place: Place, root: Path) -> dict[str, Any]:
    import deepspeed.runtime.swap_tensor.optimizer_utils as swapping

    swapping.MIN_AIO_BYTES = 1024  # a mebibyte otherwise: smaller groups stay in memory
    nvme = root / "nvme"
    found: dict[str, Any] = {}
    for stream in (ToyStream, ExtraSometimes):
        plain = run_steps(place, Case(0, 2, 6, stream=stream))
        swapped = run_steps(place, nvme_case(nvme, 2, 6, stream))
        found[stream.__name__] = largest_difference(plain, swapped)
    case = nvme_case(nvme, 4, 10)
    train_until(place, case, root / "straight", None)
    train_until(place, case, root / "resumed", 6)
    train_until(place, case, root / "resumed", None, resume="must")
    found["poisoned"] = [poisoned(place, case, poison) for poison in ("poison_loss", "poison_gradient")]
    return found


def poisoned(place: Place, case: Case, poison: str) -> tuple[list[bool], bool]:
    session = build(case.run_config(), case.ds_config(), make_task(), place)
    assert swapped_groups(session.ownership) > 0
    stream = ToyStream(GLOBAL_BATCH, case.micro, place.rank, place.world_size).steps(0)
    applied = []
    for step in range(4):
        batches = next(stream)
        if step == 2 and place.rank == 1:
            batches[0][poison] = torch.full((len(batches[0]["sample_ids"]),), float("nan"))
        result = session.stepper.step(step, batches, {})
        applied.append(result.applied)
    sound = all(
        bool(torch.isfinite(one.of(one.holder)).all())
        for slices in session.ownership.groups()
        for one in slices
    )
    session.engine.destroy()
    return applied, sound


def swapped_groups(ownership: Ownership) -> int:
    zero = ownership.zero
    return sum(bool(zero._swappable_optimizer_subgroup(index)) for index in range(len(zero.fp16_groups)))


def test_states_in_files_change_nothing(tmp_path: Path) -> None:
    (tmp_path / "nvme").mkdir()
    on_ranks = run_ranks(2, everything, tmp_path, timeout_s=500)
    for found in on_ranks:
        assert found["ToyStream"] < 2e-5
        assert found["ExtraSometimes"] < 2e-5
        assert found["poisoned"] == [([True, True, False, True], True)] * 2
    assert logged(tmp_path / "straight") == logged(tmp_path / "resumed")
    weights = final_weights(tmp_path / "straight", 10)
    assert all(
        torch.equal(value, weights[key]) for key, value in final_weights(tmp_path / "resumed", 10).items()
    )
