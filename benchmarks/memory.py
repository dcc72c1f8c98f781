"""Bytes that a forward pass leaves for backward."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def kept_bytes(forward: Callable[[], Any], known: Iterable[Tensor]) -> int:
    """Bytes that `forward` saves for backward, without the `known` tensors and without one that it returns."""
    before = {tensor.untyped_storage().data_ptr() for tensor in known}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in before:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    if isinstance(result, Tensor):
        kept.pop(result.untyped_storage().data_ptr(), None)
    return sum(kept.values())
