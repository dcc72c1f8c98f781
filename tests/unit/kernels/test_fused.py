"""Fused backends without a GPU: the CPU's own, Triton in its interpreter, the CUDA sources compiled for the CPU."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mt_deepspeed.config.model import LinkConfig
from mt_deepspeed.kernels.manager_aggregation import manager_aggregation
from mt_deepspeed.kernels.manager_aggregation.reference import aggregate
from mt_deepspeed.models import managers
from tests.helpers import cuda_on_cpu
from tests.helpers.aggregation import (
    CASES,
    Case,
    check,
    differentiated,
    materialised,
    needs_cpu_library,
    truth,
)

BACKENDS = ["triton", "cuda", "cpu"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cuda":
        cuda_on_cpu.use(monkeypatch)
    elif request.param == "cpu":
        needs_cpu_library()
    elif torch.cuda.is_available():
        pytest.skip("tests/gpu runs it for real")
    name: str = request.param
    return name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_result_and_every_gradient(case: Case, backend: str) -> None:
    if backend == "cpu" and case.dtype == torch.float16:
        pytest.skip("cpu computes in float32 and bfloat16")
    # Triton's interpreter cuts bfloat16 off where the hardware rounds to the nearest.
    check(case, backend, slack=2.0 if backend == "triton" else 1.0)


def test_two_runs_give_the_same_bits(backend: str) -> None:
    arguments = Case(3, 1, (4, 9, 64), adaptive=True, noise="own").arguments()

    def once() -> dict[str, torch.Tensor]:
        return differentiated(lambda **call: manager_aggregation(**call, backend=backend), arguments)

    first, second = once(), once()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("logits", [[1e4, -1e4, 0.0], [-1e4, 0.0, 1e4], [-1e4, -2e4, -1e4]], ids=str)
def test_large_scores_do_not_overflow(logits: list[float], backend: str) -> None:
    arguments = Case(3, 1, (1, 2, 16), adaptive=True).arguments()
    arguments["logits"] = torch.tensor(logits).expand(1, 2, 3)
    arguments["temperature"] = torch.tensor([0.01])
    found = differentiated(lambda **call: manager_aggregation(**call, backend=backend), arguments)
    assert all(value.isfinite().all() for value in found.values())
    torch.testing.assert_close(found["out"], truth(arguments)["out"].float())


def test_an_odd_number_of_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_on_cpu.use(monkeypatch)
    check(Case(3, 2, (3, 67, 24), noise="own"), "cuda")
    check(Case(7, 1, (3, 67, 264), adaptive=True, noise="given"), "cuda")


def test_logits_of_any_strides(backend: str) -> None:
    arguments = Case(3, 1, (1, 5, 16), adaptive=True, noise="own").arguments()

    def run(**call: Any) -> dict[str, torch.Tensor]:
        return differentiated(lambda **call: manager_aggregation(**call, backend=backend), call)

    expected = run(**arguments)
    arguments["logits"] = arguments["logits"].transpose(1, 2).contiguous().transpose(1, 2)
    assert not arguments["logits"].is_contiguous()
    found = run(**arguments)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("name", ["reference", "cpu"])
@pytest.mark.parametrize("noise", ["none", "own"])
def test_a_score_that_is_not_a_number_is_not_hidden(name: str, noise: str) -> None:
    if name == "cpu":
        needs_cpu_library()
    for adaptive, place in ((True, (0, 1, 2)), (False, (1, 4))):
        arguments = Case(3, 1, (1, 2, 20), adaptive=adaptive, noise=noise).arguments()
        arguments["logits"][place] = float("nan")
        found = manager_aggregation(**arguments, backend=name).isnan()
        expected = torch.zeros(1, 2, 20, dtype=torch.bool)
        expected[(0, 1) if adaptive else (0, slice(None), 4)] = True
        assert torch.equal(found, expected)


def test_sums_that_do_not_fit_into_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_on_cpu.use(monkeypatch)
    monkeypatch.setenv("EMULATED_SHARED_BYTES", "2000")
    check(Case(4, 2, (3, 40, 16), noise="own"), "cuda")


SIZES_OF_A_CPU = [
    Case(24, 3, (2, 3, 2048), noise="own"),
    Case(24, 0, (1, 7, 24), adaptive=True),
    Case(5, 2, (2, 5, 40), adaptive=True, noise="own", dtype=torch.bfloat16),
    Case(3, 1, (1, 5, 12), noise="own"),  # not a multiple of 8
    Case(3, 1, (1, 70, 7), scalar=True),  # tokens of more than two chunks
]


@pytest.mark.parametrize("case", SIZES_OF_A_CPU, ids=str)
def test_sizes_of_a_cpu(case: Case) -> None:
    needs_cpu_library()
    check(case, "cpu")


@pytest.fixture
def number_of_threads() -> Iterator[None]:
    """Given back after the test."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("number_of_threads")
@pytest.mark.parametrize(
    "case", [Case(6, 1, (2, 55, 136), noise="own"), Case(3, 1, (2, 55, 64), adaptive=True)]
)
def test_bits_do_not_depend_on_the_number_of_threads(case: Case) -> None:
    needs_cpu_library()
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(
            differentiated(lambda **call: manager_aggregation(**call, backend="cpu"), case.arguments())
        )
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in other)


def test_one_openmp_library_is_enough() -> None:
    needs_cpu_library()
    manager_aggregation(**Case().arguments(), backend="cpu")
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs Linux")
    assert len({line.split()[-1] for line in maps.read_text().splitlines() if "libgomp" in line}) == 1


def test_states_that_are_not_aligned(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_on_cpu.use(monkeypatch)
    arguments = Case(2, 1, (2, 3, 8)).arguments()
    expected = manager_aggregation(**arguments, backend="cuda")
    moved = torch.cat([torch.zeros(1), arguments["experts"][0].flatten()])[1:].view(2, 3, 8)
    assert moved.data_ptr() % 16
    arguments["experts"][0] = moved
    assert torch.equal(manager_aggregation(**arguments, backend="cuda"), expected)


def _curve(backend: str | None, steps: int, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Losses of a small model of two managers with noise; `backend` None: plain autograd and given noise."""
    shape = (1, 4, 16)

    def plain(experts, previous, w, b, logits, temperature, previous_weight, noise, eps, statistics):  # type: ignore[no-untyped-def]
        given = materialised(noise, len(experts), shape).float()
        return aggregate(experts, previous, w, b, logits, temperature, previous_weight, given, eps)

    with monkeypatch.context() as patch:
        if backend is None:
            patch.setattr(managers, "manager_aggregation", plain)
        else:
            patch.setenv("MT_KERNELS", backend)
        torch.manual_seed(0)
        link, size, num_experts = LinkConfig(kind="aaue"), shape[-1], 2
        first = managers.StaticManager(link, size, num_experts, 0, all_previous=False, layer=0)
        second = managers.AdaptiveManager(link, size, num_experts, own_query=False, layer=1)
        tower = torch.nn.ModuleList(torch.nn.Linear(size, size) for _ in range(num_experts))
        model = torch.nn.ModuleList([first, second, tower])
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        source, target = torch.randn(shape), torch.randn(shape)
        losses = []
        for _ in range(steps):
            experts = [linear(source) for linear in tower]
            state = first(experts, [], None, None, seed=managers.draw_seed(source.device)).tanh()
            seed = managers.draw_seed(source.device)
            loss = (second(experts, [state], state, None, seed=seed) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


def test_training_follows_the_plain_curve(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, fused = _curve(None, 32, monkeypatch), _curve(backend, 32, monkeypatch)
    assert plain[-1] < 0.7 * plain[0], "it learns"
    torch.testing.assert_close(torch.tensor(fused), torch.tensor(plain), rtol=2e-3, atol=0)
