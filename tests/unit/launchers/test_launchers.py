"""The launchers with everything expensive replaced: a Python that records pip calls, a srun that prints."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

FAKE_PYTHON = """#!/usr/bin/env bash
case "$*" in
    "-m pip install"*) echo "pip $*" >>"$PIP_LOG"; exit "${PIP_STATUS:-0}" ;;
    "-m pip --version") exit 0 ;;
    *"import deepspeed"* | *"find_spec"*) exit "${IMPORT_STATUS:-0}" ;;
    *"--print-config") echo "run_dir: $TMPDIR/run" ;;
    *"device_count"*) echo "${GPUS:-0}" ;;
    "-m deepspeed.launcher.runner"*) cat "$DS_ENV_FILE" ;;
    "-m pytest"*) printf 'pytest: '; printf '<%s>' "$@"; echo ;;
    *) exec "REAL_PYTHON" "$@" ;;
esac
"""
FAKE_SCONTROL = """#!/usr/bin/env bash
case "$*" in
    "show hostnames"*) printf 'n1\\nn2\\n' ;;
    "-o show job"*) echo "JobId=12007 JobState=RUNNING EndTime=2030-01-01T00:00:00 ExcNodeList=(null)" ;;
    "-o show node n1") echo "NodeName=n1 NodeAddr=10.0.0.1 NodeHostName=n1" ;;
    *) echo "unexpected: scontrol $*" >&2; exit 1 ;;
esac
"""
FAKE_SRUN = """#!/usr/bin/env bash
if [ "$1" = --nodes=1 ]; then
    while [[ $1 == --* ]]; do shift; done
    exec "$@"
fi
echo "master=${MASTER_ADDR:-}:${MASTER_PORT:-} deadline=${MT_DEADLINE:-} card=${NCCL_SOCKET_IFNAME:-}"
printf 'srun: '; printf '<%s>' "$@"; echo
"""


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


class Clone:
    """A copy of the launchers at a path with a space, and an active environment whose python is a fake."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a clone"
        for name in ("launchers", "slurm"):
            shutil.copytree(ROOT / name, self.root / name)
        for name in ("setup.py", "pyproject.toml"):
            shutil.copy(ROOT / name, self.root / name)
        binaries = folder / "env" / "bin"
        executable(binaries / "python", FAKE_PYTHON.replace("REAL_PYTHON", sys.executable))
        executable(binaries / "scontrol", FAKE_SCONTROL)
        executable(binaries / "srun", FAKE_SRUN)
        self.pip_log = folder / "pip.log"
        # Neither a job around the tests nor the interpreter that launchers/test.sh hands on.
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("SLURM") and name != "PYTHON"
        }
        self.environment = {**inherited, "VIRTUAL_ENV": str(folder / "env"), "PIP_LOG": str(self.pip_log)}

    def run(self, script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", str(self.root / script), *arguments],
            cwd=self.root.parent,
            env={**self.environment, **variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def pip_calls(self) -> list[str]:
        return self.pip_log.read_text().splitlines() if self.pip_log.exists() else []


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path)


SCRIPTS = sorted(path.name for path in (ROOT / "launchers").glob("*.sh") if path.name != "common.sh")


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_needs_no_set_up(clone: Clone, script: str) -> None:
    result = clone.run(f"launchers/{script}", "--help")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("usage: bash launchers/" + script)
    assert clone.pip_calls() == []


def test_package_is_installed_once_and_again_when_its_metadata_changes(clone: Clone) -> None:
    assert clone.run("launchers/test.sh", "--setup-only").returncode == 0
    assert clone.run("launchers/test.sh", "--setup-only").returncode == 0
    assert len(clone.pip_calls()) == 1
    assert clone.pip_calls()[0].endswith(f"-e {clone.root}[dev]")
    with (clone.root / "setup.py").open("a") as file:
        file.write("# a change\n")
    assert clone.run("launchers/test.sh", "--setup-only").returncode == 0
    assert len(clone.pip_calls()) == 2


def test_failing_step_names_itself_and_the_remedy(clone: Clone) -> None:
    result = clone.run("launchers/test.sh", "--setup-only", PIP_STATUS="3")
    assert result.returncode != 0
    assert "FAILED: installing the package" in result.stderr
    assert "What to do: read pip's message" in result.stderr
    assert clone.run("launchers/test.sh", "--setup-only").returncode == 0
    assert len(clone.pip_calls()) == 2, "a failed installation must not count as done"


@pytest.mark.parametrize(("free_gb", "status"), [(9, 1), (11, 0)])
def test_a_full_disk_is_named_before_anything_is_installed(clone: Clone, free_gb: int, status: int) -> None:
    table = f"#!/bin/sh\necho head\necho disk 1 1 {free_gb * 10**9 // 1024 + 1} 9% /\n"
    executable(clone.root.parent / "env" / "bin" / "df", table)
    result = clone.run("launchers/test.sh", "--setup-only", IMPORT_STATUS="1", TMPDIR=str(clone.root.parent))
    assert result.returncode == status, result.stderr
    assert len(clone.pip_calls()) == 1 - status
    if status:
        assert "needs 10 GB of disk space in" in result.stderr
        assert f"{free_gb} GB are free" in result.stderr


def test_a_step_of_several_commands_stops_at_the_first_that_fails(clone: Clone) -> None:
    script = """set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
both() {
    false
    echo "went on"
}
step "two commands" "try again" both
echo "after"
"""
    executable(clone.root / "launchers" / "two.sh", script)
    result = clone.run("launchers/two.sh")
    assert result.returncode != 0
    assert "FAILED: two commands" in result.stderr
    assert "went on" not in result.stdout
    assert "after" not in result.stdout


def test_old_python_is_refused(clone: Clone, tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    executable(tools / "python3", "#!/bin/sh\nexit 1\n")
    for name in ("bash", "dirname"):
        (tools / name).symlink_to(str(shutil.which(name)))
    clone.environment = {"PATH": str(tools)}
    result = clone.run("launchers/test.sh")
    assert result.returncode != 0
    assert "FAILED: no Python 3.10 or newer on PATH" in result.stderr


@pytest.mark.parametrize(
    ("option", "selection"),
    [([], "<-m><not slow and not gpu and not soak>"), (["--all"], ""), (["--gpu"], "<-m><gpu>")],
)
def test_test_launcher_selects_and_passes_arguments_on(
    clone: Clone, option: list[str], selection: str
) -> None:
    result = clone.run("launchers/test.sh", *option, "tests/unit", "-k", "a or b")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == f"pytest: <-m><pytest>{selection}<tests/unit><-k><a or b>"


def test_local_starts_one_process_per_gpu(clone: Clone) -> None:
    def command(*arguments: str, gpus: int) -> subprocess.CompletedProcess[str]:
        return clone.run("launchers/local.sh", *arguments, "--dry-run", "--preset", "x", GPUS=str(gpus))

    assert " --num_gpus 4 " in command(gpus=4).stdout
    assert " --num_gpus 1 " in command(gpus=0).stdout
    assert " --num_gpus 3 " in command("--processes", "3", gpus=0).stdout
    assert command(gpus=4).stdout.splitlines()[-1].endswith("--module mt_deepspeed.train --preset x ")
    assert "FAILED: --processes 5, but this machine has 4 GPUs" in command("--processes", "5", gpus=4).stderr
    assert "FAILED: --processes 'two'" in command("--processes", "two", gpus=4).stderr


def test_multi_node_over_ssh(clone: Clone, tmp_path: Path) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("n1 slots=2\nn2 slots=2\n")
    result = clone.run("launchers/multi_node.sh", "--hostfile", "hosts", "--dry-run", "--preset", "x")
    assert result.stdout.splitlines()[-1].endswith(
        f"/python -m deepspeed.launcher.runner --hostfile {hostfile} --module mt_deepspeed.train --preset x "
    )
    assert "FAILED: neither --hostfile nor a SLURM allocation" in clone.run("launchers/multi_node.sh").stderr
    missing = clone.run("launchers/multi_node.sh", "--hostfile", "hosts", IMPORT_STATUS="1")
    assert "cannot import mt_deepspeed" in missing.stderr
    assert "--setup-only" in missing.stderr


def test_variables_that_go_to_other_nodes(clone: Clone, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("n1 slots=2\n")
    (tmp_path / "own").write_text("FAVOURITE=7")
    variables = {"NCCL_P2P_DISABLE": "1", "NVME_PATH": "/scratch", "HF_HOME": "/models"}
    more = {"HF_TOKEN": "secret", "DS_ENV_FILE": str(tmp_path / "own"), "UNKNOWN": "x"}
    arguments = ("--hostfile", "hosts", "--preset", "x")
    result = clone.run("launchers/multi_node.sh", *arguments, **variables, **more)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert {f"{name}={value}" for name, value in variables.items()} <= set(lines)
    assert lines[-1] == "FAVOURITE=7"
    assert not [line for line in lines if line.startswith(("HF_TOKEN=", "DS_ENV_FILE=", "UNKNOWN="))]
    assert list((clone.root / "runs").iterdir()) == []


def test_a_dry_run_writes_no_variables(clone: Clone, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("n1 slots=2\n")
    result = clone.run("launchers/multi_node.sh", "--hostfile", "hosts", "--dry-run")
    assert result.returncode == 0, result.stderr
    assert list((clone.root / "runs").iterdir()) == []


SLURM = {
    "SLURM_JOB_ID": "12007",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NTASKS": "4",
}


def test_multi_node_inside_slurm(clone: Clone) -> None:
    result = clone.run("launchers/multi_node.sh", "--slots", "2", "--preset", "x y", **SLURM)
    assert result.returncode == 0, result.stderr
    hostfile = clone.root / "runs" / "hostfile.12007"
    assert hostfile.read_text() == "n1 slots=2\nn2 slots=2\n"
    assert "master=10.0.0.1:20007" in result.stdout
    assert "<--nodes=2><--ntasks=2><--ntasks-per-node=1>" in result.stdout
    assert result.stdout.splitlines()[-1].endswith(f"<{hostfile}><--preset><x y>")


def test_multi_node_with_deepspeeds_launchers(clone: Clone) -> None:
    def command(launcher: str) -> str:
        result = clone.run(
            "launchers/multi_node.sh", "--launcher", launcher, "--dry-run", "--preset", "x", **SLURM
        )
        return result.stdout + result.stderr

    common = f"--hostfile {clone.root}/runs/hostfile.12007".replace(" clone", "\\ clone")
    master = "--master_addr 10.0.0.1 --master_port 20007"
    slurm = command("slurm")
    assert f"{common} --launcher slurm --no_ssh_check {master} --launcher_args " in slurm
    assert slurm.endswith("mt_deepspeed/train.py --preset x \n")
    pdsh = command("pdsh")
    assert f"{common} --launcher pdsh {master} --module mt_deepspeed.train --preset x" in pdsh
    assert "FAILED: --launcher 'mpi'" in command("mpi")


def submitted(
    clone: Clone, script: str, *arguments: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Runs a job script as SLURM would: somewhere else, with its variables."""
    variables = {"SLURM_SUBMIT_DIR": str(clone.root), "SLURM_CPUS_PER_TASK": "8", **SLURM, **variables}
    return clone.run(f"slurm/{script}.sbatch", *arguments, TMPDIR=str(clone.root.parent), **variables)


@pytest.mark.parametrize(
    ("script", "module", "variables", "more"),
    [
        ("pretrain", "train", {}, ""),
        ("finetune", "train", {"WEIGHTS": "/runs/base"}, "<--set><checkpoint.init_from=/runs/base>"),
        ("evaluate", "evaluate", {}, ""),
    ],
)
def test_jobs_start_one_task_per_rank(
    clone: Clone, script: str, module: str, variables: dict[str, str], more: str
) -> None:
    result = submitted(clone, script, "--preset", "x y", **variables)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "==> 4 ranks on n[1-2], start number 1" in result.stdout
    assert "master=10.0.0.1:20007" in result.stdout
    python = f"{clone.environment['VIRTUAL_ENV']}/bin/python"
    command = f"<{python}><-u><-m><mt_deepspeed.{module}><--preset><x y>{more}"
    assert f"srun: <--kill-on-bad-exit=1><--cpus-per-task=8>{command}" in result.stdout.splitlines()


def test_lines_of_the_cluster(clone: Clone) -> None:
    """Container, options of srun, network card, address and interpreter are variables."""
    executable(clone.root.parent / "contain", '#!/bin/sh\nshift\nexec "$@"\n')
    result = submitted(
        clone,
        "pretrain",
        PATH=path_of(clone),
        CONTAINER=f"{clone.root.parent}/contain --image=x",
        SRUN_OPTIONS="--mpi=none --label",
        INTERFACE="ib0",
        MASTER_ADDR="10.1.1.1",
        TZ="UTC",
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "master=10.1.1.1:20007 deadline=1893456000 card=ib0" in result.stdout
    assert f"<--mpi=none><--label><{clone.root.parent}/contain><--image=x><" in result.stdout


def test_containers_that_only_srun_can_enter(clone: Clone) -> None:
    options = "--container-image=x.sqsh --container-mounts=/scratch"
    (clone.root.parent / "env" / "bin" / "python").rename(clone.root.parent / "env" / "bin" / "inside")
    result = submitted(clone, "pretrain", SRUN_OPTIONS=options, PYTHON="inside", PATH=path_of(clone))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "<--container-image=x.sqsh><--container-mounts=/scratch><inside><-u>" in result.stdout


def path_of(clone: Clone) -> str:
    return f"{clone.environment['VIRTUAL_ENV']}/bin{os.pathsep}{os.environ['PATH']}"


def test_jobs_say_what_is_missing(clone: Clone) -> None:
    assert "finds no mt_deepspeed" in submitted(clone, "pretrain", IMPORT_STATUS="1").stderr
    assert "FAILED: no --out FOLDER among the arguments: coco" in submitted(clone, "convert", "coco").stderr
