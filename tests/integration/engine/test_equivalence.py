"""The same run at every ZeRO stage, rank count, accumulation and activation checkpointing.

Tolerance: all runs do the same fp32 arithmetic, but sums of gradients and of losses are taken in another
order. One reordered fp32 sum of a few hundred terms is off by about 1e-6 of its value; with losses and
norms of order 1 and 20 steps that carry the differences on, 2e-5 is allowed. Largest measured: 6e-7.
A wrong average or a missed micro-batch shows at 1e-2 or more in the first two steps.
"""

from __future__ import annotations

import pytest

from tests.helpers.ranks import run_ranks
from tests.helpers.runs import CPU_OPTIMIZER, Case, largest_difference, run_cases

TOLERANCE = 2e-5
NO_COMPILE = {"zero_force_ds_cpu_optimizer": False}
OFFLOAD_ALL = {"offload_optimizer": CPU_OPTIMIZER, "offload_param": {"device": "cpu"}}


def cases(ranks: int) -> dict[str, Case]:
    found = {}
    for stage in range(4):
        for accumulation, checkpointing in ((1, 0), (2, 0), (1, 1)):
            name = f"stage {stage}, {ranks} ranks, accumulation {accumulation}, checkpointing {checkpointing}"
            found[name] = Case(stage, 8 // ranks // accumulation, checkpointing=checkpointing)
    if ranks == 1:
        for stage in (0, 2, 3):
            for checkpointing in (0, 1):
                found[f"dropout, stage {stage}, checkpointing {checkpointing}"] = Case(
                    stage, 8, 6, checkpointing=checkpointing, dropout=0.3
                )
        ds = {"activation_checkpointing": {"cpu_checkpointing": True}}
        found["stage 3, every second layer checkpointed, offloaded"] = Case(3, 4, checkpointing=2, ds=ds)
        return found
    for stage in (1, 2, 3):
        zero = OFFLOAD_ALL if stage == 3 else {"offload_optimizer": CPU_OPTIMIZER}
        found[f"stage {stage} offload, accumulation 2"] = Case(stage, 2, zero=zero, ds=NO_COMPILE)
    return found


NAMES = [name for ranks in (1, 2) for name in cases(ranks)]


@pytest.fixture(scope="module")
def histories() -> dict[str, list[dict[str, float]]]:
    return {
        name: found
        for ranks in (1, 2)
        for name, found in run_ranks(ranks, run_cases, cases(ranks))[0].items()
    }


@pytest.mark.parametrize("name", NAMES)
def test_run_equals_one_rank_without_zero(histories: dict[str, list[dict[str, float]]], name: str) -> None:
    reference = histories[
        "dropout, stage 0, checkpointing 0"
        if name.startswith("dropout")
        else "stage 0, 1 ranks, accumulation 1, checkpointing 0"
    ]
    assert largest_difference(reference, histories[name]) < TOLERANCE


def test_reference_run_learns(histories: dict[str, list[dict[str, float]]]) -> None:
    steps = histories["stage 0, 1 ranks, accumulation 1, checkpointing 0"]
    first, last = (sum(step["loss/mlm"] for step in part) for part in (steps[:5], steps[-5:]))
    assert last < 0.8 * first
