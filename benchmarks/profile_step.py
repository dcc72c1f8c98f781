"""Where the time of one optimizer step goes, by part of the model and of the engine.

    python -m benchmarks.profile_step --preset managertower-base --set train.micro_batch_size=2 train.precision=fp32
    python -m benchmarks.profile_step --preset quickstart --set data.root=SHARDS

One process drives the real engine. With `data.root` the batches come from the shards, else they are random. A part's
backward time is that of the autograd nodes its forward pass made; its self time holds Python and dispatch. The
profiler itself slows small operations: `wall` is the time of the same steps without it.
"""

import argparse
import itertools
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.batches import make_batch
from mt_deepspeed.config import RunConfig, load_config

MARK = "part:"
BACKWARD = "autograd::engine::evaluate_function: "


def mark_modules(task: Any) -> None:
    """Names the parts of a forward pass in the profile."""
    model: Any = task.model
    parts: dict[str, list[nn.Module]] = {
        "text tower": [model.text_transformer],
        "vision tower": [model.vit_model],
        "projections": [model.cross_modal_text_transform, model.cross_modal_image_transform],
        "managers or bridges": [*model.links("text"), *model.links("image")],
        "cross-modal layers": [*model.cross_modal_text_layers, *model.cross_modal_image_layers],
        "MLM head": [task.mlm_score],
        "ITM head": [model.cross_modal_text_pooler, model.cross_modal_image_pooler, task.itm_score],
    }
    for name, modules in parts.items():
        for module in dict.fromkeys(modules):
            module.forward = _marked(name, module.forward)  # type: ignore[method-assign]


def _marked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with record_function(MARK + name):
            return function(*args, **kwargs)

    return run


def mark_engine(session: Any) -> None:
    """Names the engine's parts: what is in none of them is the task's own glue and the losses."""
    stepper, engine = session.stepper, session.engine
    stepper._agree = _marked("gradient norm, agreement", stepper._agree)
    stepper._weigh = _marked("loss weights", stepper._weigh)
    session.optimizer.step = _marked("AdamW", session.optimizer.step)
    engine.step = _marked("ZeRO around AdamW", engine.step)
    engine.backward = _marked("autograd, ZeRO hooks", engine.backward)


def shares(events: list[FunctionEvent], device: bool) -> dict[str, list[float]]:
    """Part -> [forward, backward] self time in microseconds."""
    made_by: dict[int, tuple[float, str]] = {}
    for event in events:
        number, part = event.sequence_nr, _part(event)
        if number >= 0 and part is not None and _backward_node(event) is None:
            made_by[number] = max(made_by.get(number, (0.0, "")), (event.time_range.start, part))
    found: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in events:
        spent = event.self_device_time_total if device else event.self_cpu_time_total
        node = _backward_node(event)
        if node is not None and not node.name.endswith("AccumulateGrad"):
            found[made_by.get(node.sequence_nr, (0.0, "glue, losses"))[1]][1] += spent
        elif (part := _part(event)) is not None:
            found[part][0] += spent
    return found


def _ancestors(event: FunctionEvent) -> Iterator[FunctionEvent]:
    here: FunctionEvent | None = event
    while here is not None:
        yield here
        here = here.cpu_parent


def _part(event: FunctionEvent) -> str | None:
    """Innermost marked part around an event; None outside of a step."""
    return next((e.name[len(MARK) :] for e in _ancestors(event) if e.name.startswith(MARK)), None)


def _backward_node(event: FunctionEvent) -> FunctionEvent | None:
    return next((e for e in _ancestors(event) if e.name.startswith(BACKWARD)), None)


def steps_of(config: RunConfig, from_shards: bool) -> Iterator[list[dict[str, torch.Tensor]]]:
    """Micro-batches of every step."""
    if from_shards:
        from mt_deepspeed.data.pipeline import TrainStream

        yield from TrainStream(config, 0, 1).steps(0)
    size = config.train.micro_batch_size
    for step in itertools.count():
        yield [
            make_batch(config, size, 1000 * step + i) for i in range(config.train.global_batch_size // size)
        ]


def run(config: RunConfig, deepspeed_config: Path, num_steps: int, from_shards: bool, top: int) -> None:
    from mt_deepspeed.engine import launch
    from mt_deepspeed.engine.build import build
    from mt_deepspeed.engine.ds_config import load_ds_config
    from mt_deepspeed.tasks import build_task

    place = launch.init()
    task = build_task(config)
    session = build(config, load_ds_config(deepspeed_config), task, place)
    session.engine.train()
    batches = steps_of(config, from_shards)
    stepper, is_cuda = session.stepper, place.device.type == "cuda"

    def step(number: int) -> None:
        with record_function(MARK + "glue, losses"):
            with record_function(MARK + "data"):
                micro_batches = next(batches)
            stepper.step(number, micro_batches, {"save": False})
        if is_cuda:
            torch.cuda.synchronize()

    for number in range(3):
        step(number)
    start = time.perf_counter()
    for number in range(num_steps):
        step(3 + number)
    wall_ms = (time.perf_counter() - start) / num_steps * 1e3
    mark_modules(task)
    mark_engine(session)
    step(0)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
    with profile(activities=activities) as trace:
        for number in range(num_steps):
            step(3 + num_steps + number)
    report(shares(list(trace.events()), is_cuda), num_steps, wall_ms)
    if top:
        key = "self_device_time_total" if is_cuda else "self_cpu_time_total"
        print(trace.key_averages().table(sort_by=key, row_limit=top, max_name_column_width=60))
    launch.shutdown()


def report(found: dict[str, list[float]], num_steps: int, wall_ms: float) -> None:
    """Prints the table."""
    whole = sum(map(sum, found.values())) / num_steps / 1e3
    load = " ".join(f"{value:.2f}" for value in os.getloadavg())
    print(
        f"\n{wall_ms:.1f} ms a step ({whole:.1f} under the profiler); {torch.get_num_threads()} threads, load {load}"
    )
    print("\n| part | forward, ms | backward, ms | share |\n|---|---|---|---|")
    for part, (forward, backward) in sorted(found.items(), key=lambda item: -sum(item[1])):
        forward_ms, backward_ms = forward / num_steps / 1e3, backward / num_steps / 1e3
        print(f"| {part} | {forward_ms:.1f} | {backward_ms:.1f} | {(forward_ms + backward_ms) / whole:.1%} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="managertower-base")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of the run")
    parser.add_argument("--deepspeed_config", type=Path, default=Path("ds_configs/zero1.json"))
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--top", type=int, default=0, help="also list this many operators")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(options.preset, [], [f"run_dir={folder}", *options.set])
        from_shards = any(setting.startswith("data.root=") for setting in options.set)
        run(config, options.deepspeed_config, options.steps, from_shards, options.top)


if __name__ == "__main__":
    main()
