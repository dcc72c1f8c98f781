"""Stop signals reach a run at any time and do not reach its loader workers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).parents[3]

# A training process with a loader process; the whole group is signalled, as schedulers do.
PROGRAM = """
import multiprocessing, os, signal, sys, time
from mt_deepspeed.engine import signals

def work(pipe):
    from mt_deepspeed.data.pipeline import _ignore_stop_signals
    _ignore_stop_signals(0)
    pipe.send("ready")
    while pipe.recv() != "end":
        pipe.send("alive")

if __name__ == "__main__":
    signals.install()
    signals.start_fork_server()
    assert not any(signals.received().values())
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    worker = context.Process(target=work, args=(theirs,))
    worker.start()
    assert ours.recv() == "ready"
    for number in signals.STOP_SIGNALS:
        os.killpg(0, number)
    while not all(signals.received().values()):
        time.sleep(0.01)
    ours.send("go on")
    assert ours.recv() == "alive"
    late = context.Process(target=work, args=(theirs,))  # the server lives too
    late.start()
    assert ours.recv() == "ready"
    late.kill()
    late.join()
    ours.send("end")
    worker.join()
    print("modules", "torch" in sys.modules, "exit", worker.exitcode)
"""


def test_a_signalled_process_group_keeps_its_workers(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    done = subprocess.run(
        [sys.executable, str(program)],
        env=environment,
        capture_output=True,
        text=True,
        start_new_session=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "modules False exit 0\n"


LEAVING = """
import os, subprocess, sys, time
from mt_deepspeed.engine import signals
signals.install()
shots = f"import os, time\\nwhile os.getppid() == {os.getpid()}: os.kill({os.getpid()}, 15)"
subprocess.Popen([sys.executable, "-c", shots])
while not signals.received()["SIGTERM"]:
    time.sleep(0.01)
sys.exit(3)
"""


def test_a_process_that_leaves_keeps_its_exit_code() -> None:
    for _ in range(3):
        assert subprocess.run([sys.executable, "-c", LEAVING], cwd=REPO, timeout=120).returncode == 3


def test_handlers_stand_before_torch_is_imported() -> None:
    """The modules that the train command imports before it installs its handlers hold no torch."""
    program = "import sys, mt_deepspeed.train; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=REPO, timeout=120).returncode == 0


def test_signals_are_remembered_by_name() -> None:
    from mt_deepspeed.engine import signals

    before = {number: signal.getsignal(number) for number in signals.STOP_SIGNALS}
    try:
        signals.install()
        os.kill(os.getpid(), signal.SIGUSR2)
        assert signals.received() == {"SIGTERM": False, "SIGUSR1": False, "SIGUSR2": True}
        signals.forget()
        assert not any(signals.received().values())
    finally:
        signals.forget()
        for number, handler in before.items():
            signal.signal(number, handler)
