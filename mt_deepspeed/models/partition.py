"""Access to parameters that DeepSpeed's `zero.Init` has split, and initialisation through it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def whole(parameter: Tensor, write: bool = True) -> Iterator[None]:
    """Makes `parameter` whole inside the context, on all ranks together.

    Does nothing for parameters that are not partitioned. One parameter at a time bounds the extra memory.

    Args:
        parameter: The parameter.
        write: What rank 0 writes to it is kept by every rank; False: nothing written is kept.
    """
    if not hasattr(parameter, "ds_id"):
        yield
        return
    import deepspeed  # the parameter is partitioned, so DeepSpeed is installed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0 if write else None):
        yield


def init_weights(module: nn.Module, std: float) -> None:
    """Draws linear and embedding weights from N(0, std^2), zeroes biases and the rows of padding indices.

    Layer norms keep their constructor values (1, 0); raw parameters are left alone.
    """
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Embedding)):
            with whole(part.weight):
                nn.init.normal_(part.weight, std=std)
                if isinstance(part, nn.Embedding) and part.padding_idx is not None:
                    with torch.no_grad():
                        part.weight[part.padding_idx].zero_()
        if isinstance(part, nn.Linear) and part.bias is not None:
            with whole(part.bias):
                nn.init.zeros_(part.bias)
