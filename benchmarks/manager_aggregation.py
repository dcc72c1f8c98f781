"""Manager aggregation: time and memory of each backend beside plain PyTorch, and the floor that memory sets.

    python -m benchmarks.manager_aggregation [--device cuda] [--dtype bfloat16] [--seconds S] [--threads T]
        [--save [FILE]] [--shapes N,B,L,D ...] [--kinds NAME ...] [--ways NAME ...] [--profile FILE]

For each kind and shape all ways take turns in one process, several rounds; times are medians of a call's time, on a
GPU without the host's: each call is queued while the device sleeps. Ways:

    eager      the formula by autograd, noise from torch.randn (kernels.manager_aggregation.reference.aggregate)
    compiled   torch.compile of eager, static shapes
    reference, cpu, triton, cuda    the operator with this backend, noise made inside

The operator's times include 1/N of the experts' statistics, which N managers share. The floor is the time to
read every expert, the previous state (and in backward the gradient) once and to write every result once, at the
bandwidth of a copy measured in the same run. `kept` are the bytes that forward leaves for backward, beyond its inputs
and its result; `peak` is the most that forward and backward allocate, results included (CUDA only).
With `--save`, rows that FILE holds already for this commit, device and dtype are not measured again.
"""

import argparse
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor

from benchmarks.memory import kept_bytes
from benchmarks.record import add_save, append, measured, surroundings
from mt_deepspeed.kernels.manager_aggregation import Philox, expert_statistics, manager_aggregation
from mt_deepspeed.kernels.manager_aggregation.reference import aggregate

# N, B, L, D: texts of 50 tokens, images of 288 (base) and 294 pixels (large), and of 384 pixels.
CUDA_SHAPES = [
    *((6, b, tokens, 768) for b in (8, 64, 256) for tokens in (50, 325, 577)),
    *((6, b, tokens, 1024) for b in (8, 64, 256) for tokens in (50, 442, 577)),
]
CPU_SHAPES = [(3, 128, 10, 64), (3, 128, 17, 64), (6, 8, 50, 768), (6, 2, 325, 768), (6, 8, 325, 768)]
COMPILED_BATCH = 64  # compiling each shape would take longer than measuring it
CYCLES_PER_SECOND = 2e9  # of a GPU, about
KINDS = {
    "cuda": ["static noise", "adaptive noise", "static", "adaptive"],
    "cpu": ["static", "adaptive", "static noise", "adaptive noise"],
}

Shape = tuple[int, int, int, int]
Row = dict[str, Any]
Way = Callable[[dict[str, Any], Tensor | None], Tensor]


def shape_of(text: str) -> Shape:
    """`N,B,L,D` of the command line."""
    experts, batch, length, size = (int(part) for part in text.split(","))
    return experts, batch, length, size


def problem(shape: Shape, kind: str, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Arguments of one manager with one previous state."""
    experts, batch, length, size = shape
    torch.manual_seed(0)
    states = [torch.randn(shape[1:], device=device, dtype=dtype) for _ in range(experts + 1)]
    logits = (experts, size) if kind.startswith("static") else (batch, length, experts)
    leaves = {
        "norm_weight": torch.ones(experts + 1, size, device=device),
        "norm_bias": torch.zeros(experts + 1, size, device=device),
        "logits": torch.randn(logits, device=device),
        "temperature": torch.ones(1, device=device),
        "previous_weight": torch.ones(1, size, device=device),
    }
    for leaf in (*states, *leaves.values()):
        leaf.requires_grad_()
    return {"experts": states[:experts], "previous": states[experts:], **leaves}


def eager(noisy: bool) -> Way:
    """The formula, with noise as large as all experts."""

    def run(arguments: dict[str, Any], _: Tensor | None) -> Tensor:
        state, count = arguments["experts"][0], len(arguments["experts"])
        noise = torch.randn((count, *state.shape), device=state.device) / count if noisy else None
        return aggregate(**arguments, noise=noise)

    return run


def fused(backend: str, noisy: bool) -> Way:
    """The operator with one backend."""

    def run(arguments: dict[str, Any], shared: Tensor | None) -> Tensor:
        noise = None
        if noisy:
            seed = torch.randint(2**62, (1,), device=arguments["experts"][0].device)
            noise = Philox(seed, 0, 1 / len(arguments["experts"]))
        return manager_aggregation(**arguments, noise=noise, statistics=shared, backend=backend)

    return run


def synchronise(device: str) -> None:
    """Waits for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def timed(device: str, call: Callable[[], Any], seconds: float) -> float:
    """Median seconds of a call, over as many as fit into `seconds` (3 to 50); on a GPU those of the device."""
    if device != "cuda":
        times: list[float] = []
        until = time.perf_counter() + seconds
        while len(times) < 3 or (time.perf_counter() < until and len(times) < 50):
            started = time.perf_counter()
            call()
            times.append(time.perf_counter() - started)
        return statistics.median(times)
    torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    queued = time.perf_counter() - started
    torch.cuda.synchronize()
    count = max(3, min(50, int(seconds / max(time.perf_counter() - started, 1e-5))))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for before, after in events:
        # The device sleeps until the whole call is queued: else it would wait for the host within the call.
        torch.cuda._sleep(int(2 * queued * CYCLES_PER_SECOND))
        before.record()
        call()
        after.record()
    torch.cuda.synchronize()
    return statistics.median(before.elapsed_time(after) / 1000 for before, after in events)


def copy_bandwidth(device: str) -> float:
    """Bytes read and written per second by a copy far larger than any cache."""
    source = torch.ones((2**28 if device == "cuda" else 2**25,), device=device)
    to = torch.empty_like(source)
    to.copy_(source)
    return 2 * source.nbytes / timed(device, lambda: to.copy_(source), 0.5)


class Contest:
    """All ways on one problem, taking turns."""

    def __init__(self, ways: dict[str, Way], shape: Shape, kind: str, options: Any) -> None:
        self.arguments = problem(shape, kind, options.torch_dtype, options.device)
        self.ways, self.device, self.seconds = ways, options.device, options.seconds
        self.leaves = [
            tensor
            for value in self.arguments.values()
            for tensor in (value if isinstance(value, list) else [value])
        ]
        self.grad = torch.randn_like(self.arguments["experts"][0])
        self.times: dict[str, dict[str, list[float]]] = {name: {} for name in ways}
        self.memory: dict[str, tuple[int, int | None]] = {}

    def shared(self, name: str) -> Tensor | None:
        """Statistics of the experts for a way that takes them."""
        if name in ("eager", "compiled"):
            return None
        return expert_statistics(self.arguments["experts"], backend=name)

    def both(self, name: str, shared: Tensor | None) -> None:
        """Forward and backward."""
        torch.autograd.grad(self.ways[name](self.arguments, shared), self.leaves, self.grad)

    def measure_memory(self, name: str) -> None:
        """Peak of forward and backward, and what is kept between them."""
        shared = self.shared(name)
        self.both(name, shared)  # compiles
        peak = None
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.both(name, shared)
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() - before
        way = self.ways[name]
        given = [*self.leaves, *([] if shared is None else [shared])]
        self.memory[name] = kept_bytes(lambda: way(self.arguments, shared), given), peak

    def measure_times(self, name: str) -> None:
        """One turn."""
        shared = self.shared(name)
        way, seconds = self.ways[name], self.seconds
        share = 0.0
        if shared is not None:
            share = timed(self.device, lambda: self.shared(name), seconds) / len(self.arguments["experts"])
        forward = timed(self.device, lambda: way(self.arguments, shared), seconds) + share
        out = way(self.arguments, shared)
        backward = timed(
            self.device,
            lambda: torch.autograd.grad(out, self.leaves, self.grad, retain_graph=True),
            seconds,
        )
        both = timed(self.device, lambda: self.both(name, shared), seconds) + share
        for part, value in (("forward", forward), ("backward", backward), ("both", both)):
            self.times[name].setdefault(part, []).append(value)

    def run(self, rounds: int) -> dict[str, Row]:
        """Name -> figures, or why there are none: one way's failure must not cost the figures of the others."""
        failed: dict[str, str] = {}
        for turn in range(-1, rounds):
            for name in self.ways:
                if name in failed:
                    continue
                try:
                    self.measure_memory(name) if turn < 0 else self.measure_times(name)
                except torch.OutOfMemoryError:
                    failed[name] = "out of memory"
                    torch.cuda.empty_cache()
                except Exception as error:
                    traceback.print_exc()
                    failed[name] = f"failed: {type(error).__name__}"
        rows: dict[str, Row] = {name: {"note": note} for name, note in failed.items()}
        for name in self.ways.keys() - failed.keys():
            kept, peak = self.memory[name]
            times = {f"{part}_ms": 1e3 * statistics.median(v) for part, v in self.times[name].items()}
            rows[name] = {**times, "kept_mib": kept / 2**20, "note": ""}
            rows[name]["peak_mib"] = "" if peak is None else peak / 2**20
        return rows


def floors(shape: Shape, dtype: torch.dtype, bandwidth: float) -> dict[str, float]:
    """Milliseconds that moving each byte once takes."""
    experts, state = shape[0], shape[1] * shape[2] * shape[3] * dtype.itemsize
    forward, backward = (experts + 2) * state, (2 * (experts + 1) + 1) * state
    return {
        "forward": 1e3 * forward / bandwidth,
        "backward": 1e3 * backward / bandwidth,
        "both": 1e3 * (forward + backward) / bandwidth,
    }


COLUMNS = [
    "dtype",
    "shape",
    "kind",
    "way",
    "forward_ms",
    "backward_ms",
    "both_ms",
    "forward_floor",
    "backward_floor",
    "both_floor",
    "kept_mib",
    "peak_mib",
    "copy_gb_s",
    "note",
]
IDENTITY = ("commit", "hardware", "dtype", "shape", "kind", "way")


def report(file: Path | None, rows: list[Row]) -> None:
    """Prints rows, and appends them to the file if there is one."""
    if file is not None:
        append(file, [{name: row.get(name, "") for name in COLUMNS} for row in rows])
    eager_ms = next((row["both_ms"] for row in rows if row["way"] == "eager" and not row["note"]), None)
    for row in rows:
        if row["note"]:
            print(f"  {row['way']:<10} {row['note']}")
            continue
        times = "  ".join(
            f"{part} {row[f'{part}_ms']:9.3f} ms ({row[f'{part}_floor']:4.0%})"
            for part in ("forward", "backward", "both")
        )
        times += f"  x eager {eager_ms / row['both_ms']:.2f}" if eager_ms else ""
        peak = f"  peak {row['peak_mib']:.0f} MiB" if row["peak_mib"] != "" else ""
        print(f"  {row['way']:<10} {times}  kept {row['kept_mib']:8.1f} MiB{peak}", flush=True)


def all_ways(names: list[str], noisy: bool) -> dict[str, Way]:
    """Name -> way; `compiled` shares nothing with what was compiled before."""
    ways = {name: fused(name, noisy) for name in names if name not in ("eager", "compiled")}
    if "eager" in names:
        ways = {"eager": eager(noisy), **ways}
    if "compiled" in names:
        torch._dynamo.reset()
        # The times of backward alone repeat it, so it may not overwrite what forward saved.
        torch._functorch.config.donated_buffer = False
        ways["compiled"] = torch.compile(eager(noisy), dynamic=False)
    return ways


def profile(ways: dict[str, Way], options: Any, path: Path) -> None:
    """Kernels of forward and backward of each way at the base shape, by device time."""
    activity = torch.profiler.ProfilerActivity
    with path.open("w") as file:
        for name in ways:
            contest = Contest({name: ways[name]}, (6, 64, 325, 768), "adaptive noise", options)
            shared = contest.shared(name)
            contest.both(name, shared)
            with torch.profiler.profile(activities=[activity.CPU, activity.CUDA]) as found:
                for _ in range(5):
                    contest.both(name, shared)
                synchronise(options.device)
            table = found.key_averages().table(sort_by="self_cuda_time_total", row_limit=15)
            file.write(f"== {name}\n{table}\n")


def parse() -> Any:
    """The command line."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default=default, choices=["cuda", "cpu"])
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    parser.add_argument(
        "--seconds", type=float, default=0.2, help="per figure and round (default %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shapes", nargs="+", type=shape_of, metavar="N,B,L,D")
    parser.add_argument("--kinds", nargs="+", choices=KINDS["cpu"])
    parser.add_argument("--threads", type=int, help="of torch, on a CPU")
    parser.add_argument("--ways", nargs="+")
    add_save(parser, "manager_aggregation.csv")
    parser.add_argument("--profile", type=Path, help="only write a profile to this file")
    options = parser.parse_args()
    options.dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    options.torch_dtype = getattr(torch, options.dtype)
    options.kinds = options.kinds or KINDS[options.device]
    if options.threads:
        torch.set_num_threads(options.threads)
    return options


def main() -> None:
    """Measures what the file of rows does not hold yet."""
    options = parse()
    cuda = options.device == "cuda"
    fused_names = ["triton", "cuda"] if cuda else ["cpu"]
    names = options.ways or ["eager", "compiled", *(["reference"] if cuda else []), *fused_names]
    if options.profile:
        profile(all_ways(names, noisy=True), options, options.profile)
        return
    about = surroundings()
    done = measured(options.save, IDENTITY) if options.save else set()
    bandwidth = copy_bandwidth(options.device)
    print(f"{about['hardware']}, {about['versions']}, load {about['load']}: copy {bandwidth / 1e9:.0f} GB/s")
    shapes = options.shapes or (CUDA_SHAPES if cuda else CPU_SHAPES)
    for kind in options.kinds:
        for shape in shapes:
            text = "x".join(map(str, shape))
            here = all_ways(names, kind.endswith("noise"))
            if cuda and not options.shapes and shape[1] != COMPILED_BATCH:
                here.pop("compiled", None)
            common = {
                "dtype": options.dtype,
                "shape": text,
                "kind": kind,
                "copy_gb_s": f"{bandwidth / 1e9:.1f}",
            }
            here = {
                name: way
                for name, way in here.items()
                if tuple(str({**about, **common, "way": name}[key]) for key in IDENTITY) not in done
            }
            if not here:
                continue
            print(f"N x B x L x D = {text}, {kind} (in brackets: share of the copy bandwidth)", flush=True)
            found = Contest(here, shape, kind, options).run(options.rounds)
            floor = floors(shape, options.torch_dtype, bandwidth)
            rows = []
            for name, row in found.items():
                ratios = {
                    f"{part}_floor": floor[part] / row[f"{part}_ms"] for part in floor if not row["note"]
                }
                rows.append({**common, "way": name, **row, **ratios})
            report(options.save, sorted(rows, key=lambda row: names.index(row["way"])))


if __name__ == "__main__":
    main()
