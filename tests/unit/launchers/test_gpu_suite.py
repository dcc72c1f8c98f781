"""benchmarks/gpu_suite.sh with a Python that only says how it was called."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SUITE = Path(__file__).resolve().parents[3] / "benchmarks" / "gpu_suite.sh"
FAKE_PYTHON = """#!/bin/sh
case "$*" in
    *"import xdist"*) exit 1 ;;
    *"import deepspeed"*) exit "${IMPORT_STATUS:-0}" ;;
    *"$FAILS"*) exit 3 ;;
esac
echo "called: $*"
"""


@pytest.fixture
def suite(tmp_path: Path):  # type: ignore[no-untyped-def]
    python = tmp_path / "python"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)

    def run(*arguments: str, **environment: str) -> tuple[int, str]:
        variables = {**os.environ, "PYTHON": str(python), "FAILS": "no such call", **environment}
        command = ["bash", str(SUITE), str(tmp_path / "out"), *arguments]
        result = subprocess.run(command, env=variables, capture_output=True, text=True)
        return result.returncode, result.stdout + result.stderr

    return run


def test_everything_is_run_once(suite, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    status, said = suite()
    log = (tmp_path / "out" / "log.txt").read_text()
    assert status == 0, said
    assert "called: -m benchmarks.retrieval --sizes base" in log
    assert said.index("== tests: done") < said.index("== step_base: done") < said.index("== sanitizer: done")
    status, said = suite()
    assert status == 0
    assert "retrieval: done before" in said
    assert "== retrieval" not in said
    assert "== build: done" in said, "what the others need is made again"


def test_without_packages_the_kernels_are_measured(suite) -> None:  # type: ignore[no-untyped-def]
    status, said = suite("benchmark", "step_base", IMPORT_STATUS="1")
    assert status == 1
    assert "== step_base: left out, packages are missing" in said
    assert "== benchmark: done" in said
    assert "failed: packages" in said
    assert "step_cuda" not in said


def test_a_failed_step_stops_no_other_and_is_run_again(suite) -> None:  # type: ignore[no-untyped-def]
    status, said = suite(FAILS="benchmarks.retrieval")
    assert status == 1
    assert "== retrieval: FAILED with status 3" in said
    assert "== profile: done" in said
    status, said = suite()
    assert status == 0
    assert "== retrieval: done" in said


def test_steps_that_do_not_fit_into_the_time_are_named(suite) -> None:  # type: ignore[no-untyped-def]
    status, said = suite("tests", "sanitizer", BUDGET="5")
    assert status == 0
    assert "no time for: about packages build tests sanitizer" in said
