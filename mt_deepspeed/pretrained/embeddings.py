"""Embeddings of pictures and texts to a Parquet file."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from mt_deepspeed.pretrained.model import Pretrained

TEXTS_AT_ONCE = 64


def write_embeddings(
    model: Pretrained,
    pictures: Iterable[tuple[list[Path], list[Tensor | str]]],
    texts: Sequence[str],
    out: Path,
) -> int:
    """Writes columns `kind` (image or text), `source` (file or text), `embedding` and `error`, in batches.

    The file's metadata says under `space` whether pictures and texts can be compared (`contrastive`), or are the
    first tokens of their towers, each in a space of its own (`tower`).

    Args:
        model: Embeds.
        pictures: Files, each with its pixels `[3, S, S]` or the reason why it has none.
        texts: Texts.
        out: The file; it appears when it is complete.

    Returns:
        How many pictures have an error instead of an embedding.
    """
    schema = pa.schema(
        [
            ("kind", pa.string()),
            ("source", pa.string()),
            ("embedding", pa.list_(pa.float32())),
            ("error", pa.string()),
        ],
        metadata={"space": "contrastive" if model.contrastive else "tower"},
    )
    failed = 0
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(out.name + ".part")
    with pq.ParquetWriter(part, schema) as writer:

        def write(
            kind: str, sources: list[str], vectors: list[list[float] | None], errors: list[str | None]
        ) -> None:
            columns = [[kind] * len(sources), sources, vectors, errors]
            writer.write_table(
                pa.table([pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)], schema=schema)
            )

        for files, pixels in pictures:
            good = [one for one in pixels if isinstance(one, Tensor)]
            embedded = iter(model.embed_images(torch.stack(good)).tolist() if good else ())
            vectors = [next(embedded) if isinstance(one, Tensor) else None for one in pixels]
            errors = [one if isinstance(one, str) else None for one in pixels]
            failed += len(pixels) - len(good)
            write("image", [str(file) for file in files], vectors, errors)
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            some = list(texts[start : start + TEXTS_AT_ONCE])
            write("text", some, model.embed_texts(some).tolist(), [None] * len(some))
    part.replace(out)
    return failed
