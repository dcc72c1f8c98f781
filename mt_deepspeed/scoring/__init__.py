"""Trained models over whole splits, on all ranks: every sample once."""
