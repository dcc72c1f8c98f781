"""Weights a run starts from: a whole model, or pre-trained towers."""

import json
import logging
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mt_deepspeed.config import RunConfig, from_dict, load_config, to_dict
from mt_deepspeed.config.run import TOWER_OF_TASK
from mt_deepspeed.data.text import load_tokenizer
from mt_deepspeed.engine.weights import choose_weights, read_weights
from mt_deepspeed.models.key_maps import plain_name
from mt_deepspeed.models.state_dicts import KeyReport, import_checkpoint
from mt_deepspeed.tasks.false_texts import FalseTextsTask

log = logging.getLogger(__name__)

HEADS = ("*_score.*", "*_classifier.*", "rank_output.*", "*itc*", "temperature", "logit_scale")
"""Parameters that belong to a task: a starting checkpoint may lack them, or bring others."""

_FUSION = ("cross_modal_*", "token_type_embeddings.*", "layer_embeddings_*")
STAYS_BEHIND = {"vision": ("text_transformer.*", *_FUSION), "text": ("vit_model.*", *_FUSION)}
"""Tower that is all of a model -> parts of a two-tower checkpoint that it does not have."""

MAY_DIFFER = {
    "text.pretrained",
    "text.dropout",
    "vision.pretrained",
    "vision.image_size",
    "cross_modal.dropout",
    "cross_modal.num_token_types",
    "link.temperature",
    "link.learnable_temperature",
    "link.learnable_weight",
    "link.noise",
    "link.expert_gain",
    "init_std",
}
"""Settings of a model that need not be those of the model it starts from: where weights come from, how training
treats them, and what is resized or extended on the way."""


def check_start(config: RunConfig) -> None:
    """Compares model and tokenizer with those of `checkpoint.init_from`, where that is a run or an exported model.

    Much of it would otherwise pass unseen: another number of heads or another vocabulary of the same size has
    the same shapes.

    Raises:
        ValueError: They differ in what must be equal; names every setting with both values.
    """
    if config.checkpoint.init_from is None:
        return
    folder = Path(config.checkpoint.init_from).expanduser()
    source = _source_config(folder)
    if source is None:
        return
    own, other = _flat(to_dict(config.model)), _flat(to_dict(source.model))
    tower = TOWER_OF_TASK.get(config.task)
    kept = [key for key in own if key not in MAY_DIFFER and (tower is None or key.startswith(f"{tower}."))]
    wrong = [key for key in kept if own[key] != other[key]]
    if wrong:
        shown = "; ".join(f"model.{key} is {own[key]}, there {other[key]}" for key in wrong)
        raise ValueError(f"checkpoint.init_from {folder}: another model: {shown}")
    if not config.reads_texts:
        return
    exported = (folder / "vocab.json").is_file()
    tokenizer, root = (str(folder.resolve()), ".") if exported else (source.data.tokenizer, source.data.root)
    try:
        theirs = load_tokenizer(tokenizer, root, config.data.max_text_len)
    except ValueError as error:
        log.warning("checkpoint.init_from %s: its tokenizer cannot be compared: %s", folder, error)
        return
    ours = load_tokenizer(config.data.tokenizer, config.data.root, config.data.max_text_len)
    if ours.vocabulary != theirs.vocabulary:
        raise ValueError(
            f"checkpoint.init_from {folder}: it was trained with the tokenizer {tokenizer}, which gives other "
            f"ids than data.tokenizer {config.data.tokenizer}; set data.tokenizer to the former"
        )


def _source_config(folder: Path) -> RunConfig | None:
    run = folder.parent.parent if folder.parent.name == "checkpoints" else folder
    if (run / "config.yaml").is_file():
        return load_config(files=[run / "config.yaml"])
    if (folder / "vocab.json").is_file() and (folder / "config.json").is_file():
        settings = json.loads((folder / "config.json").read_text("utf-8"))
        # Folders of transformers have files of the same names.
        return from_dict(RunConfig, settings["config"]) if "config" in settings else None
    return None


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def load_starting_weights(task: nn.Module, config: RunConfig) -> list[KeyReport]:
    """Fills `task` from `checkpoint.init_from`, else the towers from `model.text.pretrained` and `.vision.pretrained`.

    Every import prints its key report.

    Raises:
        ValueError: A source that cannot be read or does not fit; see `import_checkpoint`.
    """
    reports = []
    init_from = config.checkpoint.init_from
    tower = TOWER_OF_TASK.get(config.task)
    if init_from is not None:
        source = _source(Path(init_from).expanduser())
        spare = (*HEADS, *STAYS_BEHIND[tower]) if tower else HEADS
        report = import_checkpoint(task, source, allow_missing=HEADS, allow_unexpected=spare)
        reports.append(report)
        if isinstance(task, FalseTextsTask) and "rank_output.weight" in report.missing:
            if "itm_score.fc.weight" in report.missing:
                raise ValueError(
                    f"checkpoint.init_from {init_from}: no matching head (itm_score), which retrieval by false "
                    "texts starts from; choose a model pre-trained with ITM"
                )
            task.rank_from_matching()
    else:
        towers = {"text": config.model.text.pretrained, "vision": config.model.vision.pretrained}
        for name, weights in towers.items():
            if weights is not None and tower in (None, name):
                reports.append(import_checkpoint(task, weights))
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
