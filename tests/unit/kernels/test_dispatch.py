"""Which backend is taken, and how the libraries are built."""

import ctypes
import logging
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mt_deepspeed.kernels.manager_aggregation import (
    build,
    cpu_impl,
    cuda_impl,
    dispatch,
    manager_aggregation,
    reference,
)
from tests.helpers import cuda_on_cpu
from tests.helpers.aggregation import Case, needs_cpu_library


@pytest.fixture
def nothing_remembered() -> Iterator[None]:
    """What is kept of compilers and libraries is forgotten before and after."""
    caches = (dispatch._log_once, cpu_impl._missing, cpu_impl._library, build.no_c_compiler)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def test_a_wish_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = Case(2, 1, (1, 2, 12)).arguments()
    with pytest.raises(ValueError, match="backend triton was asked for, but found 12 channels"):
        manager_aggregation(**arguments, backend="triton")
    monkeypatch.setenv("MT_KERNELS", "cuda")
    with pytest.raises(ValueError, match="backend cuda was asked for, but found tensors on cpu"):
        manager_aggregation(**arguments)
    manager_aggregation(**arguments, backend="reference")  # the argument counts more


def test_without_a_wish_what_is_fused_falls_back_and_says_so(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    dispatch._log_once.cache_clear()
    caplog.set_level(logging.INFO)
    monkeypatch.delenv("MT_KERNELS", raising=False)
    for _ in range(3):
        assert dispatch.chosen([torch.zeros(2, 8, dtype=torch.float64)], 1, None) is reference
    lines = [record.message for record in caplog.records if "manager aggregation" in record.message]
    assert len(lines) == 1
    assert lines[0].startswith("manager aggregation: reference")


@pytest.mark.usefixtures("nothing_remembered")
def test_a_cpu_without_a_compiler(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Said once where nothing was asked for, an error where something was."""
    caplog.set_level(logging.INFO)
    monkeypatch.delenv("MT_KERNELS", raising=False)
    monkeypatch.setenv("CXX", str(tmp_path / "nothing"))
    arguments = Case(2, 1, (1, 2, 8)).arguments()
    for _ in range(3):
        manager_aggregation(**arguments)
    lines = [record.message for record in caplog.records if "manager aggregation" in record.message]
    assert len(lines) == 1
    assert "autograd through the formula (cpu: found no C++ compiler" in lines[0]
    with pytest.raises(ValueError, match=r"backend cpu was asked for, but found no C\+\+ compiler"):
        manager_aggregation(**arguments, backend="cpu")


@pytest.mark.usefixtures("nothing_remembered")
def test_a_gpu_without_a_c_compiler(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As on a CPU: said once, or an error."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(build, "BUILT_AHEAD", tmp_path / "nothing")
    monkeypatch.delenv("MT_KERNELS", raising=False)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with FakeTensorMode():
        experts = [torch.zeros(2, 8, device="cuda")]
    for _ in range(3):
        assert dispatch.chosen(experts, 1, None) is reference
    lines = [record.message for record in caplog.records if "manager aggregation" in record.message]
    assert len(lines) == 1
    assert "reference (triton: found no C compiler ('gcc' or 'clang')" in lines[0]
    with pytest.raises(ValueError, match="backend triton was asked for, but found no C compiler"):
        dispatch.chosen(experts, 1, "triton")


@pytest.mark.parametrize(
    ("there", "asked", "found"),
    [
        ("gcc", None, True),
        ("clang", None, True),
        ("cc", None, False),
        ("cc", "cc", True),
        ("gcc", "nothing", False),
        ("gcc", "", False),
    ],
)
@pytest.mark.usefixtures("nothing_remembered")
def test_a_c_compiler_is_looked_for_as_triton_does(
    there: str, asked: str | None, found: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / there).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    if asked is not None:
        monkeypatch.setenv("CC", asked)
    assert (build.no_c_compiler() is None) == found


@pytest.mark.usefixtures("nothing_remembered")
def test_a_damaged_library_is_built_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    needs_cpu_library()
    cpu_impl._library.cache_clear()
    whole, kept = build.cpu_library(cpu_impl._openmp()), tmp_path / "library.so"
    kept.write_bytes(whole.read_bytes()[:100])

    def cached(openmp: str | None) -> Path:
        if not kept.exists():
            shutil.copy(whole, kept)
        return kept

    monkeypatch.setattr(build, "cpu_library", cached)
    cpu_impl._library()
    assert kept.stat().st_size == whole.stat().st_size


def test_a_compiler_that_fails_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho no such processor >&2; exit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(build.BuildError, match="no such processor"):
        build.cpu_library()


def test_backends_of_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "BUILT_AHEAD", tmp_path / "nothing")
    assert dispatch.preferred("cuda") == ["triton", "reference"], "nothing compiles unasked"
    monkeypatch.setattr(build, "BUILT_AHEAD", tmp_path)
    assert dispatch.preferred("cuda") == ["cuda", "triton", "reference"]


def test_more_tokens_than_the_cuda_kernels_count(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_on_cpu.use(monkeypatch)
    with FakeTensorMode():
        assert cuda_impl.unsupported([torch.zeros(2**25, 8)], 0) is None
        reason = cuda_impl.unsupported([torch.zeros(2**25 + 1, 8)], 0)
    assert reason == "found 33554433 tokens, expected at most 33554432"


def test_a_library_built_ahead_from_other_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "BUILT_AHEAD", cuda_on_cpu.library())
    cuda_impl._library.cache_clear()
    with pytest.raises(build.BuildError, match="was built from other sources"):
        cuda_impl._library()


def _fake_nvcc(folder: Path, release: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An nvcc that writes its output after a moment and counts its calls in the file returned."""
    calls, nvcc = folder / "calls", folder / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(
        "#!/bin/sh\n"
        f'if [ "$1" = --version ]; then echo "Cuda compilation tools, release {release}, V"; exit; fi\n'
        f'echo call >>{calls}; sleep 0.2; while [ "$1" != -o ]; do shift; done; echo library >"$2"\n'
    )
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    return calls


def test_one_of_many_builds_and_the_cache_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = _fake_nvcc(tmp_path, "13.0", monkeypatch)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(build.library())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert len(found) == 4
    assert found[0].read_text() == "library\n"
    assert calls.read_text() == "call\n"
    assert build.library(["90"]) != found[0], "other options, other library"


def test_no_nvcc_or_an_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
    with pytest.raises(build.BuildError, match=r"found no nvcc in CUDA_HOME=.*MT_KERNELS=triton"):
        build.library()
    _fake_nvcc(tmp_path, "11.2", monkeypatch)
    with pytest.raises(build.BuildError, match=r"release 11\.2, expected 12\.0 or newer"):
        build.library()


def test_what_the_compiler_says_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fake_nvcc(tmp_path, "13.0", monkeypatch)
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text(nvcc.read_text().replace("echo call", "echo no such type >&2; exit 2; echo call"))
    with pytest.raises(build.BuildError, match="no such type"):
        build.library()
    assert [name for name in os.listdir(build.cache_folder()) if name.endswith(".so")] == []


def test_the_cuda_sources_compile(tmp_path: Path) -> None:
    try:
        build.find_nvcc()
    except build.BuildError as error:
        pytest.skip(str(error))
    said = build.compile_to(tmp_path / "library.so", ["90"])
    assert "registers" in said
    library = ctypes.CDLL(str(tmp_path / "library.so"))
    assert library.mt_problem_bytes() > 0
