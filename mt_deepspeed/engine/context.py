"""Where a task is built: on this process, or split over the ranks while it is built (ZeRO-3)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import deepspeed
import torch

from mt_deepspeed.config import RunConfig
from mt_deepspeed.engine.build import plan
from mt_deepspeed.engine.ds_config import zero_stage
from mt_deepspeed.engine.launch import Place


def building(config: RunConfig, ds_config: dict[str, Any], place: Place) -> AbstractContextManager[object]:
    """Context for the constructor of the task: under ZeRO-3 no rank ever holds the whole model.

    Also seeds the generator, so that a run's first weights follow from `train.seed`.

    Raises:
        DsConfigError: The run cannot work as configured; nothing has been built yet.
    """
    _, complete = plan(config, ds_config, place)
    torch.manual_seed(config.train.seed)
    if zero_stage(complete) < 3:
        return nullcontext()
    context: AbstractContextManager[object] = deepspeed.zero.Init(config_dict_or_path=complete)
    return context
