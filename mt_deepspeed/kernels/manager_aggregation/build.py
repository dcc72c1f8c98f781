"""Compiles csrc/ into shared libraries, with nvcc and for the CPU, without any need of torch's headers.

Just in time they go to `$XDG_CACHE_HOME/mt_deepspeed` (or `~/.cache/mt_deepspeed`) under names that follow from
sources, options and compiler (and processor), behind a file lock. Ahead of time (`MT_BUILD_CUDA=1 pip install .`,
see setup.py) that of nvcc stands beside this file. Only the standard library is imported, since setup.py loads this
file by its path.

    python -m mt_deepspeed.kernels.manager_aggregation.build [--output FILE] [--arch 90 ...]
"""

import argparse
import fcntl
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

SOURCES = Path(__file__).resolve().parent / "csrc"
BUILT_AHEAD = Path(__file__).resolve().parent / "libmanager_aggregation.so"
ARCHITECTURES = ("80", "90")
"""Machine code for A100 and H100/H200; newer devices compile the PTX of the last one when it is loaded."""
OLDEST_NVCC = (12, 0)


class BuildError(ValueError):
    """The library cannot be built here; says why and what to do."""


def find_nvcc() -> tuple[str, tuple[int, int]]:
    """Path and version of nvcc: that of `CUDA_HOME` if set, else on the `PATH`, else in /usr/local/cuda.

    Raises:
        BuildError: None is found, or it is too old.
    """
    home = os.environ.get("CUDA_HOME")
    if home:
        found = shutil.which("nvcc", path=os.path.join(home, "bin"))
    else:
        found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if found is None:
        where = f"CUDA_HOME={home}" if home else "PATH or /usr/local/cuda"
        raise BuildError(
            f"CUDA kernels: found no nvcc in {where}; install the CUDA toolkit "
            f"{'.'.join(map(str, OLDEST_NVCC))} or newer, or use MT_KERNELS=triton, which needs a C compiler only"
        )
    text = subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout
    match = re.search(r"release (\d+)\.(\d+)", text)
    version = (int(match[1]), int(match[2])) if match else (0, 0)
    if version < OLDEST_NVCC:
        raise BuildError(
            f"CUDA kernels: {found} is release {version[0]}.{version[1]}, expected "
            f"{'.'.join(map(str, OLDEST_NVCC))} or newer; set CUDA_HOME, or use MT_KERNELS=triton"
        )
    return found, version


@lru_cache(maxsize=1)
def no_c_compiler() -> str | None:
    """Why Triton cannot compile what launches its kernels, or None; it looks for `CC`, else for gcc and clang."""
    asked = os.environ.get("CC")
    names = ["gcc", "clang"] if asked is None else [asked]
    if any(shutil.which(name) for name in names):
        return None
    return f"found no C compiler ({' or '.join(map(repr, names))}); install gcc, or set CC"


def sources_digest() -> str:
    """Names the state of csrc/; a library of CUDA kernels answers it to `mt_sources()`."""
    digest = hashlib.sha256()
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:16]


def command(nvcc: str, architectures: Sequence[str], output: Path) -> list[str]:
    """The compiler call."""
    codes = [f"-gencode=arch=compute_{one},code=sm_{one}" for one in architectures]
    newest = architectures[-1]
    return [
        nvcc,
        "-O3",
        "-std=c++17",
        "--shared",
        "-Xcompiler=-fPIC,-fvisibility=default",
        f"-DMT_SOURCES={sources_digest()}",
        *codes,
        f"-gencode=arch=compute_{newest},code=compute_{newest}",
        "-Xptxas=-v",
        "--threads=0",
        "-o",
        str(output),
        str(SOURCES / "launch.cu"),
    ]


def compile_to(output: Path, architectures: Sequence[str] = ARCHITECTURES) -> str:
    """Compiles with nvcc to `output`, which appears only when it is complete.

    Returns:
        What the compiler said: registers and spilled bytes of each kernel.

    Raises:
        BuildError: No usable nvcc, or it failed.
    """
    nvcc, _ = find_nvcc()
    return _run(lambda made: command(nvcc, architectures, made), output)


def library(architectures: Sequence[str] = ARCHITECTURES) -> Path:
    """The CUDA library: built ahead, from the cache, or compiled now (about a minute; other processes wait).

    Raises:
        BuildError: No usable nvcc, or it failed.
    """
    if BUILT_AHEAD.exists():
        return BUILT_AHEAD
    nvcc, version = find_nvcc()
    return _cached("manager_aggregation", version, lambda made: command(nvcc, architectures, made))


def cpu_library(openmp: str | None = None) -> Path:
    """The library for this processor: from the cache, or compiled now (some seconds; other processes wait).

    Args:
        openmp: OpenMP library to link to, None: the compiler's own.

    Raises:
        BuildError: No usable compiler, or it failed.
    """
    compiler = shlex.split(os.environ.get("CXX") or "g++")
    if shutil.which(compiler[0]) is None:
        raise BuildError(f"found no C++ compiler {compiler[0]!r}; install g++, or set CXX")
    native = [*compiler, "-std=c++17", "-O3", "-march=native"]
    # The compiler's version, and what it takes the processor for.
    asked = [*native, "-dM", "-E", "-x", "c++", os.devnull]
    macros = subprocess.run(asked, capture_output=True, text=True, check=False).stdout
    flags = ["-fno-math-errno", "-fopenmp", "-shared", "-fPIC", "-fvisibility=hidden"]
    call = [*native, *flags, str(SOURCES / "cpu.cpp"), *([openmp] if openmp else []), "-o"]
    return _cached("manager_aggregation_cpu", macros, lambda made: [*call, str(made)])


def _cached(name: str, key: object, call: Callable[[Path], list[str]]) -> Path:
    """The library that the compiler's `call(output)` makes, kept under `key`, the call and the sources."""
    made_of = (key, [Path(part).name for part in call(Path("out"))], sources_digest())
    digest = hashlib.sha256(repr(made_of).encode())
    output = cache_folder() / f"lib{name}-{digest.hexdigest()[:16]}.so"
    if output.exists():
        return output
    output.parent.mkdir(parents=True, exist_ok=True)
    with open(output.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # freed by the system when a process dies
        if not output.exists():
            _run(call, output)
    return output


def _run(call: Callable[[Path], list[str]], output: Path) -> str:
    """Compiles in a folder beside `output` and moves the result there; returns what the compiler said."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        made = Path(folder) / output.name
        result = subprocess.run(call(made), capture_output=True, text=True, check=False)
        said = result.stdout + result.stderr
        if result.returncode:
            raise BuildError(f"{shlex.join(call(made))} failed:\n{said[-4000:]}")
        with open(made, "rb") as library:
            os.fsync(library)  # a machine that crashes must not leave a part of it under its name
        os.replace(made, output)
    return said


def cache_folder() -> Path:
    """Where libraries built just in time are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "mt_deepspeed"


def main() -> None:
    """The command line: compiles and prints the compiler's resource usage."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=BUILT_AHEAD)
    parser.add_argument("--arch", nargs="+", default=list(ARCHITECTURES))
    args = parser.parse_args()
    started = time.perf_counter()
    try:
        print(compile_to(args.output, args.arch), end="")
    except BuildError as error:
        raise SystemExit(f"error: {error}") from None
    print(f"{args.output}: {args.output.stat().st_size} bytes, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
