"""Gradients between backward pass and optimizer step: norm, health, and two guards around DeepSpeed.

`UnusedParameters` exists because ZeRO-3 and optimizer offload keep the gradient of a parameter that
took no part in a step and silently apply it again. `StepGuard` exists so that the engine, not
DeepSpeed, decides whether weights move, and notices when they did not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mt_deepspeed.engine.slices import Ownership


class EngineError(RuntimeError):
    """DeepSpeed did something the engine relies on it not to do."""


class StepGuard:
    """Stands between DeepSpeed and the Adam instance: blocks its `step`, and counts calls.

    Blocking this call is the one way to skip a step that is the same at every ZeRO stage: DeepSpeed
    clears its gradients and bookkeeping as usual, weights and moments stay as they are.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.blocked = False
        self.calls = 0
        inner = optimizer.step

        def step(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return None if self.blocked else inner(*args, **kwargs)

        # An attribute of the instance: DeepSpeed checks the class.
        optimizer.step = step  # type: ignore[method-assign]

    def apply(self, engine: Any, skip: bool, deepspeed_decides: bool = False) -> None:
        """Runs `engine.step()`.

        Args:
            engine: DeepSpeed engine.
            skip: Leave weights and moments as they are.
            deepspeed_decides: Gradients are out of reach: DeepSpeed may skip by its own norm.

        Raises:
            EngineError: DeepSpeed left the optimizer out although the gradients were sound.
        """
        self.blocked, self.calls = skip, 0
        engine.step()
        if not skip and self.calls == 0 and not deepspeed_decides:
            raise EngineError(
                "DeepSpeed skipped an optimizer step although loss and gradients were finite: no weight moved. "
                "Check the DeepSpeed configuration against mt_deepspeed's ds_configs"
            )


class UnusedParameters:
    """Makes parameters without a gradient in a step count as zero gradients, at every ZeRO stage.

    Stages 0 to 2 without offload do so by themselves. Elsewhere buffers are cleared before the first
    micro-batch, and what DeepSpeed only copies when a gradient arrives is zeroed after the last.
    """

    def __init__(self, ownership: Ownership) -> None:
        self.own = ownership
        self.active = ownership.stage == 3 or ownership.offloads
        self.seen: list[set[nn.Parameter]] = []
        if self.active:
            for parameter in ownership.names:
                parameter.register_post_accumulate_grad_hook(self._note)

    def _note(self, parameter: Tensor) -> None:
        self.seen[-1].add(parameter)  # type: ignore[arg-type]

    def before_step(self) -> None:
        """Call before the first micro-batch of a step."""
        self.seen.clear()
        if not self.active:
            return
        if self.own.stage == 3:
            self.own.zero.grad_partitions_flat_buffer.zero_()
        else:
            for buffer in self.own.zero.accumulated_grads_in_cpu.values():
                buffer.zero_()

    def before_backward(self) -> None:
        """Call before each backward pass."""
        self.seen.append(set())

    def after_last_backward(self) -> None:
        """Call after the last backward pass of a step, on all ranks.

        Raises:
            EngineError: With optimizer offload, a parameter had a gradient in an earlier micro-batch but
                not in the last, where DeepSpeed collects them: it would be lost.
        """
        if not (self.active and self.own.offloads):
            return
        missing = [p for p in self.own.names if p not in self.seen[-1]]
        lost = [self.own.names[p] for p in missing if any(p in seen for seen in self.seen[:-1])]
        if lost:
            raise EngineError(
                f"parameter {lost[0]} ({len(lost)} in all) has a gradient in an earlier micro-batch but not in the "
                "last one of the step; DeepSpeed's optimizer offload would drop it. Let every loss of the task "
                "stay attached to the graph in every micro-batch (0 when it averages over nothing)"
            )
        for parameter in missing:
            self._zero(parameter)

    def _zero(self, parameter: nn.Parameter) -> None:
        if self.own.stage == 3:
            numel = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
            zeros = torch.zeros(numel, device=parameter.device)
            deepspeed_set_local_grad(parameter, zeros)
            return
        zero = self.own.zero
        identity = zero.get_param_id(parameter)
        if zero.is_param_in_current_partition[identity]:
            group, _, offset, numel = zero.grad_position[identity]
            zero.single_partition_of_fp32_groups[group].grad.view(-1).narrow(0, offset, numel).zero_()
            zero.norm_for_param_grads.pop(identity, None)


def deepspeed_set_local_grad(parameter: nn.Parameter, value: Tensor) -> None:
    """Writes this rank's part of a ZeRO-3 gradient (DeepSpeed also keeps its norm for clipping)."""
    from deepspeed.utils import safe_set_local_grad

    safe_set_local_grad(parameter, value)


def sum_of_squares(ownership: Ownership, device: torch.device) -> Tensor:
    """Sum of squares of this rank's gradients, 0-dim float64 on `device`; nan or inf where one is."""
    parts = [part.float() for _, part in ownership.gradients() if part.numel()]
    if parts and parts[0].device.type == "cpu":
        # A norm is added up on one core, element by element in float32: 0.1 % off with 38 M of them.
        flat = [part.reshape(-1) for part in parts]
        return torch.stack([torch.dot(one, one) for one in flat]).to(device).double().sum()
    norm: Tensor = torch.nn.utils.get_total_norm(parts)  # many tensors to a kernel
    return norm.to(device).double().square()


def nonfinite_names(ownership: Ownership) -> list[str]:
    """Names of parameters whose gradient, where this rank owns it, is not finite."""
    return [name for name, part in ownership.gradients() if not bool(torch.isfinite(part).all())]
