"""The file writer of checkpoints: every kind of tensor comes back, and the fingerprint is that of the file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mt_deepspeed.engine import durable

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool)


def test_tensors_of_every_kind_come_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {
        f"{dtype}/{shape}": (torch.randn(shape) * 3).to(dtype)
        for dtype in DTYPES
        for shape in ((), (0, 3), (5,), (2, 3, 7))
    }
    tensors["not contiguous"] = torch.arange(12.0).view(3, 4).T
    file = tmp_path / "file.safetensors"
    entry = durable.write_tensors(file, tensors)
    assert entry == durable.fingerprint(file)
    found = load_file(file)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_a_file_without_tensors_can_be_read(tmp_path: Path) -> None:
    durable.write_tensors(tmp_path / "empty.safetensors", {})
    assert load_file(tmp_path / "empty.safetensors") == {}


def test_a_file_that_cannot_be_written_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        durable.write_tensors(tmp_path / "no folder" / "file.safetensors", {"a": torch.ones(2)})
