"""Work that every rank does and any rank may fail at: all go on, or all stop with the same message."""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


class RanksFailedError(ValueError):
    """Some rank could not do its part; every rank raises this with the same text."""


def together(work: Callable[[], T], what: str, group: Any = None) -> T:
    """Runs `work` on every rank and returns the own result; a collective.

    Args:
        work: What to do; it holds no collectives.
        what: Names it in the message.
        group: Process group to agree in; None: the default one.

    Raises:
        RanksFailedError: On all ranks, when `work` raised OSError, RuntimeError or ValueError on any: instead of
            a hang of the ranks that went on.
    """
    error: str | None = None
    result: Any = None
    try:
        result = work()
    except (OSError, RuntimeError, ValueError) as caught:
        kind = "" if isinstance(caught, ValueError) else f"{type(caught).__name__}: "
        error = f"{kind}{caught}"
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, None if error is None else (error, platform.node()), group=group)
    failed = {rank: outcome for rank, outcome in enumerate(outcomes) if outcome is not None}
    if failed:
        raise RanksFailedError(f"{what} failed: {_describe(failed, len(outcomes))}")
    return result  # type: ignore[no-any-return]


def any_of(wishes: dict[str, bool], device: torch.device) -> dict[str, bool]:
    """Which wishes some rank has; a collective, with the same keys on all ranks."""
    vector = torch.tensor([float(wish) for wish in wishes.values()], device=device)
    dist.all_reduce(vector)
    return {name: value > 0 for name, value in zip(wishes, vector.tolist(), strict=True)}


def _describe(failed: dict[int, tuple[str, str]], ranks: int) -> str:
    messages = dict.fromkeys(message for message, _ in failed.values())
    if len(failed) == ranks and len(messages) == 1:
        return next(iter(messages))
    return "; ".join(f"rank {rank} on {host}: {message}" for rank, (message, host) in failed.items())
