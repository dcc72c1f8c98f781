"""One optimizer step of pre-training: ours, the published way in plain PyTorch, and transformers' BridgeTower.

    python -m benchmarks.train_step --micro-batch 2 4 --precision fp32 bf16 [--save]
    python -m benchmarks.train_step --systems bridge transformers --stage 0 1 2 3 --checkpointing 0 1

Systems: `ours` and `plain` train ManagerTower, `bridge` (ours) and `transformers` BridgeTower, in the sizes of
`--preset`. All but `plain` run under DeepSpeed with the same engine; `plain` is autograd and torch's AdamW, and pads
every text to `data.max_text_len`, as the published loader does; the others pad to the longest of the batch. Before
anything is timed, dropout and noise are switched off and both systems of a model must give the same losses in float32.
Systems take turns in one process on the same batches; `cpu_s` is processor time, which other programs on the machine
disturb less than the wall clock, `update_s` the optimizer's part of `wall_s` (on a CPU). TFLOP/s and MFU count the
operations that our step needs, for every system. `kept` is what a forward pass leaves for backward; for peaks, and
with checkpointing, see `benchmarks.step_counts`.
"""

import argparse
import dataclasses
import gc
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.batches import make_batch
from benchmarks.memory import kept_bytes
from benchmarks.record import add_save, append
from mt_deepspeed.config import RunConfig, load_config
from mt_deepspeed.engine.precision import autocast
from mt_deepspeed.engine.runner import to_device

BASELINE = {"ours": "plain", "bridge": "transformers"}
TOLERANCE = 2e-4
"""Largest relative difference of two losses in float32."""


@dataclass
class System:
    """One way to make a step."""

    name: str
    module: nn.Module
    losses: Callable[[dict[str, Tensor], str], dict[str, Tensor]]
    step: Callable[[dict[str, Tensor]], Any]
    optimizer: torch.optim.Optimizer
    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    update_s: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Setting:
    """What is varied."""

    micro_batch: int
    precision: str
    stage: int
    checkpointing: int


def configuration(options: argparse.Namespace, setting: Setting, kind: str, folder: str) -> RunConfig:
    """The run of one system; `kind` is a `model.link.kind`, empty for the preset's own."""
    changes = [
        f"run_dir={folder}",
        f"train.global_batch_size={setting.micro_batch}",
        f"train.micro_batch_size={setting.micro_batch}",
        f"train.precision={setting.precision}",
        f"train.activation_checkpointing={setting.checkpointing}",
        *([f"model.link.kind={kind}"] if kind else []),
        *options.set,
    ]
    return load_config(options.preset, [], changes)


def build_tasks(names: list[str], config: RunConfig) -> list[Any]:
    """The systems' models, all with the same random weights."""
    from benchmarks.library_step import LibraryTask
    from mt_deepspeed.tasks import build_task

    torch.manual_seed(0)
    tasks: list[Any] = []
    for name in names:
        tasks.append(LibraryTask(config.model) if name == "transformers" else build_task(config))
        if name == "transformers" and len(tasks) > 1:
            tasks[-1].take_weights(tasks[0])
        elif len(tasks) > 1:
            tasks[-1].load_state_dict(tasks[0].state_dict())
    return tasks


def _plain(task: Any, config: RunConfig, place: Any) -> System:
    from benchmarks.plain_step import PlainPretraining, pad_texts

    module = PlainPretraining(task).to(place.device)
    length, pad_id = config.data.max_text_len, config.model.text.pad_token_id
    groups = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(groups, lr=config.optim.lr, betas=config.optim.betas)

    def losses(batch: dict[str, Tensor], precision: str) -> dict[str, Tensor]:
        with autocast(precision, place.device):
            found: dict[str, Tensor] = module(to_device(pad_texts(batch, length, pad_id), place.device))
        return found

    def step(batch: dict[str, Tensor]) -> None:
        values = losses(batch, config.train.precision)
        optimizer.zero_grad()
        sum(values.values()).backward()  # type: ignore[union-attr]
        optimizer.step()

    return System("plain", module, losses, step, optimizer)


def _engine(name: str, task: Any, config: RunConfig, setting: Setting, place: Any) -> System:
    from mt_deepspeed.engine.build import build

    session = build(config, {"zero_optimization": {"stage": setting.stage}}, task, place)
    session.engine.train()
    numbers = itertools.count()

    def losses(batch: dict[str, Tensor], precision: str) -> dict[str, Tensor]:
        session.engine.module.precision = precision
        found: dict[str, Tensor] = session.engine("train", to_device(batch, place.device))[0]
        session.engine.module.precision = config.train.precision
        return found

    return System(
        name,
        session.engine,
        losses,
        lambda batch: session.stepper.step(next(numbers), [batch], {"save": False}),
        session.optimizer,
    )


def check_losses(first: System, second: System, batch: dict[str, Tensor]) -> None:
    """Both systems must give the same losses when nothing is random; float32."""
    found = []
    for system in (first, second):
        system.module.eval()
        with torch.no_grad():
            found.append({name: float(loss) for name, loss in system.losses(batch, "fp32").items()})
        system.module.train()
    for name, value in found[0].items():
        other = found[1][name]
        if abs(value - other) > TOLERANCE * abs(other):
            raise SystemExit(f"{first.name} and {second.name} disagree: {name} {value:.6f} and {other:.6f}")
    print(f"same losses: {first.name} and {second.name}, {found[0]}")


def measure(
    systems: list[System], batches: Iterator[dict[str, Tensor]], rounds: int, device: torch.device
) -> None:
    """Warms up, then lets the systems take turns on the same batches."""
    for system in systems:
        system.optimizer.step = _timed(system.optimizer.step, system.update_s)  # type: ignore[method-assign]
    for number in range(rounds + 1):
        batch = next(batches)
        for system in systems:
            wall, processor = time.perf_counter(), time.process_time()
            system.step(batch)
            if device.type == "cuda":
                torch.cuda.synchronize()
            wall, processor = time.perf_counter() - wall, time.process_time() - processor
            print(
                f"{system.name}, round {number}: {wall:.2f} s, {processor:.2f} s of processor time",
                flush=True,
            )
            if number:
                system.wall_s.append(wall)
                system.cpu_s.append(processor)


def _timed(function: Callable[..., Any], times: list[float]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = function(*args, **kwargs)
        times.append(time.perf_counter() - start)
        return result

    return run


def peak_bytes(system: System, batch: dict[str, Tensor]) -> int:
    """GPU memory of a step beyond what lies there before it."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    system.step(batch)
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)


def compare(
    options: argparse.Namespace, setting: Setting, place: Any, folder: str
) -> list[dict[str, object]]:
    """Rows of one setting."""
    rows: list[dict[str, object]] = []
    for ours, baseline in BASELINE.items():
        names = [name for name in (ours, baseline) if name in options.systems]
        if not names:
            continue
        kind = "bridge_add" if ours == "bridge" else ""
        config = configuration(options, setting, kind, folder)
        tasks = build_tasks(names, config)
        systems = [
            _plain(task, config, place) if name == "plain" else _engine(name, task, config, setting, place)
            for name, task in zip(names, tasks, strict=True)
        ]
        made = (
            make_batch(config, setting.micro_batch, seed, options.text_tokens) for seed in itertools.count()
        )
        if len(systems) == 2:
            check_losses(systems[0], systems[1], next(made))
        measure(systems, made, options.rounds, place.device)
        rows += [
            row(system, systems[-1], setting, config, options, next(made), place.device) for system in systems
        ]
        del systems, tasks
        gc.collect()
    return rows


def row(
    system: System,
    baseline: System,
    setting: Setting,
    config: RunConfig,
    options: argparse.Namespace,
    batch: dict[str, Tensor],
    device: torch.device,
) -> dict[str, object]:
    """What is written of one system."""
    from mt_deepspeed.engine.monitor import throughput
    from mt_deepspeed.models.flops import forward_flops

    wall, cpu = statistics.median(system.wall_s), min(system.cpu_s)
    tokens = batch["text_mask"].shape[1]
    masked = len(batch["mlm_positions"]) / setting.micro_batch
    flops = 3 * forward_flops(config.model, tokens, 2, 1.5, masked, pooled=1)
    rates = throughput(setting.micro_batch / wall, flops, setting.precision, device, 1)
    # Recomputed layers hide what they keep.
    kept = None
    if not setting.checkpointing:
        kept = kept_bytes(lambda: system.losses(batch, setting.precision), system.module.parameters())
    peak = peak_bytes(system, batch) if device.type == "cuda" else None
    return {
        "preset": options.preset,
        "system": system.name,
        **dataclasses.asdict(setting),
        "text_tokens": tokens,
        "wall_s": f"{wall:.4g}",
        "cpu_s": f"{cpu:.4g}",
        "update_s": "" if device.type == "cuda" else f"{statistics.median(system.update_s[1:]):.4g}",
        "samples_per_s": f"{setting.micro_batch / wall:.4g}",
        "times_baseline": f"{statistics.median(baseline.wall_s) / wall:.3f}",
        "times_baseline_cpu": f"{min(baseline.cpu_s) / cpu:.3f}",
        "tflops": f"{rates['speed/tflops_per_device']:.4g}",
        "mfu": f"{rates['speed/mfu']:.3f}" if "speed/mfu" in rates else "",
        "kept_mib_per_sample": "" if kept is None else f"{kept / setting.micro_batch / 2**20:.1f}",
        "peak_mib_per_sample": "" if peak is None else f"{peak / setting.micro_batch / 2**20:.1f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="managertower-base")
    parser.add_argument(
        "--systems", nargs="+", default=["ours", "plain"], choices=[*BASELINE, *BASELINE.values()]
    )
    parser.add_argument("--micro-batch", nargs="+", type=int, default=[2])
    parser.add_argument("--precision", nargs="+", default=["fp32"])
    parser.add_argument("--stage", nargs="+", type=int, default=[0])
    parser.add_argument("--checkpointing", nargs="+", type=int, default=[0])
    parser.add_argument("--text-tokens", type=int, help="length of every text (default: captions of 9 to 16)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="further settings of the run"
    )
    add_save(parser, "train_step.csv")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    from mt_deepspeed.engine import launch

    place = launch.init()
    settings = itertools.product(options.micro_batch, options.precision, options.stage, options.checkpointing)
    for values in settings:
        with tempfile.TemporaryDirectory() as folder:
            rows = compare(options, Setting(*values), place, folder)
        for one in rows:
            print(" ".join(f"{key} {value}" for key, value in one.items()))
        if options.save:
            append(options.save, rows)
    launch.shutdown()


if __name__ == "__main__":
    main()
