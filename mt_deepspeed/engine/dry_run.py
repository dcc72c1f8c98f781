"""Two steps on invented samples: proves that a run would start, and shows its memory. Writes nothing."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from mt_deepspeed.config import RunConfig
from mt_deepspeed.engine.build import build, plan
from mt_deepspeed.engine.evaluate import evaluate
from mt_deepspeed.engine.launch import Place
from mt_deepspeed.engine.monitor import memory_gib
from mt_deepspeed.engine.protocols import Task

log = logging.getLogger(__name__)

MICRO_BATCHES = 2
"""Accumulation of a trial step at most: more would take longer and show nothing else."""
STEPS = 2
"""The first one makes Adam's states: only from the second on is all memory in use."""


def dry_run(
    config: RunConfig,
    ds_config: dict[str, Any],
    task: Task,
    place: Place,
    initialise: Callable[[], object] | None = None,
) -> dict[str, float]:
    """Builds everything, trains two steps and evaluates one batch; call on all ranks instead of `loop.train`.

    Args:
        task: As for `loop.train`; it has to offer `fake_batch(samples, text_len)`.
        initialise: As for `loop.train`.

    Returns:
        Losses by name, `grad_norm` and `step_s` of the last step, and `peak_gib` of this rank.

    Raises:
        DsConfigError: The configuration does not fit together.
        ValueError: A loss or the gradient is not finite.
    """
    split, _ = plan(config, ds_config, place)
    micro = config.train.micro_batch_size
    accumulation = min(split.accumulation, MICRO_BATCHES)
    trial = replace(config.train, global_batch_size=micro * accumulation * place.world_size)
    if initialise is not None:
        initialise()
    session = build(replace(config, train=trial), ds_config, task, place)
    make: Any = getattr(task, "fake_batch", None)
    if make is None:
        raise ValueError(f"{type(task).__name__} has no fake_batch(samples, text_len) to try a step with")
    batches = [make(micro, config.data.max_text_len) for _ in range(accumulation)]
    session.engine.train()
    for step in range(STEPS):
        started = time.perf_counter()
        result = session.stepper.step(step, batches, {})
    found = {
        name: float(pair[0] / pair[1]) for name, pair in result.report.items() if name.startswith("loss/")
    }
    found |= {"grad_norm": result.grad_norm, "step_s": time.perf_counter() - started}
    wrong = [name for name, value in found.items() if not math.isfinite(value)]
    if wrong and not result.overflow:  # fp16 starts with a loss scale that may be too high
        raise ValueError(f"a step on invented samples gave {', '.join(f'{n}={found[n]}' for n in wrong)}")
    evaluate(session.engine, batches[:1], place.device)
    found["peak_gib"] = memory_gib(place.device)
    log.info(
        "dry run: steps of %d of %d micro-batches of %d invented samples, the last in %.1f s, "
        "peak memory %.2f GiB on rank 0; evaluation works; nothing was written",
        accumulation,
        split.accumulation,
        micro,
        found["step_s"],
        found["peak_gib"],
    )
    session.engine.destroy()
    return found
