"""Fused backends on a GPU. Needs torch, pytest and hypothesis, none of the package's other requirements."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mt_deepspeed.kernels.manager_aggregation import build, expert_statistics, manager_aggregation
from tests.helpers.aggregation import CASES, Case, check, differentiated

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BACKENDS = ["triton", "cuda"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda":
        try:
            build.library()
        except build.BuildError as error:
            pytest.skip(str(error))
    name: str = request.param
    return name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_result_and_every_gradient(case: Case, backend: str) -> None:
    check(case, backend, "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("adaptive", [False, True])
def test_size_of_the_model(adaptive: bool, dtype: torch.dtype, backend: str) -> None:
    check(Case(6, 1, (8, 325, 768), adaptive, noise="own", dtype=dtype), backend, "cuda")


@pytest.mark.parametrize("num_experts", [3, 7, 12])
@pytest.mark.parametrize("adaptive", [False, True])
def test_other_numbers_of_experts(num_experts: int, adaptive: bool, backend: str) -> None:
    check(Case(num_experts, 1, (5, 325, 776), adaptive, noise="own", dtype=torch.bfloat16), backend, "cuda")


def _once(case: Case, backend: str) -> dict[str, torch.Tensor]:
    return differentiated(lambda **call: manager_aggregation(**call, backend=backend), case.arguments("cuda"))


def test_runs_give_the_same_bits(backend: str) -> None:
    case = Case(6, 1, (16, 325, 768), noise="own", dtype=torch.bfloat16)
    first = _once(case, backend)
    for _ in range(3):
        again = _once(case, backend)
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_compiled_and_on_another_stream(backend: str) -> None:
    case = Case(6, 1, (2, 50, 768), adaptive=True, noise="own", dtype=torch.bfloat16)

    def run(**call):  # type: ignore[no-untyped-def]
        return manager_aggregation(**call, backend=backend).float().sin()

    plain = differentiated(run, case.arguments("cuda"))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        compiled = differentiated(torch.compile(run), case.arguments("cuda"))
    stream.synchronize()
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, rtol=2e-2, atol=1e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_another_than_the_current_device(backend: str) -> None:
    check(Case(6, 1, (2, 50, 768), noise="own"), backend, "cuda:1")
    assert torch.cuda.current_device() == 0


def test_no_host_synchronisation(backend: str) -> None:
    arguments = Case(6, 1, (2, 50, 768), adaptive=True, noise="own").arguments("cuda")
    _once(Case(6, 1, (2, 50, 768), adaptive=True, noise="own"), backend)  # compiles
    experts = [state.requires_grad_() for state in arguments["experts"]]
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        statistics = expert_statistics(experts, backend=backend)
        out = manager_aggregation(**arguments, statistics=statistics, backend=backend)
        out.backward(out.detach())
    finally:
        torch.cuda.set_sync_debug_mode(before)


SANITIZED = """
import torch
from tests.helpers.aggregation import Case, check
for case in (
    Case(6, 1, (2, 37, 136), adaptive=True, noise="own", dtype=torch.bfloat16),
    Case(3, 2, (1, 5, 264), noise="given"),
    Case(24, 1, (1, 3, 2048), noise="own"),
    Case(2, 0, (1, 1, 8), noise="own"),
    Case(7, 1, (3, 1501, 264), noise="own"),  # two tokens a block, an odd number of them
):
    check(case, "cuda", "cuda")
"""


def _sanitized(program: str, *options: str) -> tuple[int, str]:
    """Exit status and output of a Python program under compute-sanitizer."""
    sanitizer = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin:/usr/local/cuda/compute-sanitizer"
    )
    if sanitizer is None:
        pytest.skip("needs compute-sanitizer")
    result = subprocess.run(
        [sanitizer, *options, sys.executable, "-c", program],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        timeout=500,
    )
    return result.returncode, (result.stdout + result.stderr)[-4000:]


@pytest.fixture(scope="module")
def sanitizer_works() -> None:
    """Skips where compute-sanitizer refuses the device, as on some virtual machines."""
    status, said = _sanitized("import torch; torch.ones(1, device='cuda').add(1)")
    if status or "not supported" in said:
        pytest.skip(f"compute-sanitizer does not work here: {said}")


@pytest.mark.usefixtures("sanitizer_works")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_compute_sanitizer_finds_nothing(tool: str) -> None:
    try:
        build.library()
    except build.BuildError as error:
        pytest.skip(str(error))
    # torch's own kernels are not ours to judge
    ours = "--kernel-name=regex:.*(statistics|forward|backward|finish)_kernel.*"
    status, said = _sanitized(SANITIZED, f"--tool={tool}", "--error-exitcode=9", ours)
    assert status == 0, said
