"""Who owns what: this rank's share of weights, Adam moments and gradients at ZeRO stages 0 to 3.

The only file that knows where DeepSpeed keeps these tensors. A slice is a flat range of one parameter;
the slices of all ranks cover every trainable parameter exactly once, so whatever is written slice by
slice can be read back by any number of ranks at any stage.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Slice:
    """Elements [start, start + numel) of parameter `name`, stored in `holder` from `offset` on."""

    name: str
    start: int
    numel: int
    holder: Tensor
    """The fp32 tensor the optimizer updates: key into its `state`."""
    offset: int

    def of(self, flat: Tensor) -> Tensor:
        """The slice's 1-D view of a tensor laid out like `holder`."""
        return flat.detach().view(-1).narrow(0, self.offset, self.numel)


class Ownership:
    """Finds the slices of this rank.

    Args:
        engine: DeepSpeed engine, initialized with `optimizer`.
        optimizer: The Adam instance that was handed to DeepSpeed.
        names: Trainable parameter -> name.
        rank: This rank.
        world_size: Number of ranks.
    """

    def __init__(
        self,
        engine: Any,
        optimizer: torch.optim.Optimizer,
        names: dict[nn.Parameter, str],
        rank: int,
        world_size: int,
    ) -> None:
        self.zero: Any = engine.optimizer
        self.optimizer = optimizer
        self.names = names
        self.rank = rank
        self.world_size = world_size
        self.stage = int(engine.zero_optimization_stage()) if engine.zero_optimization() else 0
        self.offloads = self.stage > 0 and bool(
            self.zero.offload_optimizer if self.stage == 3 else self.zero.cpu_offload
        )
        self.swaps = self.stage == 3 and bool(self.zero.swap_optimizer)

    def groups(self, everything: bool = False, write_back: bool = False) -> Iterator[list[Slice]]:
        """Slices, in lists that share storage; a list is valid until the next one is asked for.

        Args:
            everything: Also what other ranks own and this one holds too (stage 0: all of it).
            write_back: The caller changes the states (matters only when they live on NVMe).
        """
        if self.stage == 0:
            yield self._plain(0, 1) if everything else self._plain(self.rank, self.world_size)
        elif self.stage < 3:
            for index in range(len(self.zero.bit16_groups)):
                yield self._flat(index)
        else:
            for index in range(len(self.zero.fp16_groups)):
                with self._swapped_in(index, write_back):
                    yield self._partitioned(index)

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """(parameter name, owned part of its gradient) after the last backward pass of a step.

        Each element of each gradient is owned by one rank; at stage 0, where all ranks hold the same
        gradients, by rank 0. Must not be called when states live on NVMe (`swaps`).
        """
        if self.stage == 0:
            if self.rank == 0:
                yield from ((name, p.grad) for p, name in self.names.items() if p.grad is not None)
            return
        if self.offloads and torch.cuda.is_available():
            torch.cuda.synchronize()  # gradients travel to the CPU on other streams
        if self.offloads:
            for slices in self.groups():
                yield from (
                    (one.name, one.of(one.holder.grad)) for one in slices if one.holder.grad is not None
                )
            return
        owners = self.zero.params_in_partition if self.stage < 3 else self.zero.fp16_groups
        for index, parameters in enumerate(owners):
            parts = self.zero.averaged_gradients.get(index) or []
            for parameter, part in zip(parameters, parts, strict=False):  # stages 1, 2: padding comes last
                yield self.names[parameter], part

    def _plain(self, share: int, shares: int) -> list[Slice]:
        """Stage 0: every rank holds everything; the flat sequence of all elements is cut evenly."""
        total = sum(parameter.numel() for parameter in self.names)
        first, last = (total * end // shares for end in (share, share + 1))
        slices, position = [], 0
        for parameter, name in self.names.items():
            start, stop = max(first - position, 0), min(last - position, parameter.numel())
            if start < stop:
                slices.append(Slice(name, start, stop - start, parameter, start))
            position += parameter.numel()
        return slices

    def _flat(self, index: int) -> list[Slice]:
        """Stages 1 and 2: one flat fp32 tensor per parameter group and rank."""
        holder = self.zero.single_partition_of_fp32_groups[index]
        slices = []
        for parameter in self.zero.bit16_groups[index]:
            mapping = parameter._hp_mapping
            if mapping is not None:
                inside, address = mapping.lp_fragment_address, mapping.hp_fragment_address
                slices.append(Slice(self.names[parameter], inside.start, inside.numel, holder, address.start))
        return slices

    def _partitioned(self, index: int) -> list[Slice]:
        """Stage 3: every parameter is cut into equal parts, the last one padded."""
        holder = self.zero.fp32_partitioned_groups_flat[index]
        slices = []
        for parameter in self.zero.fp16_groups[index]:
            _, offset, numel = self.zero.grad_position[self.zero.get_param_id(parameter)]
            start = numel * self.rank
            real = min(numel, parameter.ds_numel - start)
            if real > 0:
                slices.append(Slice(self.names[parameter], start, real, holder, offset))
        return slices

    @contextmanager
    def _swapped_in(self, index: int, write_back: bool) -> Iterator[None]:
        if not (self.swaps and self.zero._swappable_optimizer_subgroup(index)):
            yield
            return
        self.zero._optimizer_states_and_gradient_swap_in(index)
        yield
        if write_back:
            self.zero._optimizer_states_and_gradient_swap_out(index)
        else:
            self.zero._release_swap_buffers(index)


def adam_moments(optimizer: torch.optim.Optimizer, one: Slice) -> dict[str, Tensor]:
    """First and second moment of a slice as 1-D views; zeros before the first step."""
    state = optimizer.state.get(one.holder, {})
    if not all(key in state for key in MOMENTS):
        return {key: torch.zeros(one.numel) for key in MOMENTS}
    return {key: one.of(state[key]) for key in MOMENTS}


def set_adam_state(optimizer: torch.optim.Optimizer, holder: Tensor, step: int) -> dict[str, Tensor]:
    """Gives `holder` an Adam state that has made `step` steps; returns its moments (zeros), to be filled.

    Every holder gets a step counter of its own: DeepSpeed's universal checkpoints share one tensor
    among all, which torch's Adam then increments once per holder and step.
    """
    if isinstance(optimizer, torch.optim.AdamW):
        on_device = bool(optimizer.defaults.get("fused") or optimizer.defaults.get("capturable"))
        device = holder.device if on_device else torch.device("cpu")
        counter: Any = torch.tensor(float(step), dtype=torch.float32, device=device)
    else:  # apex and DeepSpeed count in Python integers, apex per group
        counter = step
        for group in optimizer.param_groups:
            group["step"] = step
    moments = {key: torch.zeros_like(holder.detach()) for key in MOMENTS}
    optimizer.state[holder] = {"step": counter, **moments}
    return moments


def full_weight(parameter: nn.Parameter) -> Tensor:
    """A CPU copy of a whole parameter; under ZeRO-3 a collective that all ranks must join."""
    with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
        return parameter.detach().cpu().clone()
