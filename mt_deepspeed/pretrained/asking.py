"""Questions about many pictures, decoded in batches: rows in, rows with results out."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mt_deepspeed.pretrained.model import Guess, Pretrained
from mt_deepspeed.pretrained.questions import Question

READERS = 4
"""Threads that decode pictures."""

Result = dict[str, Any]


def decoded(
    model: Pretrained, pictures: Sequence[Path], batch_size: int
) -> Iterator[tuple[list[Path], list[Tensor | str]]]:
    """Files in batches, each with its pixels `[3, S, S]` or the reason why it has none."""
    with ThreadPoolExecutor(READERS) as readers:
        for start in range(0, len(pictures), batch_size):
            files = list(pictures[start : start + batch_size])
            yield files, list(readers.map(lambda file: _pixels(model, file), files))


def _pixels(model: Pretrained, file: Path) -> Tensor | str:
    try:
        return model.processor.pixels([file])[0]
    except (ValueError, OSError) as error:
        return str(error)


def ask(
    model: Pretrained, what: str, questions: Sequence[Question], top: int, batch_size: int
) -> Iterator[Result]:
    """Each row with its result, or with the key `error` where a picture cannot be decoded, in order.

    Args:
        model: Answers.
        what: `fill-mask`, `answer`, `entail` or `compare`.
        questions: The rows; `compare` has two pictures in each.
        top: Guesses per mask, or answers per question.
        batch_size: Rows per forward pass.

    Raises:
        ValueError: Texts whose `<mask>` lies behind what the model reads; before any work.
    """
    if what == "fill-mask":
        _check_masks(model, questions)
    per_row = 2 if what == "compare" else 1
    pictures = [image for one in questions for image in one.images]
    batches = decoded(model, pictures, batch_size * per_row)
    for start, (_, pixels) in zip(range(0, len(questions), batch_size), batches, strict=True):
        rows = questions[start : start + batch_size]
        parts = [pixels[per_row * i : per_row * (i + 1)] for i in range(len(rows))]
        reasons = ["; ".join(one for one in part if isinstance(one, str)) for part in parts]
        good = [i for i, reason in enumerate(reasons) if not reason]
        results: list[Result] = [
            {**row.given, "error": reason} for row, reason in zip(rows, reasons, strict=True)
        ]
        if good:
            # NLVR2: all left pictures, then all right ones.
            ordered = [parts[i][side] for side in range(per_row) for i in good]
            stacked = torch.stack([one for one in ordered if isinstance(one, Tensor)])
            found = _asked(model, what, stacked, [rows[i].text for i in good], top)
            for i, result in zip(good, found, strict=True):
                results[i] = {**rows[i].given, **result}
        yield from results


def _asked(model: Pretrained, what: str, pixels: Tensor, texts: list[str], top: int) -> list[Result]:
    if what == "fill-mask":
        rows = model.fill_masks(pixels, texts, top)
        return [{"masks": [[_entry("word", guess) for guess in mask] for mask in row]} for row in rows]
    found = model.classify(pixels, texts, top if what == "answer" else None)
    if what == "answer":
        return [{"answers": [_entry("answer", guess) for guess in row]} for row in found]
    return [{"label": row[0].text, "probabilities": {g.text: g.probability for g in row}} for row in found]


def _entry(kind: str, guess: Guess) -> Result:
    return {kind: guess.text, "probability": guess.probability}


def _check_masks(model: Pretrained, questions: Sequence[Question]) -> None:
    for row in questions:
        if model.tokenizer.mask_id not in model.tokenizer.encode(row.text).ids:
            raise ValueError(
                f"text {row.text!r}: its <mask> lies behind the {model.config.data.max_text_len} tokens that the "
                "model reads; shorten the text"
            )


def rank(
    model: Pretrained, texts: Sequence[str], pictures: Sequence[Path], by: str, top: int, batch_size: int
) -> Iterator[Result]:
    """For each text its best pictures, or (`by` image) for each picture its best texts; then pictures that failed.

    Args:
        model: Ranks.
        texts: All of them.
        pictures: Files.
        by: `text` or `image`, what each ranking is for.
        top: Length of a ranking.
        batch_size: Pictures decoded at once, and pairs per forward pass.
    """
    blocks, files, failed = [], [], []
    for names, pixels in decoded(model, pictures, batch_size):
        good = [(name, one) for name, one in zip(names, pixels, strict=True) if isinstance(one, Tensor)]
        failed += [
            {"image": str(name), "error": one}
            for name, one in zip(names, pixels, strict=True)
            if isinstance(one, str)
        ]
        if good:
            files += [str(name) for name, _ in good]
            blocks.append(model.scores(texts, torch.stack([one for _, one in good]), batch_size).cpu())
    if blocks:
        table = torch.cat(blocks, dim=1)
        rows, columns = ("text", "image") if by == "text" else ("image", "text")
        names_of = {"text": list(texts), "image": files}
        best = (table if by == "text" else table.T).topk(min(top, len(names_of[columns])))
        for name, numbers, values in zip(
            names_of[rows], best.indices.tolist(), best.values.tolist(), strict=True
        ):
            entries = [
                {columns: names_of[columns][number], "score": value}
                for number, value in zip(numbers, values, strict=True)
            ]
            yield {rows: name, f"{columns}s": entries}
    yield from failed
