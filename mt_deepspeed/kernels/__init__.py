"""Fused operations and their plain references."""
