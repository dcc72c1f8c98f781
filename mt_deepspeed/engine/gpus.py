"""GPUs: memory and arithmetic peak, from the vendor's data sheets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU."""

    pattern: str
    """Part of the name the driver gives it."""
    memory_gib: float
    """What CUDA offers a program on an empty card: a little less than the data sheet's memory."""
    tflops: float
    """Dense half-precision peak (bf16 where the card has it), without sparsity, in TFLOP/s."""
    has_bf16: bool = True


GPUS = {
    "b200": Gpu("B200", 178.0, 2250.0),
    "gh200": Gpu("GH200", 94.0, 989.0),
    "h200": Gpu("H200", 139.0, 989.0),
    "h100-pcie": Gpu("H100 PCIe", 79.0, 756.0),
    "h100": Gpu("H100", 79.0, 989.0),
    "a100-80": Gpu("A100", 79.0, 312.0),
    "a100-40": Gpu("A100", 39.0, 312.0),
    "l40s": Gpu("L40S", 44.0, 362.0),
    "l40": Gpu("L40", 44.0, 181.0),
    "l4": Gpu("L4", 22.0, 121.0),
    "a40": Gpu("A40", 44.0, 150.0),
    "a30": Gpu("A30", 23.5, 165.0),
    "a10": Gpu("A10", 22.0, 125.0),
    "rtx4090": Gpu("RTX 4090", 23.5, 165.0),
    "rtx3090": Gpu("RTX 3090", 23.5, 71.0),
    "v100-32": Gpu("V100", 31.5, 125.0, has_bf16=False),
    "v100-16": Gpu("V100", 15.5, 125.0, has_bf16=False),
    "t4": Gpu("T4", 14.5, 65.0, has_bf16=False),
}
"""Short name -> GPU; the first whose `pattern` a device name holds is the one. Sources: NVIDIA's data sheets
(nvidia.com/en-us/data-center/<name>; consumer cards: the Ada and Ampere white papers), SXM variants where several
exist. They state memory in GB; 1 GiB is 1.074 GB, and the driver and error correction take some."""


def peak_tflops(device_name: str) -> float | None:
    """Half-precision peak of a GPU by the name the driver gives it; None if unknown."""
    return next((gpu.tflops for gpu in GPUS.values() if gpu.pattern in device_name), None)
