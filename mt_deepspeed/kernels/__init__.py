"""Fused operations and their plain references, and operators in the form that is fastest on the device."""
