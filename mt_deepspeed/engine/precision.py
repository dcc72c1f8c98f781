"""Mixed precision: torch autocast over fp32 weights, and a loss scale for fp16.

The same at every ZeRO stage, on purpose. DeepSpeed's own half-precision optimizers differ between
stages (with bf16 and stage 0, Adam's step counter starts one too high and the losses drift by 0.1),
and in bf16 they may skip a step without a word. Under autocast DeepSpeed only ever sees fp32 weights
and fp32 gradients.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Context for a forward pass in `precision` (`fp32`, `bf16`, `fp16`)."""
    dtype = DTYPES[precision]
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


@dataclass
class LossScale:
    """Dynamic loss scale: halves on overflow, doubles after `growth_interval` clean steps. fp16 only.

    With `value` 1 and `dynamic` False (fp32, bf16) it never changes.
    """

    value: float = 1.0
    clean_steps: int = 0
    dynamic: bool = False
    growth_interval: int = 2000
    minimum: float = 1.0
    maximum: float = 2.0**24

    @classmethod
    def for_precision(cls, precision: str) -> LossScale:
        """2^16, dynamic, for fp16; fixed 1 otherwise."""
        return cls(value=2.0**16, dynamic=True) if precision == "fp16" else cls()

    def absorbs_overflow(self) -> bool:
        """Whether a non-finite gradient may just mean that the scale is too high."""
        return self.dynamic and self.value > self.minimum

    def update(self, overflow: bool) -> None:
        """Adapts the scale after one optimizer step."""
        if not self.dynamic:
            return
        if overflow:
            self.value = max(self.minimum, self.value / 2.0)
            self.clean_steps = 0
            return
        self.clean_steps += 1
        if self.clean_steps >= self.growth_interval:
            self.value = min(self.maximum, self.value * 2.0)
            self.clean_steps = 0
