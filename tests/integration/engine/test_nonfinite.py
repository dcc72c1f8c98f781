"""A loss or gradient that is not finite on one rank: skipped on all, nothing moves, and the run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mt_deepspeed.engine.build import Session, build
from mt_deepspeed.engine.launch import Place
from mt_deepspeed.engine.nonfinite import NonFiniteError, NonFinitePolicy
from mt_deepspeed.engine.slices import adam_moments
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import CPU_OPTIMIZER, GLOBAL_BATCH, Case
from tests.helpers.toy import ToyStream, make_task

NO_COMPILE = {"zero_force_ds_cpu_optimizer": False}
CASES = {
    **{f"stage {stage}": Case(stage, 2) for stage in range(4)},
    **{f"stage {stage} bf16": Case(stage, 2, precision="bf16") for stage in (0, 2)},
    "stage 2 offload": Case(2, 2, zero={"offload_optimizer": CPU_OPTIMIZER}, ds=NO_COMPILE),
    "stage 3 offload": Case(3, 2, zero={"offload_optimizer": CPU_OPTIMIZER}, ds=NO_COMPILE),
}
POISONS = ["poison_loss", "poison_gradient"]


def state_of(session: Session) -> list[torch.Tensor]:
    found = []
    for slices in session.ownership.groups():
        for one in slices:
            found += [
                one.of(one.holder).clone(),
                *(m.clone() for m in adam_moments(session.optimizer, one).values()),
            ]
    return found


def poisoned(place: Place, case: Case, poison: str) -> dict[str, Any]:
    """Steps 0 and 1 are sound, step 2 is poisoned on rank 1 (second micro-batch), step 3 is sound."""
    session = build(case.run_config(), case.ds_config(), make_task(), place)
    stream = ToyStream(GLOBAL_BATCH, case.micro, place.rank, place.world_size).steps(0)
    applied, unchanged, fault, steps = [], True, None, 0.0
    for step in range(4):
        batches = next(stream)
        if step == 2 and place.rank == 1:
            batches[1][poison] = torch.full((len(batches[1]["sample_ids"]),), float("nan"))
        before = state_of(session)
        result = session.stepper.step(step, batches, {})
        applied.append(result.applied)
        if step == 2:
            unchanged = all(torch.equal(a, b) for a, b in zip(before, state_of(session), strict=True))
            fault = result.fault
        elif step == 3:
            unchanged = unchanged and not all(
                torch.equal(a, b) for a, b in zip(before, state_of(session), strict=True)
            )
    steps = max(float(state["step"]) for state in session.optimizer.state.values())
    session.engine.destroy()
    return {"applied": applied, "unchanged": unchanged, "fault": fault, "adam_steps": steps}


def poison_all(place: Place) -> dict[tuple[str, str], dict[str, Any]]:
    return {
        (name, poison): poisoned(place, case, poison) for name, case in CASES.items() for poison in POISONS
    }


@pytest.fixture(scope="module")
def outcomes() -> list[dict[tuple[str, str], dict[str, Any]]]:
    return run_ranks(2, poison_all)


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("name", list(CASES))
def test_step_is_skipped_on_all_ranks(
    outcomes: list[dict[tuple[str, str], dict[str, Any]]], name: str, poison: str
) -> None:
    for outcome in outcomes:
        found = outcome[name, poison]
        assert found["applied"] == [True, True, False, True]
        assert found["unchanged"]
        assert found["adam_steps"] == 3.0
    faults = [outcome[name, poison]["fault"] for outcome in outcomes]
    if poison == "poison_loss":
        # Rank 1's second micro-batch of step 2 is the fourth of the step: samples 22 and 23.
        assert faults[1].sample_ids == [22, 23]
        assert faults[1].losses["mlm"][1] != faults[1].losses["mlm"][1]
    assert any(fault.parameters for fault in faults)


def run_policy(place: Place, run_dir: Path) -> str:
    case = Case(1, 4)
    session = build(case.run_config(), case.ds_config(), make_task(), place)
    policy = NonFinitePolicy(3, run_dir)
    stream = ToyStream(GLOBAL_BATCH, case.micro, place.rank, place.world_size).steps(0)
    try:
        for step in range(10):
            batches = next(stream)
            if step in (1, 4, 5, 6) and place.rank == 0:
                batches[0]["poison_loss"] = torch.full((4,), float("inf"))
            policy.check(step, session.stepper.step(step, batches, {}), 1.0)
    except NonFiniteError as error:
        return str(error)
    return "never stopped"


def test_run_stops_after_some_in_a_row(tmp_path: Path) -> None:
    for message in run_ranks(2, run_policy, tmp_path):
        assert "stopped at step 6: 3 steps in a row" in message
        assert "train.max_skipped_steps=3" in message
    lines = (tmp_path / "nonfinite.jsonl").read_text().splitlines()
    assert len(lines) == 4
    assert '"sample_ids": [8, 9, 10, 11]' in lines[0]


def fp16_overflow(place: Place, stage: int) -> dict[str, Any]:
    """Starts with a far too high loss scale. (The check that refuses fp16 on CPUs is taken out: slow, but it works.)"""
    import mt_deepspeed.engine.build as building

    building.check_precision = lambda *args: None
    case = Case(stage, 2, precision="fp16", clip=0.5)
    session = build(case.run_config(), case.ds_config(), make_task(), place)
    session.loss_scale.value = 2.0**22
    stream = ToyStream(GLOBAL_BATCH, case.micro, place.rank, place.world_size).steps(0)
    results = [session.stepper.step(step, next(stream), {}) for step in range(12)]
    found = {
        "overflows": [result.overflow for result in results],
        "applied": [result.applied for result in results],
        "faults": [result.fault for result in results if result.fault],
        "norms": [result.grad_norm for result in results if result.applied],
        "scale": session.loss_scale.value,
        "adam_steps": max(float(state["step"]) for state in session.optimizer.state.values()),
    }
    session.engine.destroy()
    return found


def fp16_overflows(place: Place) -> list[dict[str, Any]]:
    return [fp16_overflow(place, stage) for stage in range(4)]


def test_fp16_overflow_lowers_the_scale_and_is_no_fault() -> None:
    found = run_ranks(2, fp16_overflows)
    first = found[0][0]
    overflows = sum(first["overflows"])
    assert 2 <= overflows < 10
    assert first["scale"] == 2.0 ** (22 - overflows)
    for rank in found:
        for stage in rank:
            assert stage["overflows"] == first["overflows"]
            assert stage["applied"] == [not overflow for overflow in stage["overflows"]]
            assert stage["adam_steps"] == 12 - overflows
            assert not stage["faults"]
            assert stage["norms"] == pytest.approx(first["norms"], rel=1e-2)  # unscaled, in fp16
            assert all(norm < 100 for norm in stage["norms"])
