"""Which backend computes: the caller's wish, else `using`'s, else `MT_KERNELS`, else the best for the device.

A wish that cannot be granted is an error. Without one, what the fused backend of the device cannot do (float64,
more than 24 experts, no compiler, ...) is left to `reference`, or on a CPU to autograd through the formula.
Each choice is logged once.
"""

import importlib
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from mt_deepspeed.kernels.manager_aggregation import build

log = logging.getLogger(__name__)

BACKENDS = {"reference": "reference", "cpu": "cpu_impl", "triton": "triton_impl", "cuda": "cuda_impl"}
"""Name -> module of this package; its packages are only imported when it is used."""

VARIABLE = "MT_KERNELS"

_used: ContextVar[str] = ContextVar("manager_aggregation_backend", default="")


@contextmanager
def using(backend: str) -> Iterator[None]:
    """Inside, `backend` is asked for wherever no argument names one, whatever `MT_KERNELS` says."""
    token = _used.set(backend)
    try:
        yield
    finally:
        _used.reset(token)


def module(name: str) -> ModuleType:
    """The backend `name`."""
    return importlib.import_module(f"{__package__}.{BACKENDS[name]}")


def wish(backend: str | None) -> str | None:
    """The backend asked for by argument, `using` or environment, None when it is left open (`auto`)."""
    asked = backend or _used.get() or os.environ.get(VARIABLE) or "auto"
    if asked != "auto" and asked not in BACKENDS:
        source = "backend" if backend else "using" if _used.get() else VARIABLE
        raise ValueError(f"{source}: found {asked!r}, expected auto or one of {sorted(BACKENDS)}")
    return None if asked == "auto" else asked


def chosen(experts: list[Tensor], num_previous: int, backend: str | None) -> ModuleType:
    """The backend that computes with these experts `[T, D]` and this number of previous states.

    Raises:
        ValueError: The one that was asked for does not exist or cannot.
    """
    asked = wish(backend)
    if asked is not None:
        if reason := _reason_against(asked, experts, num_previous):
            raise ValueError(f"manager_aggregation: backend {asked} was asked for, but {reason}")
        _log_once(asked, "asked for")
        return module(asked)
    reasons: list[str] = []
    for name in preferred(experts[0].device.type):
        reason = _reason_against(name, experts, num_previous)
        if reason is None:
            _log_once(name, "; ".join(reasons) or f"default on {experts[0].device.type}")
            return module(name)
        reasons.append(f"{name}: {reason}")
    raise AssertionError("the reference supports everything")


def by_autograd(experts: Sequence[Tensor], num_previous: int, backend: str | None) -> bool:
    """Whether the formula is left to autograd: on a CPU, where nobody asked for anything and `cpu` cannot compute.

    Torch's fused layer norm and its derivative there take less than half the time of `reference`.
    """
    if not experts or experts[0].device.type != "cpu" or wish(backend) is not None:
        return False
    return _reason_for_autograd(experts[0].dtype, len(experts) + num_previous) is not None


@torch.compiler.assume_constant_result
def _reason_for_autograd(dtype: torch.dtype, num_states: int) -> str | None:
    reason: str | None = module("cpu").unsuited(dtype, num_states)
    if reason is not None:
        _log_once("autograd through the formula", f"cpu: {reason}")
    return reason


def _reason_against(name: str, experts: list[Tensor], num_previous: int) -> str | None:
    try:
        backend = module(name)
    except ImportError as error:
        return str(error)
    reason: str | None = backend.unsupported(experts, num_previous)
    return reason


def preferred(device_type: str) -> list[str]:
    """Backends for a kind of device, best first; CUDA C++ only if it was built ahead: nvcc takes a minute."""
    compiled = ["cuda"] if build.BUILT_AHEAD.exists() else []
    fused = {"cuda": [*compiled, "triton"], "cpu": ["cpu"]}.get(device_type, [])
    return [*fused, "reference"]


@lru_cache(maxsize=64)
def _log_once(name: str, why: str) -> None:
    log.info("manager aggregation: %s (%s)", name, why)
