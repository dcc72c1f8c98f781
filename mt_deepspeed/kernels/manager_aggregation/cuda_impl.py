"""Manager aggregation in CUDA C++ (csrc/); see the package's docstring for what a backend is.

The compiled library is called through ctypes with pointers and torch's current stream.
"""

import ctypes
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mt_deepspeed.kernels.manager_aggregation import build
from mt_deepspeed.kernels.manager_aggregation.protocol import Arguments, Gradients

MAX_EXPERTS, MAX_STATES, MAX_SIZE, MAX_TOKENS = 24, 32, 2048, 2**25
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
DEVICE = "cuda"  # tests run the same code on the CPU
_TEXTS = ("mt_statistics", "mt_forward", "mt_plan_backward", "mt_backward", "mt_unusable", "mt_sources")
_GRADIENTS = (
    "norm_weight_grad",
    "norm_bias_grad",
    "logits_grad",
    "temperature_grad",
    "previous_weight_grad",
)
_NO_NOISE, _GIVEN, _PHILOX = 0, 1, 2


class _Problem(ctypes.Structure):
    """`Problem` of csrc/problem.h."""

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
                *_GRADIENTS,
                "partial",
                "partial_temperature",
            )
        ),
        ("num_tokens", ctypes.c_int),
        ("size", ctypes.c_int),
        ("num_experts", ctypes.c_int),
        ("num_previous", ctypes.c_int),
        ("adaptive", ctypes.c_int),
        ("noise_kind", ctypes.c_int),
        ("offset", ctypes.c_uint),
        ("noise_scale", ctypes.c_float),
        ("eps", ctypes.c_float),
        ("num_blocks", ctypes.c_int),
        ("num_rows", ctypes.c_int),
        ("row_floats", ctypes.c_int),
        ("shared_rows", ctypes.c_int),
        ("shared_bytes", ctypes.c_int),
    ]


def unsupported(experts: list[Tensor], num_previous: int) -> str | None:
    """See the package's docstring."""
    (tokens, size), device = experts[0].shape, experts[0].device
    if device.type != DEVICE:
        return f"found tensors on {device.type}, expected {DEVICE}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return f"found {torch.cuda.get_device_name(device)}, expected compute capability 8.0 or newer"
    if experts[0].dtype not in KINDS:
        return f"found {experts[0].dtype}, expected float32, bfloat16 or float16"
    if size % 8 or size > MAX_SIZE:
        return f"found {size} channels, expected a multiple of 8 up to {MAX_SIZE}"
    if tokens > MAX_TOKENS:
        return f"found {tokens} tokens, expected at most {MAX_TOKENS}"
    if len(experts) > MAX_EXPERTS or len(experts) + num_previous > MAX_STATES:
        return (
            f"found {len(experts)} experts and {num_previous} previous states, expected at most "
            f"{MAX_EXPERTS} experts and {MAX_STATES} states together"
        )
    return _unusable(device.index or 0) if device.type == "cuda" else None


@lru_cache(maxsize=16)
def _unusable(device: int) -> str | None:
    """Why there is no library, or the device cannot run it, or None; the first call may compile it."""
    try:
        with torch.cuda.device(device):
            reason = _library().mt_unusable()
    except (build.BuildError, OSError) as error:
        return str(error)
    return None if reason is None else f"its library cannot run on device {device}: {reason.decode()}"


def statistics(states: list[Tensor], eps: float) -> Tensor:
    """See the package's docstring."""
    tokens, size = states[0].shape
    out = states[0].new_empty((2, len(states), tokens), dtype=torch.float32)
    if tokens:
        problem = _Problem(num_tokens=tokens, size=size, num_experts=len(states), eps=eps)
        with _Call(problem, states[0]) as call:
            call.set_states("states", states)
            call.set_outputs(previous_statistics=out)
            call("mt_statistics")
    return out


def forward(a: Arguments) -> tuple[Tensor, Tensor]:
    """See the package's docstring."""
    tokens = a.experts[0].shape[0]
    out = torch.empty_like(a.experts[0])
    previous_statistics = a.statistics.new_empty((2, len(a.previous), tokens))
    if tokens:
        with _Call(_problem(a), a.experts[0]) as call:
            _set_common(call, a)
            call.set_outputs(out=out, previous_statistics=previous_statistics)
            call("mt_forward")
    return out, previous_statistics


def backward(a: Arguments, previous_statistics: Tensor, grad: Tensor) -> Gradients:
    """See the package's docstring."""
    n = len(a.experts)
    states = [torch.empty_like(state) for state in (*a.experts, *a.previous)]
    parameters = [
        one.new_empty(one.shape)
        for one in (a.norm_weight, a.norm_bias, a.logits, a.temperature, a.previous_weight)
    ]
    with _Call(_problem(a), a.experts[0]) as call:
        call("mt_plan_backward")
        plan = call.problem
        partial = a.norm_weight.new_empty((plan.num_blocks, plan.num_rows, plan.row_floats))
        partial_temperature = a.norm_weight.new_empty((plan.num_blocks,))
        _set_common(call, a)
        call.set(grad=grad, previous_statistics=previous_statistics)
        call.set_states("state_grads", states)
        call.set_outputs(partial=partial, partial_temperature=partial_temperature)
        call.set_outputs(**dict(zip(_GRADIENTS, parameters, strict=True)))
        call("mt_backward")
    return Gradients(states[:n], states[n:], *parameters)


def _problem(a: Arguments) -> _Problem:
    tokens, size = a.experts[0].shape
    return _Problem(
        num_tokens=tokens,
        size=size,
        num_experts=len(a.experts),
        num_previous=len(a.previous),
        adaptive=a.adaptive,
        noise_kind=_GIVEN if a.noise is not None else _PHILOX if a.seed is not None else _NO_NOISE,
        offset=a.offset,
        noise_scale=a.noise_scale,
        eps=a.eps,
    )


def _set_common(call: "_Call", a: Arguments) -> None:
    call.set_states("states", [*a.experts, *a.previous])
    call.set(
        statistics=a.statistics,
        norm_weight=a.norm_weight,
        norm_bias=a.norm_bias,
        logits=a.logits,
        temperature=a.temperature,
        previous_weight=a.previous_weight,
        noise=None if a.noise is None else a.noise.float(),
        seed=a.seed,
    )


class _Call:
    """Fills a problem with tensors, keeps these alive, and calls the library on their device and its current stream."""

    def __init__(self, problem: _Problem, state: Tensor) -> None:
        self.problem = problem
        self.kind = KINDS[state.dtype]
        self.device = state.device
        self.kept: list[Tensor] = []
        self.guard = torch.cuda.device_of(state)

    def __enter__(self) -> "_Call":
        self.guard.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        self.guard.__exit__(*raised)
        self.kept.clear()

    def _readable(self, tensor: Tensor) -> int:
        tensor = tensor.contiguous()
        if tensor.data_ptr() % 16:  # a view into the middle of something
            tensor = tensor.clone()
        self.kept.append(tensor)
        return tensor.data_ptr()

    def set(self, **tensors: Tensor | None) -> None:
        for name, tensor in tensors.items():
            setattr(self.problem, name, None if tensor is None else self._readable(tensor))

    def set_outputs(self, **tensors: Tensor) -> None:
        for name, tensor in tensors.items():
            assert tensor.is_contiguous(), f"{name}: a copy of an output would be lost"
            setattr(self.problem, name, tensor.data_ptr())

    def set_states(self, name: str, states: list[Tensor]) -> None:
        pointers = getattr(self.problem, name)
        for i, state in enumerate(states):
            pointers[i] = self._readable(state)

    def __call__(self, name: str) -> None:
        stream = torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else None
        function = getattr(_library(), name)
        error = function(
            ctypes.byref(self.problem), self.kind, self.device.index or 0, ctypes.c_void_p(stream)
        )
        if error:
            raise RuntimeError(f"manager_aggregation: {name} failed: {error.decode()}")


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    return load(str(build.library()), build.sources_digest())


def load(path: str, sources: str | None = None) -> ctypes.CDLL:
    """Opens the compiled library.

    Raises:
        BuildError: It was made of other sources than `sources`.
    """
    library = ctypes.CDLL(path)
    for name in _TEXTS:
        getattr(library, name).restype = ctypes.c_char_p
    if sources is not None and library.mt_sources().decode() != sources:
        raise build.BuildError(
            f"{path} was built from other sources: build it again (python -m {build.__name__}) or remove it"
        )
    size = library.mt_problem_bytes()
    assert size == ctypes.sizeof(_Problem), f"{path}: struct Problem has {size} bytes"
    return library
