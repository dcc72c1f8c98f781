"""Opens weight files lazily: tensor names and shapes first, one tensor at a time later.

No file is unpickled beyond tensors and plain containers: `torch.load` runs with `weights_only=True`.
"""

import json
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

_TORCH_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")


@dataclass(frozen=True)
class WeightSource:
    """Tensors of a checkpoint that are read when asked for."""

    label: str
    """For messages and reports."""
    names: tuple[str, ...]
    read: Callable[[str], Tensor]
    """Returns one tensor on the CPU."""
    shape: Callable[[str], tuple[int, ...]]
    """Returns the shape of one tensor."""


class _Inert:
    """Stands for any class or function that a checkpoint names besides tensors; it does nothing.

    What it makes is an empty OrderedDict, the one type that the safe unpickler both fills and gives state to.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return OrderedDict()


def open_source(source: str | Path | Mapping[str, Tensor]) -> WeightSource:
    """Opens a state dict, a weight file, a Hugging Face folder or hub name, or an open_clip `MODEL:TAG`.

    Raises:
        ValueError: Nothing there, or nothing that holds weights.
    """
    if isinstance(source, Mapping):
        return _from_tensors("state dict", source)
    path = Path(source)
    if path.is_dir():
        return _open_folder(path)
    if path.is_file():
        return _open_file(path)
    name = str(source)
    if ":" in name:
        return _open_clip_tag(name)
    if path.suffix in (*_TORCH_SUFFIXES, ".safetensors") or name.startswith((".", "/", "~")):
        raise ValueError(f"{name}: no such file or folder")
    return _open_folder(_download(name))


def read_torch_file(path: Path) -> Any:
    """The content of a file that `torch.save` wrote, foreign classes replaced by inert stand-ins.

    Raises:
        ValueError: Not such a file.
    """
    try:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        stand_ins: list[Any] = [(type("Inert", (_Inert,), {}), name) for name in foreign]
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # the unpickler raises many kinds; all mean the same here
        raise ValueError(
            f"{path}: not a file that torch.load(weights_only=True) reads ({error}); a TorchScript archive "
            "or a file older than torch 1.6 must be saved again as a plain state dict or as safetensors"
        ) from error


def _open_file(path: Path) -> WeightSource:
    if path.suffix == ".safetensors":
        return _open_safetensors([path], str(path))
    content = read_torch_file(path)
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    tensors = {k: v for k, v in state.items() if isinstance(v, Tensor)} if isinstance(state, dict) else {}
    if not tensors:
        raise ValueError(f"{path}: found no tensors, expected a state dict or a dict with key `state_dict`")
    return _from_tensors(str(path), tensors)


def _from_tensors(label: str, tensors: Mapping[str, Tensor]) -> WeightSource:
    return WeightSource(label, tuple(tensors), tensors.__getitem__, lambda name: tuple(tensors[name].shape))


def _open_safetensors(paths: list[Path], label: str) -> WeightSource:
    holders: dict[str, Any] = {}
    for path in paths:
        try:
            file = safe_open(path, "pt")
        except Exception as error:  # safetensors raises its own untyped error
            raise ValueError(f"{path}: not a readable safetensors file ({error})") from error
        holders.update(dict.fromkeys(file.keys(), file))
    return WeightSource(
        label,
        tuple(holders),
        lambda name: holders[name].get_tensor(name),
        lambda name: tuple(holders[name].get_slice(name).get_shape()),
    )


def _open_folder(folder: Path) -> WeightSource:
    for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        index = folder / name
        if index.is_file():
            shards = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
            paths = [folder / shard for shard in shards]
            if name.startswith("model."):
                return _open_safetensors(paths, str(folder))
            return _join(str(folder), [_open_file(path) for path in paths])
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return _open_file(folder / name)
    raise ValueError(
        f"{folder}: found neither model.safetensors nor pytorch_model.bin (or their .index.json), "
        "expected a Hugging Face model folder"
    )


def _join(label: str, parts: list[WeightSource]) -> WeightSource:
    holders = {name: part for part in parts for name in part.names}
    return WeightSource(
        label, tuple(holders), lambda name: holders[name].read(name), lambda name: holders[name].shape(name)
    )


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    for weights in ("*.safetensors", "pytorch_model*.bin"):
        try:
            folder = Path(snapshot_download(name, allow_patterns=["config.json", "*.index.json", weights]))
        except Exception as error:  # network, authorisation, unknown name: the user's next step is the same
            raise ValueError(
                f"{name}: no such folder here, and the hub did not give it ({error}); download it elsewhere "
                "and pass the folder"
            ) from error
        if any(folder.glob(weights)):
            return folder
    raise ValueError(f"{name}: the hub's repository holds no safetensors or pytorch_model weights")


def _open_clip_tag(name: str) -> WeightSource:
    import open_clip

    model, _, tag = name.partition(":")
    known = open_clip.list_pretrained_tags_by_model(model)
    if tag not in known:
        raise ValueError(
            f"{name}: open_clip has no such weights; expected MODEL:TAG such as ViT-B-16-quickgelu:openai"
            + (f"; tags of {model}: {', '.join(known)}" if known else "")
        )
    try:
        file = open_clip.download_pretrained(open_clip.get_pretrained_cfg(model, tag))
    except Exception as error:  # network trouble of any kind
        raise ValueError(f"{name}: download failed ({error}); pass a local weight file instead") from error
    return _open_file(Path(file))
