"""What a run continues from, and what it says about it."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mt_deepspeed.config import RunConfig, to_dict
from mt_deepspeed.engine import store
from mt_deepspeed.engine.build import Session
from mt_deepspeed.engine.checkpoint import find, load_moments, load_weights, versions
from mt_deepspeed.engine.nonfinite import NonFinitePolicy
from mt_deepspeed.engine.protocols import Task
from mt_deepspeed.engine.store import CheckpointError

log = logging.getLogger(__name__)


def checkpoint_root(run_dir: str | Path) -> Path:
    """Folder of a run's checkpoints."""
    return Path(run_dir) / "checkpoints"


@dataclass
class Progress:
    """How far a run is."""

    step: int = 0
    """Optimizer steps, skipped ones included: the stream's position is step x global batch."""
    adam_steps: int = 0
    """Steps that moved the weights."""
    evaluation_due: bool = False
    """The run stopped before the evaluation that belongs to `step`."""
    productive_s: float = 0.0
    """Seconds of productive training up to `step`, over all starts."""


@dataclass(frozen=True)
class Resume:
    """The checkpoint a run continues."""

    folder: Path
    state: dict[str, Any]

    @classmethod
    def find(cls, config: RunConfig, identity: dict[str, Any]) -> Resume | None:
        """The checkpoint to continue, by `checkpoint.resume`; None: start anew. Call on all ranks.

        Args:
            config: The run.
            identity: Global batch size and `SampleStream.identity` of the stream that would go on.

        Raises:
            CheckpointError: `must` without a valid checkpoint, or the checkpoint stands in another sample stream.
        """
        root = checkpoint_root(config.run_dir)
        mode = config.checkpoint.resume
        if mode == "never":
            _put_aside(root)
            return None
        folder = find(root)
        if folder is None:
            if mode == "must":
                raise CheckpointError(
                    f"checkpoint.resume=must, but {root} holds no valid checkpoint; "
                    "check run_dir, or use checkpoint.resume=auto to start anew"
                )
            return None
        state = store.read_state(folder)
        changed = differences(state["stream"], json.loads(json.dumps(identity)))
        if changed:
            raise CheckpointError(
                f"{folder} stands in another sample stream, which would not continue: {'; '.join(changed)}. Restore "
                "it (rank count, micro-batch size and accumulation may change), or start another run_dir from these "
                "weights with checkpoint.init_from"
            )
        return cls(folder, state)

    def prepare(self, task: Task, config: RunConfig) -> None:
        """Loads the weights into the task, before DeepSpeed takes it, and says what differs from then."""
        load_weights(task, self.folder)
        state = self.state
        log.info(
            "resuming from %s: step %d, %d samples; saved by %d ranks at ZeRO stage %d in %s",
            self.folder,
            state["step"],
            state["samples"],
            state["world_size"],
            state["zero_stage"],
            state["precision"],
        )
        for line in differences(state["config"], to_dict(config)):
            log.info("configuration differs from the checkpoint: %s", line)
        for line in differences(state["versions"], versions()):
            log.info("version differs from the checkpoint: %s", line)

    def restore(self, session: Session, policy: NonFinitePolicy) -> Progress:
        """Restores the optimizer and counters after DeepSpeed has been initialized."""
        state = self.state
        load_moments(session, self.folder, state["adam_steps"])
        if session.loss_scale.dynamic and state["precision"] == "fp16":
            session.loss_scale.value = state["loss_scale"]["value"]
            session.loss_scale.clean_steps = state["loss_scale"]["clean_steps"]
        policy.load(state["nonfinite"])
        return Progress(
            state["step"],
            state["adam_steps"],
            state.get("evaluation_due", False),
            state.get("productive_s", 0.0),
        )


def differences(before: Any, now: Any, path: str = "") -> list[str]:
    """`key: old -> new` for every leaf that differs between two trees of dicts."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = list(dict.fromkeys([*before, *now]))
        return [
            line
            for key in keys
            for line in differences(before.get(key), now.get(key), f"{path}.{key}" if path else str(key))
        ]
    return [] if before == now else [f"{path}: {before!r} -> {now!r}"]


def _put_aside(root: Path) -> None:
    """Keeps an earlier run's checkpoints out of the way of a run that must start anew."""
    if dist.get_rank() == 0 and store.list_steps(root):
        number = 1
        while (aside := root.with_name(f"{root.name}.old-{number}")).exists():
            number += 1
        root.rename(aside)
        log.warning("checkpoint.resume=never: earlier checkpoints moved to %s", aside)
    dist.barrier()
