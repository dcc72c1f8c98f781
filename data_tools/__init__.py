"""Builds and checks Arrow shards of image-text data. Needs pyarrow, numpy and Pillow only."""

TOOL_VERSION = "0.1.0"
