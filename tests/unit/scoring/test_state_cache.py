"""Tower states come back as they were put, from memory and from a file."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mt_deepspeed.scoring.state_cache import StateCache


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=6),
    seed=st.integers(0, 999),
    mapped=st.booleans(),
)
def test_ragged_items(tmp_path_factory: Any, lengths: list[int], seed: int, mapped: bool) -> None:
    folder = tmp_path_factory.mktemp("states") if mapped else None
    cache = StateCache(lengths, (2, 3), torch.bfloat16, folder)
    generator = torch.Generator().manual_seed(seed)
    items = [torch.randn(length, 2, 3, generator=generator).bfloat16() for length in lengths]
    order = torch.randperm(len(items), generator=generator).tolist()
    for item in order:
        cache.put(item, items[item])
    padded, mask = cache.padded(order)
    assert mask.sum(dim=1).tolist() == [lengths[item] for item in order]
    for row, item in enumerate(order):
        assert torch.equal(cache.get(item), items[item])
        assert torch.equal(padded[row, : lengths[item]], items[item])
        assert not padded[row, lengths[item] :].any()
    assert StateCache.bytes_needed(lengths, (2, 3), torch.bfloat16) == sum(lengths) * 12
    if folder is not None:
        assert not list(folder.iterdir())  # nothing is left, however the process ends


def test_a_full_disk_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: Any) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(ValueError, match=r"no room for 0\.0 GiB of states: .*No space left"):
        StateCache([3], (2, 3), torch.float32, tmp_path)
    assert not list(tmp_path.iterdir())
