"""Names of foreign state dicts in terms of ours, and what may be left over. Pure string functions."""

import re
from fnmatch import fnmatchcase

RESIZED_POSITIONS = "vit_model.visual.positional_embedding"
TOKEN_TYPES = "token_type_embeddings.weight"
SCALARS = ("temperature", "logit_scale", "scaled_factor", "beta")
"""Last name parts of parameters that foreign layouts store with shape `[]` and we with `[1]`."""

UNUSED = {
    "text_transformer.embeddings.position_ids": "a buffer that is computed",
    "text_transformer.embeddings.token_type_ids": "a buffer that is computed",
    "text_transformer.pooler.*": "RoBERTa's pooler is never called",
    "vit_model.positional_embedding": "left over from CLIP's text tower",
    "vit_model.ln_final.*": "left over from CLIP's text tower",
    "vit_model.visual.proj": "CLIP's projection takes no part",
    "vit_model.visual.ln_separate.*": "the published forward passes use ln_post throughout",
    "*_manager_tower.*.softmax_temperature_cross": "declared by the published managers, never used",
    "temperature": "used by contrastive objectives only",
}
"""Patterns of tensors that published checkpoints hold and no forward pass reads, with the reason.

They count only where the model has no parameter of that name.
"""

# The published BridgeTower code names the contrastive heads without the prefix.
_REFERENCE = ((r"^itc_(text|image)_head\.", r"cross_modal_itc_\1_head."),)

_HF_BRIDGETOWER = (
    (r"^bridgetower\.", ""),
    (r"^vision_model\.visual\.embeddings\.class_embedding$", "vit_model.visual.class_embedding"),
    (r"^vision_model\.visual\.embeddings\.patch_embedding\.", "vit_model.visual.conv1."),
    (r"^vision_model\.visual\.embeddings\.position_embedding\.weight$", RESIZED_POSITIONS),
    (r"^vision_model\.visual\.", "vit_model.visual."),
    (r"^text_model\.", "text_transformer."),
)

_VISION = r"^vit_model\.visual\."
_TO_HF_BRIDGETOWER = (
    (_VISION + "class_embedding$", "vision_model.visual.embeddings.class_embedding"),
    (_VISION + r"conv1\.", "vision_model.visual.embeddings.patch_embedding."),
    (_VISION + "positional_embedding$", "vision_model.visual.embeddings.position_embedding.weight"),
    (_VISION, "vision_model.visual."),
    (r"^text_transformer\.", "text_model."),
)

_ROBERTA = ((r"^roberta\.", ""), (r"^(embeddings|encoder|pooler)\.", r"text_transformer.\1."))

_CLIP = ((r"^visual\.", "vit_model.visual."),)

_RULES = {
    "reference": _REFERENCE,
    "hf_bridgetower": _HF_BRIDGETOWER,
    "hf_roberta": _ROBERTA,
    "clip": _CLIP,
}

SCOPES = {"hf_roberta": "text_transformer.", "clip": "vit_model."}
"""Layouts that fill one tower only: parameters outside the prefix are neither loaded nor missing."""

_OUTSIDE = {
    "hf_roberta": ("lm_head.*", "classifier.*", "qa_outputs.*"),
    "clip": (
        "positional_embedding",
        "token_embedding.*",
        "transformer.*",
        "ln_final.*",
        "text_projection",
        "text.*",
        "logit_scale",
        "logit_bias",
        "input_resolution",
        "context_length",
        "vocab_size",
    ),
}


def own_name(name: str, layout: str) -> str:
    """Our (plain) name of a foreign tensor name."""
    for pattern, replacement in _RULES[layout]:
        name = re.sub(pattern, replacement, name)
    return name


def hf_bridgetower_name(name: str) -> str | None:
    """The inverse of `own_name` for transformers' BridgeTower; None for a head that it does not have."""
    if name.startswith(("mlm_score.", "itm_score.", "itc_")) or name == "logit_scale":
        return name
    if name == "temperature" or matches(name, ("rank_output.*", "*_classifier.*", "cross_modal_itc_*")):
        return None
    for pattern, replacement in _TO_HF_BRIDGETOWER:
        name = re.sub(pattern, replacement, name)
    return f"bridgetower.{name}"


def plain_name(name: str) -> str:
    """Plain-layout name of a parameter of a module that holds its two-tower model as `model`."""
    return name.removeprefix("model.")


def is_unused(name: str, layout: str) -> bool:
    """Whether a leftover tensor is known to take no part (`UNUSED`, and other towers of partial layouts)."""
    return matches(name, tuple(UNUSED)) or matches(name, _OUTSIDE.get(layout, ()))


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether `name` fits one of the shell-style patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def detect_layout(names: tuple[str, ...]) -> str:
    """Layout by the tensor names.

    Raises:
        ValueError: No known layout.
    """
    if any(name.startswith(("vit_model.", "text_transformer.", "cross_modal_")) for name in names):
        if any(name.startswith("vision_model.") for name in names):
            return "hf_bridgetower"
        return "reference"
    if any(name.startswith("bridgetower.") for name in names):
        return "hf_bridgetower"
    if "visual.conv1.weight" in names:
        return "clip"
    if any(re.match(r"(roberta\.)?embeddings\.word_embeddings\.", name) for name in names):
        return "hf_roberta"
    raise ValueError(
        f"state dict with {len(names)} tensors (first: {', '.join(names[:3])}): no known layout; expected "
        "the published ManagerTower or BridgeTower names, Hugging Face BridgeTower or RoBERTa, or CLIP"
    )
