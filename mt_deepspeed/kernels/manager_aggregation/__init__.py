"""Manager aggregation: normalise experts, weigh them per channel or token, add the previous states."""

from mt_deepspeed.kernels.manager_aggregation.reference import manager_aggregation, mixing_weights

__all__ = ["manager_aggregation", "mixing_weights"]
