"""Arguments of the manager aggregation, and its result and gradients in float64 to compare with."""

from __future__ import annotations

import os
import shlex
import shutil
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mt_deepspeed.kernels.manager_aggregation import Philox, cpu_impl, manager_aggregation, philox_normal
from mt_deepspeed.kernels.manager_aggregation.reference import aggregate

# Largest difference to float64 that rounding explains, relative to the largest element: the result and the
# gradients of states are rounded to the dtype once, all else is float32.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 6e-4, torch.bfloat16: 5e-3}


def needs_cpu_library() -> None:
    """Skips a test where there is no C++ compiler; one that cannot compile the library is a failure."""
    compiler = shlex.split(os.environ.get("CXX") or "g++")[0]
    if shutil.which(compiler) is None:
        pytest.skip(f"found no C++ compiler {compiler!r}")
    assert cpu_impl.unsuited(torch.float32, 1) is None


@dataclass(frozen=True)
class Case:
    """Sizes and kind of one call."""

    num_experts: int = 3
    num_previous: int = 1
    shape: tuple[int, int, int] = (2, 3, 16)
    adaptive: bool = False
    scalar: bool = False
    noise: str = "none"
    """none, given (a tensor) or own (made by the kernel)."""
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def arguments(self, device: str = "cpu") -> dict[str, Any]:
        """Keyword arguments of `manager_aggregation`; states in `dtype`, all else in float32 (or float64)."""
        n, p, size = self.num_experts, self.num_previous, self.shape[-1]
        generator = torch.Generator().manual_seed(self.seed)
        exact = torch.promote_types(self.dtype, torch.float32)

        def normal(*shape: int, dtype: torch.dtype = exact) -> Tensor:
            # Drawn in float32, so that all dtypes start from the same numbers.
            return torch.randn(shape, generator=generator).to(dtype).to(device)

        def state() -> Tensor:
            return normal(*self.shape, dtype=self.dtype) * 1.5 + 0.5

        logits = normal(*self.shape[:-1], n) if self.adaptive else normal(n, 1 if self.scalar else size)
        made: dict[str, Any] = {
            "experts": [state() for _ in range(n)],
            "previous": [state() for _ in range(p)],
            "norm_weight": normal(n + p, size),
            "norm_bias": normal(n + p, size),
            "logits": logits,
            "temperature": torch.tensor([0.7], dtype=exact, device=device),
            "previous_weight": normal(p, 1 if self.scalar else size) if p else None,
            "noise": None,
        }
        if self.noise == "given":
            made["noise"] = normal(n, *self.shape) / n
        elif self.noise == "own":
            made["noise"] = Philox(torch.tensor([2**61 + 12345 + self.seed], device=device), 7, 1 / n)
        return made


def materialised(noise: Any, num_experts: int, shape: tuple[int, ...]) -> Any:
    """Noise as a float64 tensor, whoever makes it."""
    if not isinstance(noise, Philox):
        return noise
    tokens = shape[0] * shape[1]
    normals = philox_normal(noise.seed, noise.offset, num_experts, tokens, shape[2], torch.float64)
    return noise.scale * normals.view(num_experts, *shape)


def differentiated(run: Any, arguments: dict[str, Any]) -> dict[str, Tensor]:
    """Result and gradients by name, for a fixed random gradient of the result."""
    leaves: dict[str, Tensor] = {}
    for name, value in arguments.items():
        if isinstance(value, list):
            leaves |= {f"{name}.{i}": one for i, one in enumerate(value)}
        elif isinstance(value, Tensor) and name not in ("noise", "statistics"):
            leaves[name] = value
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    call = {
        name: [leaves[f"{name}.{i}"] for i in range(len(value))]
        if isinstance(value, list)
        else leaves.get(name, value)
        for name, value in arguments.items()
    }
    out = run(**call)
    generator = torch.Generator().manual_seed(99)
    grad = torch.randn(out.shape, generator=generator).bfloat16().to(out.device, out.dtype)
    grads = torch.autograd.grad(out, list(leaves.values()), grad)
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


def truth(arguments: dict[str, Any]) -> dict[str, Tensor]:
    """The same by autograd through the formula, in float64 on the CPU."""
    noise = materialised(arguments["noise"], len(arguments["experts"]), arguments["experts"][0].shape)

    def exact(value: Any) -> Any:
        if isinstance(value, list):
            return [exact(one) for one in value]
        return value.cpu().double() if isinstance(value, Tensor) else value

    return differentiated(aggregate, {k: exact(v) for k, v in {**arguments, "noise": noise}.items()})


def check(case: Case, backend: str, device: str = "cpu", slack: float = 1.0, **more: Any) -> None:
    """Compares result and every gradient of a backend with the truth, within `slack` times the tolerance."""
    arguments = case.arguments(device)
    found = differentiated(lambda **call: manager_aggregation(**call, backend=backend, **more), arguments)
    expected = truth(arguments)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        rounded = name == "out" or "." in name
        assert value.dtype == (case.dtype if rounded else torch.promote_types(case.dtype, torch.float32))
        assert value.shape == expected[name].shape, name
        if not value.numel():
            continue
        tolerance = TOLERANCE[case.dtype if rounded else torch.promote_types(case.dtype, torch.float32)]
        scale = float(expected[name].abs().max())
        error = float((value.cpu().double() - expected[name]).abs().max())
        limit = slack * tolerance * max(scale, 1.0) * (1 if rounded else 4)
        assert error <= limit, f"{case} {backend}: {name} differs by {error:.2e}, allowed {limit:.2e}"


def variants(case: Case) -> list[Case]:
    """`case` with static, scalar and adaptive logits, each without, with given and with own noise."""
    kinds: list[dict[str, Any]] = [{}, {"scalar": True}, {"adaptive": True}]
    return [replace(case, noise=noise, **kind) for kind in kinds for noise in ("none", "given", "own")]


CASES = [
    *variants(Case()),
    *(replace(case, num_experts=6, dtype=torch.bfloat16) for case in variants(Case())[-3:]),
    replace(variants(Case())[2], dtype=torch.float16),
    Case(1, 0, (1, 1, 8)),  # nothing to mix, one token
    Case(2, 0, (1, 1, 40), noise="own"),
    Case(2, 1, (0, 5, 16), adaptive=True, noise="own"),  # no token
    Case(2, 2, (2, 0, 16)),
    Case(6, 1, (3, 7, 136), adaptive=True, noise="own"),
    Case(7, 3, (1, 5, 264), noise="own"),  # more than one warp of 8 channels a thread
    Case(13, 1, (2, 2, 24), noise="given"),
    Case(24, 2, (1, 3, 32), adaptive=True, noise="own"),
    Case(2, 1, (1, 4, 2048), noise="own"),
]
"""What every fused backend must compute."""
