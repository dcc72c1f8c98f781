"""The training engine: one loop over DeepSpeed, safe checkpoints, metrics. Knows no task, model or format."""
