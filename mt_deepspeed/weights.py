"""Weights a run starts from: a whole model, or pre-trained towers."""

import logging
from pathlib import Path

from torch import nn

from mt_deepspeed.config import RunConfig
from mt_deepspeed.models.state_dicts import KeyReport, import_checkpoint

log = logging.getLogger(__name__)

NEW_PARTS = ("cross_modal_*", "token_type_embeddings.*", "layer_embeddings_*", "*_score.*")
"""What pre-training adds to the towers; a starting checkpoint may lack heads."""


def load_starting_weights(task: nn.Module, config: RunConfig) -> list[KeyReport]:
    """Fills `task` from `checkpoint.init_from`, else the towers from `model.text.pretrained` and `.vision.pretrained`.

    Every import prints its key report.

    Raises:
        ValueError: A source that cannot be read or does not fit; see `import_checkpoint`.
    """
    reports = []
    init_from = config.checkpoint.init_from
    if init_from is not None:
        source, heads = _source(init_from), ("*_score.*",)
        # A checkpoint of another task brings other heads, and may lack the ones that this task adds.
        others = (
            "vqa_classifier.*",
            "nlvr2_classifier.*",
            "snli_classifier.*",
            "rank_output.*",
            "*itc*",
            "temperature",
        )
        reports.append(
            import_checkpoint(task, source, allow_missing=heads, allow_unexpected=(*heads, *others))
        )
    else:
        for tower in (config.model.text.pretrained, config.model.vision.pretrained):
            if tower is not None:
                reports.append(import_checkpoint(task, tower))
    for report in reports:
        log.info("%s", report)
    return reports


def _source(text: str) -> str | Path:
    """An exported folder stands for its weight file; everything else is taken as it is."""
    weights = Path(text) / "model.safetensors"
    if (Path(text) / "config.json").is_file() and weights.is_file() and (Path(text) / "vocab.json").is_file():
        return weights
    return text
