"""Metrics: sums and counts in, shares out; no model, rank or file format is known here."""
