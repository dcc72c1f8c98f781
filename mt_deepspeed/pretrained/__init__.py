"""Trained models: where they come from, what they can be asked for, how they leave. `loading.load` is the way in."""
