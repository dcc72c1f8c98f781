"""Manager aggregation in C++ for CPUs (csrc/cpu.cpp); see the package's docstring for what a backend is.

The compiled library is called through ctypes with pointers and torch's number of threads.
"""

import ctypes
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mt_deepspeed.kernels.manager_aggregation import build
from mt_deepspeed.kernels.manager_aggregation.protocol import Arguments, Gradients

MAX_STATES = 32
DTYPES = (torch.float32, torch.bfloat16)


class _Problem(ctypes.Structure):
    """`Problem` of csrc/cpu.cpp."""

    _fields_ = [
        ("states", ctypes.c_void_p * MAX_STATES),
        ("state_grads", ctypes.c_void_p * MAX_STATES),
        *(
            (name, ctypes.c_void_p)
            for name in (
                "grad",
                "out",
                "statistics",
                "previous_statistics",
                "norm_weight",
                "norm_bias",
                "logits",
                "temperature",
                "previous_weight",
                "noise",
                "seed",
                "norm_weight_grad",
                "norm_bias_grad",
                "logits_grad",
                "temperature_grad",
                "previous_weight_grad",
                "partial",
            )
        ),
        ("num_tokens", ctypes.c_int64),
        ("size", ctypes.c_int32),
        ("num_experts", ctypes.c_int32),
        ("num_previous", ctypes.c_int32),
        ("adaptive", ctypes.c_int32),
        ("offset", ctypes.c_uint32),
        ("noise_scale", ctypes.c_float),
        ("eps", ctypes.c_float),
        ("threads", ctypes.c_int32),
    ]


def unsupported(experts: list[Tensor], num_previous: int) -> str | None:
    """See the package's docstring."""
    if experts[0].device.type != "cpu":
        return f"found tensors on {experts[0].device.type}, expected cpu"
    return unsuited(experts[0].dtype, len(experts) + num_previous)


def unsuited(dtype: torch.dtype, num_states: int) -> str | None:
    """Why tensors on the CPU cannot be computed with, or None."""
    if dtype not in DTYPES:
        return f"found {dtype}, expected float32 or bfloat16"
    if num_states > MAX_STATES:
        return f"found {num_states} experts and previous states, expected at most {MAX_STATES}"
    return _missing()


@lru_cache(maxsize=1)
def _missing() -> str | None:
    """Why there is no library, or None; the first call compiles it."""
    try:
        _library()
    except (build.BuildError, OSError) as error:
        return str(error)
    return None


def statistics(states: list[Tensor], eps: float) -> Tensor:
    """See the package's docstring."""
    out = torch.empty((2, len(states), states[0].shape[0]))
    problem = _shaped(states, eps)
    _fill(problem, previous_statistics=out)
    _library().mt_cpu_statistics(ctypes.byref(problem), states[0].dtype == torch.bfloat16)
    return out


def forward(a: Arguments) -> tuple[Tensor, Tensor]:
    """See the package's docstring."""
    out = torch.empty_like(a.experts[0])
    previous_statistics = torch.empty((2, len(a.previous), out.shape[0]))
    problem, _kept = _problem(a)
    _fill(problem, out=out, previous_statistics=previous_statistics)
    _library().mt_cpu_forward(ctypes.byref(problem), out.dtype == torch.bfloat16)
    return out, previous_statistics


def backward(a: Arguments, previous_statistics: Tensor, grad: Tensor) -> Gradients:
    """See the package's docstring."""
    states = [torch.empty_like(state) for state in (*a.experts, *a.previous)]
    parameters = [
        torch.empty(one.shape)
        for one in (a.norm_weight, a.norm_bias, a.logits, a.temperature, a.previous_weight)
    ]
    problem, _kept = _problem(a)
    for i, state in enumerate(states):
        problem.state_grads[i] = state.data_ptr()
    names = ("norm_weight_grad", "norm_bias_grad", "logits_grad", "temperature_grad", "previous_weight_grad")
    partial = torch.empty(_library().mt_cpu_partial_size(ctypes.byref(problem)))
    _fill(problem, grad=grad, previous_statistics=previous_statistics, partial=partial)
    _fill(problem, **dict(zip(names, parameters, strict=True)))
    _library().mt_cpu_backward(ctypes.byref(problem), grad.dtype == torch.bfloat16)
    n = len(a.experts)
    return Gradients(states[:n], states[n:], *parameters)


def _shaped(states: list[Tensor], eps: float) -> _Problem:
    tokens, size = states[0].shape
    problem = _Problem(
        num_tokens=tokens, size=size, num_experts=len(states), eps=eps, threads=torch.get_num_threads()
    )
    for i, state in enumerate(states):
        problem.states[i] = state.data_ptr()
    return problem


def _problem(a: Arguments) -> tuple[_Problem, list[Tensor]]:
    """The arguments, and tensors that must live as long as they are used."""
    problem = _shaped([*a.experts, *a.previous], a.eps)
    problem.num_experts, problem.num_previous = len(a.experts), len(a.previous)
    problem.adaptive, problem.offset, problem.noise_scale = a.adaptive, a.offset, a.noise_scale
    given = {
        "statistics": a.statistics,
        "norm_weight": a.norm_weight.contiguous(),
        "norm_bias": a.norm_bias.contiguous(),
        "logits": a.logits.contiguous(),
        "temperature": a.temperature,
        "previous_weight": a.previous_weight.contiguous(),
    }
    if a.noise is not None:
        given["noise"] = a.noise.float()
    elif a.seed is not None:
        given["seed"] = a.seed
    _fill(problem, **given)
    return problem, list(given.values())


def _fill(problem: _Problem, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        setattr(problem, name, tensor.data_ptr())


@lru_cache(maxsize=1)
def _library() -> Any:
    path = build.cpu_library(_openmp())
    try:
        library = ctypes.CDLL(str(path))
    except OSError:  # damaged in the cache
        path.unlink(missing_ok=True)
        library = ctypes.CDLL(str(build.cpu_library(_openmp())))
    library.mt_cpu_partial_size.restype = ctypes.c_int64
    size = library.mt_cpu_problem_bytes()
    assert size == ctypes.sizeof(_Problem), f"struct Problem has {size} bytes"
    return library


def _openmp() -> str | None:
    """Torch's own OpenMP library, where it goes by another name than the compiler's.

    Two of them in a process would each keep threads, and torch's wait for work by spinning.
    """
    found = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    return str(found[0]) if found and found[0].name != "libgomp.so.1" else None
