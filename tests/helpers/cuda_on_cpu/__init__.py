"""The CUDA sources compiled for the CPU: the same kernels, launcher and Python code, without a GPU."""

import shutil
import subprocess
from functools import lru_cache
from pathlib import Path
from tempfile import mkdtemp

import pytest

from mt_deepspeed.kernels.manager_aggregation import build, cuda_impl


@lru_cache(maxsize=1)
def library() -> Path:
    """The compiled library."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    made = Path(mkdtemp()) / "emulated.so"
    options = ["-std=c++17", "-O1", "-shared", "-fPIC", "-w", "-I", str(Path(__file__).parent), "-x", "c++"]
    subprocess.run([compiler, *options, str(build.SOURCES / "launch.cu"), "-o", str(made)], check=True)
    return made


def use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backend `cuda` computes on CPU tensors until the end of the test."""
    loaded = cuda_impl.load(str(library()))
    monkeypatch.setattr(cuda_impl, "_library", lambda: loaded)
    monkeypatch.setattr(cuda_impl, "DEVICE", "cpu")
