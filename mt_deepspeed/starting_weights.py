"""Weights a run starts from: a whole model, or pre-trained towers."""

import logging
from pathlib import Path

from torch import Tensor, nn

from mt_deepspeed.config import RunConfig
from mt_deepspeed.engine.weights import choose_weights, read_weights
from mt_deepspeed.models.key_maps import plain_name
from mt_deepspeed.models.state_dicts import KeyReport, import_checkpoint

log = logging.getLogger(__name__)

HEADS = ("*_score.*", "*_classifier.*", "rank_output.*", "*itc*", "temperature")
"""Parameters that belong to a task: a starting checkpoint may lack them, or bring others."""


def load_starting_weights(task: nn.Module, config: RunConfig) -> list[KeyReport]:
    """Fills `task` from `checkpoint.init_from`, else the towers from `model.text.pretrained` and `.vision.pretrained`.

    Every import prints its key report.

    Raises:
        ValueError: A source that cannot be read or does not fit; see `import_checkpoint`.
    """
    reports = []
    init_from = config.checkpoint.init_from
    if init_from is not None:
        source = _source(Path(init_from))
        reports.append(import_checkpoint(task, source, allow_missing=HEADS, allow_unexpected=HEADS))
    else:
        for tower in (config.model.text.pretrained, config.model.vision.pretrained):
            if tower is not None:
                reports.append(import_checkpoint(task, tower))
    for report in reports:
        log.info("%s", report)
    return reports


def run_state_dict(checkpoint: Path) -> dict[str, Tensor]:
    """Weights of one checkpoint of a run, in the plain layout."""
    return {plain_name(name): tensor for name, tensor in read_weights(checkpoint)}


def _source(folder: Path) -> str | Path | dict[str, Tensor]:
    """What `import_checkpoint` is given for a run folder, one of its checkpoints, an exported folder, or a file."""
    if (folder / "config.yaml").is_file() or folder.parent.name == "checkpoints":
        return run_state_dict(choose_weights(folder))
    if (folder / "vocab.json").is_file() and (folder / "model.safetensors").is_file():
        return folder / "model.safetensors"
    return str(folder)
