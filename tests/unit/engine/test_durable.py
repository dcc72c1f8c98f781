"""The file writer of checkpoints gives what safetensors' own reader takes."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from mt_deepspeed.engine import durable


def test_tensors_of_every_kind_come_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {
        f"{dtype}/{shape}".replace("torch.", ""): (torch.randn(shape) * 3).to(dtype)
        for dtype in durable.SAFETENSORS_TYPES
        for shape in ((), (0, 3), (5,), (2, 3, 7))
    }
    tensors["not contiguous"] = torch.arange(12.0).view(3, 4).T
    tensors["more than a block"] = torch.arange(3_000_000, dtype=torch.float32)
    tensors['quote " and ü'] = torch.ones(3)
    file = tmp_path / "file.safetensors"
    entry = durable.write_tensors(file, tensors)
    assert entry == durable.fingerprint(file)
    found = load_file(file)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    with safe_open(file, "pt") as slices:
        part = slices.get_slice("more than a block")[1_000_000:1_000_003]
    assert part.tolist() == [1_000_000, 1_000_001, 1_000_002]


def test_a_file_without_tensors_can_be_read(tmp_path: Path) -> None:
    durable.write_tensors(tmp_path / "empty.safetensors", {})
    assert load_file(tmp_path / "empty.safetensors") == {}
