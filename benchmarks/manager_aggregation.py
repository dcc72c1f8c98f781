"""Manager aggregation: time and memory of each backend beside plain PyTorch, and the floor that memory sets.

    python -m benchmarks.manager_aggregation [--device cuda] [--dtype bfloat16] [--seconds S]
        [--results FILE] [--shapes B,L,D ...] [--ways NAME ...] [--profile FILE]

For each shape all ways take turns in one process, several rounds; times are medians of a call's time. Ways:

    eager      the formula by autograd, noise from torch.randn (kernels.manager_aggregation.reference.aggregate)
    compiled   torch.compile of eager, static shapes
    reference, cpu, triton, cuda    the operator with this backend, noise made inside

The operator's times include a sixth of the experts' statistics, which six managers share. The floor is the time to
read every expert, the previous state (and in backward the gradient) once and to write every result once, at the
bandwidth of a copy measured in the same run. `kept` are the bytes that forward leaves for backward, beyond its inputs
and its result; `peak` is the most that forward and backward allocate, results included (CUDA only).
Rows that FILE holds already for this commit, device and dtype are not measured again.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import RESULTS, append, measured, surroundings
from mt_deepspeed.kernels.manager_aggregation import Philox, expert_statistics, manager_aggregation
from mt_deepspeed.kernels.manager_aggregation.dispatch import BACKENDS
from mt_deepspeed.kernels.manager_aggregation.reference import aggregate

NUM_EXPERTS, MANAGERS = 6, 6
# B, L, D: texts of 50 tokens, images of 288 (base) and 294 pixels (large), and of 384 pixels.
CUDA_SHAPES = [
    *((b, tokens, 768) for b in (8, 64, 256) for tokens in (50, 325, 577)),
    *((b, tokens, 1024) for b in (8, 64, 256) for tokens in (50, 442, 577)),
]
CPU_SHAPES = [(8, 50, 768), (8, 325, 768), (8, 577, 1024)]
COMPILED_BATCH = {"cuda": 64, "cpu": 8}  # compiling each shape would take longer than measuring it
KINDS = ["static", "adaptive"]

Row = dict[str, Any]
Way = Callable[[dict[str, Any], Tensor | None], Tensor]


def problem(shape: tuple[int, int, int], kind: str, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Arguments of one manager with one previous state."""
    batch, length, size = shape
    torch.manual_seed(0)
    states = [torch.randn(shape, device=device, dtype=dtype) for _ in range(NUM_EXPERTS + 1)]
    logits = (NUM_EXPERTS, size) if kind == "static" else (batch, length, NUM_EXPERTS)
    leaves = {
        "norm_weight": torch.ones(NUM_EXPERTS + 1, size, device=device),
        "norm_bias": torch.zeros(NUM_EXPERTS + 1, size, device=device),
        "logits": torch.randn(logits, device=device),
        "temperature": torch.ones(1, device=device),
        "previous_weight": torch.ones(1, size, device=device),
    }
    for leaf in (*states, *leaves.values()):
        leaf.requires_grad_()
    return {"experts": states[:NUM_EXPERTS], "previous": states[NUM_EXPERTS:], **leaves}


def eager(arguments: dict[str, Any], _: Tensor | None) -> Tensor:
    """The formula, with noise as large as all experts."""
    state = arguments["experts"][0]
    noise = torch.randn((NUM_EXPERTS, *state.shape), device=state.device) / NUM_EXPERTS
    return aggregate(**arguments, noise=noise)


def fused(backend: str) -> Way:
    """The operator with one backend."""

    def run(arguments: dict[str, Any], shared: Tensor | None) -> Tensor:
        seed = torch.randint(2**62, (1,), device=arguments["experts"][0].device)
        noise = Philox(seed, 0, 1 / NUM_EXPERTS)
        return manager_aggregation(**arguments, noise=noise, statistics=shared, backend=backend)

    return run


def synchronise(device: str) -> None:
    """Waits for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def timed(device: str, call: Callable[[], Any], seconds: float) -> float:
    """Median seconds of a call, over as many as fit into `seconds` (3 to 50)."""
    if device != "cuda":
        times = []
        until = time.perf_counter() + seconds
        while len(times) < 3 or (time.perf_counter() < until and len(times) < 50):
            started = time.perf_counter()
            call()
            times.append(time.perf_counter() - started)
        return statistics.median(times)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    marks[0].record()
    call()
    marks[1].record()
    torch.cuda.synchronize()
    count = max(3, min(50, int(seconds * 1000 / max(marks[0].elapsed_time(marks[1]), 0.01))))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(first.elapsed_time(second) / 1000 for first, second in pairwise(events))


def copy_bandwidth(device: str) -> float:
    """Bytes read and written per second by a copy far larger than any cache."""
    source = torch.ones((2**28 if device == "cuda" else 2**25,), device=device)
    to = torch.empty_like(source)
    to.copy_(source)
    return 2 * source.nbytes / timed(device, lambda: to.copy_(source), 0.5)


def kept_bytes(arguments: dict[str, Any], way: Way, shared: Tensor | None) -> int:
    """Bytes that forward saves for backward and that did not exist before; the result does not count."""
    known = {
        tensor.untyped_storage().data_ptr()
        for value in (*arguments.values(), shared)
        for tensor in (value if isinstance(value, list) else [value])
        if isinstance(tensor, Tensor)
    }
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = way(arguments, shared)
    kept.pop(out.untyped_storage().data_ptr(), None)
    return sum(kept.values())


class Contest:
    """All ways on one problem, taking turns."""

    def __init__(self, ways: dict[str, Way], shape: tuple[int, int, int], kind: str, options: Any) -> None:
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
        self.memory[name] = kept_bytes(self.arguments, self.ways[name], shared), peak

    def measure_times(self, name: str) -> None:
        """One turn."""
        shared = self.shared(name)
        way, seconds = self.ways[name], self.seconds
        share = 0.0
        if shared is not None:
            share = timed(self.device, lambda: self.shared(name), seconds) / MANAGERS
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
        """Name -> figures; a way that runs out of memory says so."""
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
        rows: dict[str, Row] = {name: {"note": note} for name, note in failed.items()}
        for name in self.ways.keys() - failed.keys():
            kept, peak = self.memory[name]
            times = {f"{part}_ms": 1e3 * statistics.median(v) for part, v in self.times[name].items()}
            rows[name] = {**times, "kept_mib": kept / 2**20, "note": ""}
            rows[name]["peak_mib"] = "" if peak is None else peak / 2**20
        return rows


def floors(shape: tuple[int, int, int], dtype: torch.dtype, bandwidth: float) -> dict[str, float]:
    """Milliseconds that moving each byte once takes."""
    state = shape[0] * shape[1] * shape[2] * dtype.itemsize
    forward, backward = (NUM_EXPERTS + 2) * state, (2 * (NUM_EXPERTS + 1) + 1) * state
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


def report(path: Path, rows: list[Row]) -> None:
    """Appends rows to the file and prints them."""
    append(path, [{name: row.get(name, "") for name in COLUMNS} for row in rows])
    for row in rows:
        if row["note"]:
            print(f"  {row['way']:<10} {row['note']}")
            continue
        times = "  ".join(
            f"{part} {row[f'{part}_ms']:9.3f} ms ({row[f'{part}_floor']:4.0%})"
            for part in ("forward", "backward", "both")
        )
        peak = f"  peak {row['peak_mib']:.0f} MiB" if row["peak_mib"] != "" else ""
        print(f"  {row['way']:<10} {times}  kept {row['kept_mib']:8.1f} MiB{peak}", flush=True)


def profile(ways: dict[str, Way], options: Any, path: Path) -> None:
    """Kernels of forward and backward of each way at the base shape, by device time."""
    activity = torch.profiler.ProfilerActivity
    with path.open("w") as file:
        for name in ways:
            contest = Contest({name: ways[name]}, (64, 325, 768), "adaptive", options)
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
    parser.add_argument("--shapes", nargs="+", help="B,L,D")
    parser.add_argument("--ways", nargs="+")
    parser.add_argument("--results", type=Path, default=RESULTS / "manager_aggregation.csv")
    parser.add_argument("--profile", type=Path, help="only write a profile to this file")
    options = parser.parse_args()
    options.dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    options.torch_dtype = getattr(torch, options.dtype)
    return options


def main() -> None:
    """Measures what the results do not hold yet."""
    options = parse()
    cuda = options.device == "cuda"
    fused_names = [name for name in (["triton", "cuda"] if cuda else ["cpu"]) if name in BACKENDS]
    names = options.ways or ["eager", "compiled", "reference", *fused_names]
    ways: dict[str, Way] = {name: fused(name) for name in names if name not in ("eager", "compiled")}
    if "eager" in names:
        ways = {"eager": eager, **ways}
    if options.profile:
        profile(ways, options, options.profile)
        return
    about = surroundings()
    done = measured(options.results, IDENTITY)
    bandwidth = copy_bandwidth(options.device)
    print(f"{about['hardware']}, {about['versions']}, load {about['load']}: copy {bandwidth / 1e9:.0f} GB/s")
    shapes = (
        [tuple(int(part) for part in text.split(",")) for text in options.shapes]
        if options.shapes
        else (CUDA_SHAPES if cuda else CPU_SHAPES)
    )
    for shape in shapes:
        for kind in KINDS:
            text = "x".join(map(str, shape))
            here = dict(ways)
            if "compiled" in names and (options.shapes or shape[0] == COMPILED_BATCH[options.device]):
                torch._dynamo.reset()
                here["compiled"] = torch.compile(eager, dynamic=False)
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
            print(f"B x L x D = {text}, {kind} (in brackets: share of the copy bandwidth)", flush=True)
            found = Contest(here, shape, kind, options).run(options.rounds)
            floor = floors(shape, options.torch_dtype, bandwidth)
            rows = []
            for name, row in found.items():
                ratios = {
                    f"{part}_floor": floor[part] / row[f"{part}_ms"] for part in floor if not row["note"]
                }
                rows.append({**common, "way": name, **row, **ratios})
            report(options.results, sorted(rows, key=lambda row: names.index(row["way"])))


if __name__ == "__main__":
    main()
