"""A BridgeTower as a folder for Hugging Face transformers."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken

from mt_deepspeed.data.text import MASK_TOKEN
from mt_deepspeed.data.transforms import RECIPES
from mt_deepspeed.models.hf_bridgetower import to_hf_bridgetower
from mt_deepspeed.models.key_maps import hf_bridgetower_name
from mt_deepspeed.models.state_dicts import plain_state_dict
from mt_deepspeed.models.vision_tower import MEAN, STD
from mt_deepspeed.pretrained.model import Pretrained
from mt_deepspeed.pretrained.probe import probe

CLASSES = {
    "mlm_score": "BridgeTowerForMaskedLM",
    "itm_score": "BridgeTowerForImageAndTextRetrieval",
    "itc_text_head": "BridgeTowerForContrastiveLearning",
}
"""Head -> class that has it. A folder with several heads is read by each of their classes."""
BOUND = 1e-3
"""Largest difference of logits, relative to the largest logit, beyond which the folder is refused."""


def export_bridgetower(pretrained: Pretrained, out: Path) -> tuple[dict[str, float], list[str]]:
    """Writes configuration, weights, tokenizer and picture settings, and compares the logits of every class.

    Returns:
        Class -> largest difference of its logits from ours, relative to the largest logit; and what is not the
        same over there, a sentence each.

    Raises:
        ValueError: ManagerTower, sizes or a head that transformers does not have, or other logits.
    """
    task = pretrained.task
    classes = [kind for head, kind in CLASSES.items() if hasattr(task, head)]
    eps = pretrained.config.objectives.mlm_layer_norm_eps if hasattr(task, "mlm_score") else None
    config = to_hf_bridgetower(pretrained.config.model, eps)
    if not classes:
        raise ValueError(
            f"transformers' BridgeTower has no head for task {pretrained.config.task}; it has {', '.join(CLASSES)}"
        )
    if classes == [CLASSES["itc_text_head"]]:
        config |= {"contrastive_hidden_size": pretrained.config.retrieval.itc_size}
        config |= {"logit_scale_init_value": float(task.logit_scale.detach())}
    state = plain_state_dict(task)
    names = {name: hf_bridgetower_name(name) for name in state}
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps({**config, "architectures": classes[:1]}, indent=2), "utf-8")
    tensors = {new: state[name].contiguous() for name, new in names.items() if new is not None}
    width = pretrained.config.model.text.hidden_size
    # The library's text tower has a pooler that nothing calls.
    tensors["bridgetower.text_model.pooler.dense.weight"] = torch.zeros(width, width)
    tensors["bridgetower.text_model.pooler.dense.bias"] = torch.zeros(width)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    _save_processor(pretrained, out)
    differences = {kind: _difference(pretrained, out, kind) for kind in classes}
    for kind, difference in differences.items():
        if not difference <= BOUND:
            raise ValueError(
                f"{out}: logits of {kind} differ by {difference:.2g} of the largest, {_EPSILONS}"
            )
    return differences, _notes(pretrained, [name for name, new in names.items() if new is None])


def _notes(pretrained: Pretrained, left_out: list[str]) -> list[str]:
    notes = []
    if left_out:
        notes.append(f"no counterpart in transformers, left out ({len(left_out)}): {', '.join(left_out)}")
    transform = pretrained.config.data.eval_transform
    if not RECIPES[transform].keep_aspect:
        notes.append(
            f"the model was trained on pictures squashed to a square (data.eval_transform {transform}); the library's "
            "processor keeps their aspect and cuts the centre out: squash them before it"
        )
    return notes


_EPSILONS = (
    "more than its two layer-norm epsilons explain; train with model.cross_modal.layer_norm_eps equal to "
    "model.text.layer_norm_eps, and objectives.mlm_layer_norm_eps equal to model.link.layer_norm_eps"
)


def _save_processor(pretrained: Pretrained, out: Path) -> None:
    from transformers import BridgeTowerImageProcessor, BridgeTowerProcessor, RobertaTokenizer

    pretrained.tokenizer.save(out)
    mask = AddedToken(MASK_TOKEN, lstrip=True)  # it swallows the space before it
    length = pretrained.config.data.max_text_len
    tokenizer = RobertaTokenizer.from_pretrained(out, mask_token=mask, model_max_length=length)
    side = pretrained.config.model.vision.image_size
    pictures = BridgeTowerImageProcessor(
        size={"shortest_edge": side},
        crop_size={"shortest_edge": side},
        size_divisor=1,  # the default, 32, gives sides that are no multiple of it a border
        image_mean=list(MEAN),
        image_std=list(STD),
    )
    BridgeTowerProcessor(pictures, tokenizer).save_pretrained(out)


@torch.no_grad()
def _difference(pretrained: Pretrained, out: Path, kind: str) -> float:
    batch = probe(pretrained)
    ours = pretrained(**batch)
    theirs = _load_quietly(out, kind)(
        input_ids=batch["text_ids"], attention_mask=batch["text_mask"], pixel_values=batch["pixels"]
    ).logits
    if kind == CLASSES["itc_text_head"]:
        names = ("text_embeddings", "image_embeddings", "itc_cross_modal_head")
        expected = torch.stack([ours[name] for name in names], dim=-2)
    else:
        expected = ours[next(head for head, name in CLASSES.items() if name == kind)]
    difference = (expected - theirs).abs().max() / expected.abs().max().clamp_min(1e-12)
    return float(difference)


def _load_quietly(out: Path, kind: str) -> Any:
    """The library's model; not its warnings about heads of the folder's other classes."""
    import transformers
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return getattr(transformers, kind).from_pretrained(out).eval()
    finally:
        logging.set_verbosity(before)
