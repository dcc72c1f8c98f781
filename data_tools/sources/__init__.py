"""One module per data set: each yields rows, nothing else."""

from data_tools.sources import cc3m, coco, sbu, vg
from data_tools.sources.base import AnnotationError, ImageFile, Row, Source

SOURCES: dict[str, Source] = {
    "coco": coco.SOURCE,
    "vg": vg.SOURCE,
    "cc3m": cc3m.SOURCE,
    "sbu": sbu.SOURCE,
}

__all__ = ["SOURCES", "AnnotationError", "ImageFile", "Row", "Source"]
