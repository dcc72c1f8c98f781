"""The columns of each task's shards; a part of the contract in `shard_format`."""

import pyarrow as pa


def _list(kind: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("item", kind, nullable=False))


def _schema(**columns: pa.DataType) -> pa.Schema:
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns.items()])


# Pictures are encoded file bytes (JPEG, PNG, ...); width and height in pixels, of the picture as it decodes.

CAPTION_SCHEMA = _schema(
    image=pa.large_binary(),
    captions=_list(pa.string()),
    image_id=pa.string(),
    width=pa.int32(),
    height=pa.int32(),
)

VQA_SCHEMA = (
    _schema(  # labels index the manifest's options.answers; questions without known answers: empty lists
        image=pa.large_binary(),
        questions=_list(pa.string()),
        question_ids=_list(pa.int64()),
        answers=_list(_list(pa.string())),
        labels=_list(_list(pa.int32())),
        scores=_list(_list(pa.float32())),
        image_id=pa.string(),
        width=pa.int32(),
        height=pa.int32(),
    )
)

NLVR2_SCHEMA = _schema(  # label 1: the statement is true of the two pictures
    image_0=pa.large_binary(),
    image_1=pa.large_binary(),
    statements=_list(pa.string()),
    identifiers=_list(pa.string()),
    labels=_list(pa.int32()),
    image_id=pa.string(),
    width_0=pa.int32(),
    height_0=pa.int32(),
    width_1=pa.int32(),
    height_1=pa.int32(),
)

ENTAILMENT_SCHEMA = _schema(  # label 0 contradiction, 1 neutral, 2 entailment
    image=pa.large_binary(),
    hypotheses=_list(pa.string()),
    premises=_list(pa.string()),
    labels=_list(pa.int32()),
    image_id=pa.string(),
    width=pa.int32(),
    height=pa.int32(),
)

CLASS_SCHEMA = _schema(  # one class a picture; labels index the manifest's options.answers
    image=pa.large_binary(),
    classes=_list(pa.string()),
    labels=_list(pa.int32()),
    image_id=pa.string(),
    width=pa.int32(),
    height=pa.int32(),
)

GLUE_SCHEMA = _schema(  # sentences and pairs of them, no pictures; image_id names the line
    sentences=_list(pa.string()),
    second_sentences=_list(pa.string()),  # empty where the task has single sentences
    labels=_list(pa.float32()),  # number of a class, or STS-B's score from 0 to 5
    image_id=pa.string(),
)

SCHEMAS: dict[str, pa.Schema] = {
    "caption": CAPTION_SCHEMA,
    "vqa": VQA_SCHEMA,
    "nlvr2": NLVR2_SCHEMA,
    "entailment": ENTAILMENT_SCHEMA,
    "class": CLASS_SCHEMA,
    "glue": GLUE_SCHEMA,
}
"""The Arrow schema of each task."""

TEXT_COLUMNS: dict[str, str] = {
    "caption": "captions",
    "vqa": "questions",
    "nlvr2": "statements",
    "entailment": "hypotheses",
    "class": "classes",
    "glue": "sentences",
}
"""The list column of each task whose entries are its texts: one text is one training sample.

The other list columns of the task have an entry for each text."""

_ONE_IMAGE = (("image", "width", "height"),)
IMAGE_COLUMNS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "caption": _ONE_IMAGE,
    "vqa": _ONE_IMAGE,
    "nlvr2": (("image_0", "width_0", "height_0"), ("image_1", "width_1", "height_1")),
    "entailment": _ONE_IMAGE,
    "class": _ONE_IMAGE,
    "glue": (),
}
"""The columns (encoded bytes, width, height) of each picture in a row of each task."""
