"""Manager aggregation: normalise experts, weigh them per channel or token, add the previous states.

`manager_aggregation` is the one operator; `MT_KERNELS`, the context `using` or its argument `backend` chooses who
computes it.
A backend is a module of this package with these functions (types in `protocol`):

    unsupported(experts: list[Tensor], num_previous: int) -> str | None
        Why it cannot compute with these experts (contiguous `[T, D]`; shape, dtype, device), or None.
    statistics(states: list[Tensor], eps: float) -> Tensor
        Means and inverse deviations `[2, N, T]` of N contiguous `[T, D]` tensors.
    forward(a: Arguments) -> tuple[Tensor, Tensor]
        The result `[T, D]` in the experts' dtype, and the previous states' statistics `[2, P, T]`.
    backward(a: Arguments, previous_statistics: Tensor, grad: Tensor) -> Gradients
        All gradients, contiguous, in the shapes and dtypes of what they belong to.

and a row in `dispatch.BACKENDS`. Its noise is that of `noise.philox_normal`, up to rounding; what is saved for
backward are the arguments and the statistics. Nothing returned may share memory with an argument.
"""

from mt_deepspeed.kernels.manager_aggregation.dispatch import using
from mt_deepspeed.kernels.manager_aggregation.noise import Philox, philox_normal
from mt_deepspeed.kernels.manager_aggregation.operator import expert_statistics, manager_aggregation
from mt_deepspeed.kernels.manager_aggregation.reference import mixing_weights

__all__ = ["manager_aggregation", "expert_statistics", "mixing_weights", "using", "Philox", "philox_normal"]
