"""A procedural world of coloured shapes, written in the raw layout of each data set."""
