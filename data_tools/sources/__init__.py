"""One module per data set: each yields rows, nothing else."""

from data_tools.sources import (
    cc3m,
    cc12m,
    cifar,
    coco,
    flickr,
    glue,
    img2dataset,
    nlvr2,
    pairs,
    reference_arrow,
    sbu,
    snli_ve,
    table,
    vg,
    vgqa,
    vqav2,
    webdataset,
)
from data_tools.sources.base import AnnotationError, ImageFile, Request, Row, Slice, Source

SOURCES: dict[str, Source] = {
    "coco": coco.SOURCE,
    "vg": vg.SOURCE,
    "cc3m": cc3m.SOURCE,
    "cc12m": cc12m.SOURCE,
    "sbu": sbu.SOURCE,
    "flickr30k": flickr.FLICKR30K,
    "flickr8k": flickr.FLICKR8K,
    "vqav2": vqav2.SOURCE,
    "vgqa": vgqa.SOURCE,
    "nlvr2": nlvr2.SOURCE,
    "snli_ve": snli_ve.SOURCE,
    "cifar10": cifar.CIFAR10,
    "cifar100": cifar.CIFAR100,
    "glue": glue.SOURCE,
    "img2dataset": img2dataset.SOURCE,
    "pairs": pairs.SOURCE,
    "reference-arrow": reference_arrow.SOURCE,
    "table": table.SOURCE,
    "webdataset": webdataset.SOURCE,
}

__all__ = ["SOURCES", "AnnotationError", "ImageFile", "Request", "Row", "Slice", "Source"]
