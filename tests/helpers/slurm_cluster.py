"""A SLURM cluster on this host: its own munge, controller and several node daemons, as root or not.

Everything lives in one folder, listens on 127.0.0.1, and is stopped by process id.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo", "squeue", "scancel")
SYSTEM_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin", "/sbin"])
ENDED = {"COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}
_NODE_MARK = "MT_TEST_SLURM_NODE"  # names the node in the environment of its slurmd

_CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# A requeued job waits for its old credential to expire: 2 minutes unless this says less (at least 5 s).
AuthInfo=socket={folder}/run/munge.sock,cred_expire=5
# Jobs make their port of their number, and several clusters may share this host.
FirstJobId={first_job}
SlurmctldPort={port}
SrunPortRange={srun_ports}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
PlugStackConfig=/dev/null
MpiDefault=none
# cgroups are the host's: not ours to write.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=100000,batch_sched_delay=0
ReturnToService=2
# An order that a busy node answers too late is sent again a minute later, and would end the job's next start.
MessageTimeout=60
KillWait={kill_wait_s}
SlurmdTimeout={node_timeout_s}
InactiveLimit=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{node_ports}] CPUs={cpus} RealMemory=1000 Gres=gpu:2
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=20
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""

# SLURM counts devices and does not look at them: these stand in for two GPUs a node.
_DEVICES = "Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n"


class ClusterError(RuntimeError):
    """A daemon, a command or a job that did not do what it should; the text holds its log."""


def missing_programs() -> list[str]:
    """SLURM's and munge's programs that are not installed."""
    return [program for program in PROGRAMS if shutil.which(program, path=SYSTEM_PATH) is None]


class Cluster:
    """Nodes n1, n2, ... of `cpus` processors and two pretended GPUs; partition `urgent` preempts `batch`.

    Args:
        folder: Empty or new; holds configuration, state and logs.
        node_timeout_s: A node that is silent for so long counts as lost.
        kill_wait_s: From the signal that ends a job to the one that kills it.
    """

    def __init__(
        self, folder: Path, nodes: int, cpus: int = 2, node_timeout_s: int = 10, kill_wait_s: int = 5
    ) -> None:
        self.folder = folder.resolve()
        self.nodes = [f"n{number}" for number in range(1, nodes + 1)]
        self._settings = {"cpus": cpus, "node_timeout_s": node_timeout_s, "kill_wait_s": kill_wait_s}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        self.environment = {**inherited, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def __enter__(self) -> Cluster:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _start(self) -> None:
        for name in ("run", "state", "log", "munge", *(f"spool/{node}" for node in self.nodes)):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self._start_munge()
        ports = _free_ports(40 + len(self.nodes))
        first_node = ports[1]
        values = {
            "host": socket.gethostname().partition(".")[0],
            "user": getpass.getuser(),
            "folder": self.folder,
            "nodes": len(self.nodes),
            "port": ports[0],
            "first_job": random.randrange(1, 50000),
            "node_ports": f"{first_node}-{first_node + len(self.nodes) - 1}",
            "srun_ports": f"{first_node + len(self.nodes)}-{ports[-1]}",
        }
        text = _CONFIGURATION.format(**values, **self._settings)
        (self.folder / "slurm.conf").write_text(text, "utf-8")
        (self.folder / "gres.conf").write_text(_DEVICES, "utf-8")
        self.start_controller()
        for node in self.nodes:
            self.start_node(node)
        self.wait_until(lambda: len(self.idle_nodes()) == len(self.nodes), "all nodes idle", 60)

    def _start_munge(self) -> None:
        run, key = self.folder / "run", self.folder / "munge" / "key"
        key.parent.chmod(0o700)
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        sock = run / "munge.sock"
        options = {"socket": sock, "key-file": key, "pid-file": run / "munged.pid"}
        options |= {"log-file": self.folder / "log/munged.log", "seed-file": self.folder / "munge/seed"}
        # --force: temporary folders are closed to other users, which munge dislikes.
        arguments = ["--foreground", "--force", *(f"--{name}={value}" for name, value in options.items())]
        self._daemon("munged", "munged", *arguments)
        self.wait_until(sock.exists, "munge's socket", 20)

    def start_controller(self) -> None:
        """Starts slurmctld; it takes up the state that an earlier one left."""
        # -i: the first start finds no state to read.
        self._daemon("slurmctld", "slurmctld", "-D", "-i", "-f", str(self.folder / "slurm.conf"))
        self.wait_until(lambda: "is UP" in self.run("scontrol", "ping", check=False), "the controller", 30)

    def wait_for_saved_state(self) -> None:
        """Waits until the controller has written down what it knows now: at once, or 5 s after a change."""
        state, now = self.folder / "state" / "job_state", time.time()
        while time.time() < now + 7 and not (state.exists() and state.stat().st_mtime > now):
            time.sleep(0.1)

    def kill_controller(self) -> None:
        """kill -9 of the controller."""
        self._kill(self._daemons.pop("slurmctld"))

    def start_node(self, node: str) -> None:
        """Starts a node's slurmd; the node registers and takes jobs again."""
        command = ["slurmd", "-D", "-N", node, "-f", str(self.folder / "slurm.conf")]
        self._daemon(node, *command, **{_NODE_MARK: node})

    def kill_node(self, node: str) -> None:
        """kill -9 of everything on a node: its daemon, its job steps and their processes."""
        self._kill(self._daemons.pop(node))
        for pid in self.processes(node):
            _signal(pid, signal.SIGKILL)

    def kill_rank(self, job: str, rank: int) -> None:
        """kill -9 of one rank."""
        _signal(self.ranks(job)[rank], signal.SIGKILL)

    def idle_nodes(self) -> list[str]:
        """Names of the nodes that wait for jobs."""
        listing = self.run("sinfo", "-h", "-N", "-p", "batch", "-t", "idle", "-o", "%N", check=False)
        return sorted(set(listing.split()))

    def processes(self, node: str | None = None) -> list[int]:
        """Ids of what runs on a node, or on all: batch shells, srun, ranks, and the daemons of their steps."""
        daemons = {process.pid for process in self._daemons.values()}
        names = self.nodes if node is None else [node]
        return [pid for pid, env in _environments() if pid not in daemons and self._node_of(env) in names]

    def _node_of(self, environ: Mapping[str, str]) -> str | None:
        """The node a process belongs to: a step's daemon has slurmd's environment, the others their job's."""
        if environ.get("SLURM_CONF") != self.environment["SLURM_CONF"]:
            return None
        return environ.get(_NODE_MARK) or environ.get("SLURMD_NODENAME")

    def ranks(self, job: str) -> dict[int, int]:
        """Rank -> process id of the tasks that `srun` started for a job, in its newest step."""
        found = {}
        for pid, environ in _environments():
            step = environ.get("SLURM_STEP_ID", "")
            own = environ.get("SLURM_CONF") == self.environment["SLURM_CONF"]
            if (
                own
                and environ.get("SLURM_JOB_ID") == job
                and step.isdigit()
                and _name(_parent(pid)) == "slurmstepd"
            ):
                found[int(environ["SLURM_PROCID"])] = pid
        return found

    def run(
        self,
        *command: str,
        check: bool = True,
        cwd: Path | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> str:
        """Standard output of a command that talks to the cluster.

        Raises:
            ClusterError: It failed, and `check` is on.
        """
        environment = {**self.environment, **(variables or {})}
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)
        if check and done.returncode:
            raise ClusterError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout

    def submit(self, script: Path, *arguments: str, options: tuple[str, ...] = (), **variables: str) -> str:
        """Id of a job: `sbatch OPTIONS SCRIPT ARGUMENTS`, from the folder above the script's."""
        command = ["sbatch", "--parsable", *options, str(script), *arguments]
        return self.run(*command, cwd=script.parent.parent, variables=variables).strip()

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says; empty when the controller does not answer or has forgotten it."""
        text = self.run("scontrol", "-o", "show", "job", job, check=False)
        return dict(re.findall(r"(\w+(?::\w+)*)=(\S*)", text))

    def wait(self, job: str, timeout_s: float = 900, log: Path | None = None) -> dict[str, str]:
        """Waits until a job has ended; returns what `job` says then.

        Raises:
            ClusterError: It has not ended in time; with the end of `log`.
        """
        last: dict[str, str] = {}

        def ended() -> bool:
            last.update(self.job(job))
            return last.get("JobState") in ENDED

        try:
            self.wait_until(ended, f"the end of job {job}", timeout_s)
        except ClusterError as error:
            output = log.read_text("utf-8", "replace")[-4000:] if log and log.exists() else ""
            raise ClusterError(f"{error}: {last.get('JobState')} {last.get('Reason')}\n{output}") from None
        return last

    def wait_until(self, condition: Callable[[], Any], what: str, timeout_s: float) -> None:
        """Polls.

        Raises:
            ClusterError: Not in time, or a daemon ended by itself meanwhile.
        """
        deadline = time.monotonic() + timeout_s
        while not condition():
            for name, process in self._daemons.items():
                if process.poll() is not None:
                    raise ClusterError(f"{name} ended with {process.returncode}: {self._log_of(name)}")
            if time.monotonic() > deadline:
                raise ClusterError(f"waited {timeout_s:.0f} s for {what}")
            time.sleep(0.1)

    def stop(self) -> None:
        """Ends all jobs, then all daemons; whatever is left after that is killed."""
        if "slurmctld" in self._daemons:
            self.run("scancel", f"--user={getpass.getuser()}", check=False)
            deadline = time.monotonic() + 15
            while self.run("squeue", "-h", check=False).strip() and time.monotonic() < deadline:
                time.sleep(0.1)
        for pid in self.processes() if (self.folder / "slurm.conf").exists() else []:
            _signal(pid, signal.SIGKILL)
        for process in reversed(self._daemons.values()):
            process.terminate()
        for process in reversed(self._daemons.values()):
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                self._kill(process)
        self._daemons.clear()

    def _daemon(self, name: str, *command: str, **variables: str) -> None:
        program = shutil.which(command[0], path=SYSTEM_PATH)
        assert program is not None, f"{command[0]} is not installed"
        with (self.folder / "log" / f"{name}.out").open("ab") as output:
            self._daemons[name] = subprocess.Popen(
                [program, *command[1:]],
                env={**self.environment, **variables},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _log_of(self, name: str) -> str:
        return (self.folder / "log" / f"{name}.out").read_text("utf-8", "replace")[-2000:]

    @staticmethod
    def _kill(process: subprocess.Popen[bytes]) -> None:
        os.killpg(process.pid, signal.SIGKILL)  # the controller has a helper, which would keep its port open
        process.wait()


def _free_ports(count: int) -> list[int]:
    """Consecutive ports nobody listens on, below the range that systems hand out by themselves."""
    for _ in range(200):
        first = random.randrange(15000, 32000 - count)
        ports = list(range(first, first + count))
        if all(_is_free(port) for port in ports):
            return ports
    raise ClusterError(f"no {count} free ports in a row")


def _is_free(port: int) -> bool:
    with socket.socket() as server:
        try:
            server.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _environments() -> Iterator[tuple[int, Mapping[str, str]]]:
    """(process id, environment) of every process of ours."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            raw = (entry / "environ").read_bytes()
        except OSError:  # ended meanwhile, or another user's
            continue
        pairs = (item.decode("utf-8", "replace").partition("=") for item in raw.split(b"\0") if item)
        yield int(entry.name), {name: value for name, _, value in pairs}


def _parent(pid: int) -> int:
    try:
        return int((Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError):
        return 0


def _name(pid: int) -> str:
    try:
        return (Path("/proc") / str(pid) / "comm").read_text().strip()
    except OSError:
        return ""


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
