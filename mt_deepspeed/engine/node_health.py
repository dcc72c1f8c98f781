"""What one node can say about itself: its name, its driver, its GPU."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import time
from pathlib import Path

import torch

SIZE = 4096
"""Side of the matrices that are multiplied."""


def node_name() -> str:
    """The name the batch system knows the node by, else the host's name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def driver_version() -> str:
    """Version of NVIDIA's kernel driver, `none` where there is none."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text("utf-8")
    except OSError:
        return "none"
    match = re.search(r"Kernel Module\D*([\d.]+)", text)
    return match[1] if match else "unknown"


def gpu_fault(local_rank: int) -> tuple[str | None, float | None]:
    """What is wrong with this rank's GPU, and its speed in a half-precision matrix product (TFLOP/s).

    Without any sign of a GPU, (None, None): a CPU run.
    """
    if not _expects_gpu():
        return None, None
    if not torch.cuda.is_available():
        return (
            "a GPU is there or was asked for, but CUDA cannot use it: see nvidia-smi and dmesg on the node",
            None,
        )
    errors = _uncorrected_errors()
    if errors:
        return (
            f"{errors} memory errors that could not be corrected since the driver started (nvidia-smi -q)",
            None,
        )
    try:
        return _try_gpu(torch.device("cuda", local_rank % torch.cuda.device_count()))
    except RuntimeError as error:
        return f"the GPU fails: {str(error).splitlines()[0]}", None


def _expects_gpu() -> bool:
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return False
    asked = os.environ.get("SLURM_JOB_GPUS") or os.environ.get("SLURM_GPUS_ON_NODE")
    return bool(asked) or torch.cuda.is_available() or Path("/proc/driver/nvidia/version").exists()


def _uncorrected_errors() -> int:
    """Volatile uncorrected ECC errors of the node's visible GPUs; 0 where the driver does not count them."""
    query = ["nvidia-smi", "--query-gpu=ecc.errors.uncorrected.volatile.total", "--format=csv,noheader"]
    try:
        text = subprocess.run(query, capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(int(line) for line in text.splitlines() if line.strip().isdigit())


def _try_gpu(device: torch.device) -> tuple[str | None, float]:
    """Multiplies matrices whose product is known; speed is that of the fastest of a few tries."""
    ones = torch.ones(SIZE, SIZE, dtype=torch.float16, device=device)
    times = []
    for _ in range(8):
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        product = ones @ ones
        torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    wrong = int((product != SIZE).sum())
    fault = f"{wrong} of {product.numel()} elements of a matrix product are wrong" if wrong else None
    return fault, 2 * SIZE**3 / min(times) / 1e12
