"""Weights in and out: published checkpoints, Hugging Face and CLIP weights, the plain layout.

The plain layout is one flat dict of unfused tensors under the published ManagerTower / BridgeTower names.
A module that wraps its `TwoTowerModel` does so under the attribute `model`; that prefix is not part of it.
Everything here works on parameters split by ZeRO-3, one whole parameter at a time.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mt_deepspeed.models.key_maps import (
    RESIZED_POSITIONS,
    SCALARS,
    SCOPES,
    TOKEN_TYPES,
    detect_layout,
    is_unused,
    matches,
    own_name,
    plain_name,
)
from mt_deepspeed.models.partition import whole
from mt_deepspeed.models.vision_tower import resize_positions
from mt_deepspeed.models.weight_sources import WeightSource, open_source

MAX_LISTED = 40
"""Names of one kind that a report lists one by one."""


class KeyMismatchError(ValueError):
    """A checkpoint and a model do not fit together beyond the named exceptions."""


@dataclass(frozen=True)
class KeyReport:
    """What an import did with every name; plain-layout names."""

    source: str
    layout: str
    loaded: tuple[str, ...]
    """Parameters filled, those of `resized` included."""
    resized: tuple[str, ...]
    """Filled after resizing (position embeddings) or extension (third token type)."""
    missing: tuple[str, ...]
    """Parameters without a tensor, left as they were; each was allowed."""
    unexpected: tuple[str, ...]
    """Tensors without a parameter; each is known as unused or was allowed."""

    def __str__(self) -> str:
        lines = [f"{self.source} ({self.layout}): {len(self.loaded)} tensors loaded"]
        for title in ("resized", "missing", "unexpected"):
            names = getattr(self, title)
            if names:
                lines.append(f"  {title} ({len(names)}): {', '.join(_shortened(names))}")
        return "\n".join(lines)


def _shortened(names: tuple[str, ...]) -> list[str]:
    """Many names, such as those of a whole tower, by their first parts: `vit_model.* (152)`."""
    if len(names) <= MAX_LISTED:
        return list(names)
    parts = Counter(name.partition(".")[0] for name in names)
    return [f"{part}.* ({count})" for part, count in parts.items()]


def import_checkpoint(
    module: nn.Module,
    source: str | Path | Mapping[str, Tensor],
    *,
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
) -> KeyReport:
    """Fills the parameters of `module` from a checkpoint; to be called before `deepspeed.initialize`.

    Args:
        module: A `TwoTowerModel`, or a module that holds one as `model` and heads beside it.
        source: A published `.ckpt`, a state dict file (`.safetensors`, `.pt`, `.bin`), a Hugging Face
            RoBERTa or BridgeTower folder or hub name, an open_clip `MODEL:TAG` or CLIP weight file, or a
            state dict. RoBERTa and CLIP weights fill their tower only.
        allow_missing: Shell patterns of plain names that may keep their values, e.g. `vqa_classifier.*`.
        allow_unexpected: Shell patterns of plain names that may be left over, e.g. `mlm_score.*`.

    Returns:
        The report; nothing was written if an error is raised.

    Raises:
        KeyMismatchError: Missing, unexpected or misshapen tensors beyond the allowed ones.
        ValueError: The source cannot be read.
    """
    weights = open_source(source)
    layout = detect_layout(weights.names)
    parameters = {plain_name(name): parameter for name, parameter in module.named_parameters()}
    wanted = {name for name in parameters if name.startswith(SCOPES.get(layout, ""))}
    found = _own_names(weights, layout, wanted)
    missing = sorted(wanted - found.keys())
    unexpected = sorted(found.keys() - wanted)
    errors = [f"missing: {name}" for name in missing if not matches(name, tuple(allow_missing))] + [
        f"unexpected: {name}"
        for name in unexpected
        if not (is_unused(name, layout) or matches(name, tuple(allow_unexpected)))
    ]
    loaded = sorted(wanted & found.keys())
    resized = []
    for name in loaded:
        has, wants = weights.shape(found[name]), _full_shape(parameters[name])
        if _squeezed(has) == _squeezed(wants):
            continue
        resized.append(name)
        if not _can_adapt(name, has, wants):
            errors.append(f"shape of {name}: found {list(has)}, expected {list(wants)}")
    if errors:
        raise KeyMismatchError(_describe(weights.label, layout, errors))
    for name in loaded:
        _fill(parameters[name], name, weights, found[name])
    return KeyReport(weights.label, layout, tuple(loaded), tuple(resized), tuple(missing), tuple(unexpected))


def plain_state_dict(module: nn.Module, *, keep: bool = True) -> dict[str, Tensor]:
    """All parameters as CPU copies in the plain layout; published scalars have shape `[]`.

    Args:
        module: As for `import_checkpoint`.
        keep: False on ranks that only help to gather split parameters; they get an empty dict.
    """
    state = {}
    for name, parameter in module.named_parameters():
        with whole(parameter, write=False):
            if keep:
                copy = parameter.detach().to("cpu", copy=True)
                plain = plain_name(name)
                state[plain] = copy.reshape(()) if plain.rpartition(".")[2] in SCALARS else copy
    return state


def _own_names(weights: WeightSource, layout: str, wanted: set[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in weights.names:
        # A name the model has is never renamed: ours may coincide with another layout's old names.
        own = name if layout == "reference" and name in wanted else own_name(name, layout)
        if own in found:
            raise KeyMismatchError(f"{weights.label}: {found[own]} and {name} both mean {own}")
        found[own] = name
    return found


def _full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape or (1,)


def _can_adapt(name: str, has: tuple[int, ...], wants: tuple[int, ...]) -> bool:
    if len(has) != 2 or has[1:] != wants[1:]:
        return False
    if name == TOKEN_TYPES:
        return has[0] == 2 and wants[0] == 3
    return name == RESIZED_POSITIONS and round((has[0] - 1) ** 0.5) ** 2 == has[0] - 1


def _fill(parameter: nn.Parameter, name: str, weights: WeightSource, key: str) -> None:
    shape = _full_shape(parameter)
    with whole(parameter), torch.no_grad():
        tensor = weights.read(key)
        if name == TOKEN_TYPES and tensor.shape[0] < shape[0]:
            tensor = torch.cat([tensor, tensor[1:2]])  # the second image of NLVR2 starts as the first
        elif name == RESIZED_POSITIONS and tensor.shape[0] != shape[0]:
            side = round((shape[0] - 1) ** 0.5)
            tensor = resize_positions(tensor.float(), (side, side))
        parameter.copy_(tensor.reshape(shape))


def _describe(label: str, layout: str, errors: list[str]) -> str:
    shown = errors[:20] + ([f"... and {len(errors) - 20} more"] if len(errors) > 20 else [])
    return (
        f"{label} ({layout} layout) does not fit the model:\n  "
        + "\n  ".join(shown)
        + "\nCheck the model configuration against the checkpoint's; heads that only one side has "
        "are passed as allow_missing / allow_unexpected."
    )
