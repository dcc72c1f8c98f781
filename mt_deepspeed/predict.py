"""Asks a model about pictures.

    python -m mt_deepspeed.predict answer --model DIR --image cat.jpg --text "what is it?"

fill-mask   the likeliest words for each <mask> in a text, given a picture (a pre-trained model)
answer      answers to a question about a picture (VQA)
entail      does the picture contradict, leave open or entail a sentence? (SNLI-VE)
compare     is a statement about two pictures true? (NLVR2; --image LEFT RIGHT)
rank        the pictures of a folder by how well they fit each text, or the texts for each picture
embed       embeddings of pictures and texts to a Parquet file

The first four take one question from --image and --text, or many from --input ROWS.jsonl: one object a line with the
keys "image" (for compare a list of two files, relative to the folder of ROWS.jsonl) and "text"; other keys stay with
the row. Results are a table, or with --out one JSON object a line.

Exit codes: 1 nothing was done (the message says why), 2 wrong command line, 3 some pictures cannot be decoded: their
rows say so, all others have results.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from mt_deepspeed.pretrained.asking import Result, ask, decoded, rank
from mt_deepspeed.pretrained.embeddings import write_embeddings
from mt_deepspeed.pretrained.loading import load
from mt_deepspeed.pretrained.questions import Question, pictures_in, question, read_rows, text_of

SOME_FAILED = 3
"""Exit code where pictures cannot be decoded."""
ASKED = ("fill-mask", "answer", "entail", "compare")


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    args = _parse(arguments)
    try:
        failed = _predict(args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    if failed:
        print(f"{failed} pictures could not be decoded; the output says which", file=sys.stderr)
        sys.exit(SOME_FAILED)


def _predict(args: argparse.Namespace) -> int:
    """Does what is asked; returns how many pictures failed."""
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device}: no CUDA device here")
    if args.what in ASKED:
        questions = _questions(args)
        model = load(args.model, args.device)
        model.need(args.what)
        top = getattr(args, "top", 1)
        return _write(args.what, ask(model, args.what, questions, top, args.batch_size), args.out)
    texts = list(args.text or [])
    if args.input is not None:
        texts += read_rows(args.input, text_of)
    pictures = pictures_in(args.images) if args.images else []
    model = load(args.model, args.device)
    model.need_both_towers()
    if args.what == "embed":
        return write_embeddings(model, decoded(model, pictures, args.batch_size), texts, args.out)
    model.need("rank")
    return _write("rank", rank(model, texts, pictures, args.by, args.top, args.batch_size), args.out)


def _questions(args: argparse.Namespace) -> list[Question]:
    if args.input is not None:
        return read_rows(args.input, lambda row: question(row, args.what, args.input.parent))
    image = args.image if args.what == "compare" else args.image[0]
    return [question({"image": image, "text": args.text}, args.what, Path())]


def _write(what: str, results: Iterator[Result], out: Path | None) -> int:
    """Writes JSON lines as they come, or a table at the end; returns how many rows failed.

    The file has the suffix `.part` until it is complete.
    """
    failed = 0
    rows: list[tuple[str, str, str]] = []
    part = None if out is None else out.with_name(out.name + ".part")
    if part is not None:
        part.parent.mkdir(parents=True, exist_ok=True)
    with nullcontext() if part is None else part.open("w", encoding="utf-8") as file:
        for result in results:
            failed += "error" in result
            if file is None:
                rows += _table_rows(what, result)
            else:
                file.write(json.dumps(result, ensure_ascii=False) + "\n")
    if part is not None and out is not None:
        part.replace(out)
    else:
        widths = [max(len(row[column]) for row in rows) for column in range(2)]
        for image, text, shown in rows:
            print(f"{image:{widths[0]}}  {text:{widths[1]}}  {shown}".rstrip())
    return failed


def _table_rows(what: str, result: Result) -> list[tuple[str, str, str]]:
    """Picture, text and what was found; a mask or a ranked picture each has a line."""
    images = result.get("image", "")
    image = ", ".join(Path(one).name for one in ([images] if isinstance(images, str) else images))
    text = result.get("text", "")
    if "error" in result:
        return [(image, text, f"error: {result['error']}")]
    if what == "rank" and "images" in result:
        return [(Path(one["image"]).name, text, f"{one['score']:.3f}") for one in result["images"]]
    if what == "rank":
        return [(image, one["text"], f"{one['score']:.3f}") for one in result["texts"]]
    if what in ("entail", "compare"):
        return [(image, text, _shown(result["probabilities"].items()))]
    if what == "answer":
        return [(image, text, _shown((one["answer"], one["probability"]) for one in result["answers"]))]
    return [
        (image, text, _shown((one["word"], one["probability"]) for one in mask)) for mask in result["masks"]
    ]


def _shown(pairs: Any) -> str:
    return ", ".join(f"{name} {probability:.2f}" for name, probability in pairs)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m mt_deepspeed.predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="what", required=True, metavar="|".join((*ASKED, "rank", "embed")))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in (*ASKED, "rank", "embed"):
        verb = verbs.add_parser(name)
        verb.add_argument("--model", required=True, type=Path, help="exported model or run folder")
        verb.add_argument("--device", default=device, help="default: cuda if there is one, else cpu")
        verb.add_argument("--batch-size", type=int, default=32, help="rows per forward pass (default: 32)")
        verb.add_argument("--input", type=Path, help="JSONL file of rows")
        if name in ASKED:
            verb.add_argument("--image", nargs=2 if name == "compare" else 1, help="picture file")
            verb.add_argument("--text", help="the question, sentence or text")
        else:
            verb.add_argument("--images", nargs="+", type=Path, help="folders of pictures, or files")
            verb.add_argument("--text", nargs="+", help="texts")
        if name == "rank":
            verb.add_argument("--by", choices=("text", "image"), default="text", help="one ranking for each")
        if name in ("answer", "fill-mask", "rank"):
            verb.add_argument("--top", type=int, default=5, help="results per row (default: 5)")
        verb.add_argument("--out", type=Path, required=name == "embed", help="file to write")
    args = parser.parse_args(arguments)
    if args.batch_size < 1 or getattr(args, "top", 1) < 1:
        verbs.choices[args.what].error("--batch-size and --top must be at least 1")
    asked, many = args.text is not None, args.input is not None
    if args.what in ASKED and (asked == many or (args.image is not None) == many):
        verbs.choices[args.what].error("give --image and --text, or --input")
    if args.what == "rank" and not (args.images and (asked or many)):
        verbs.choices[args.what].error("give --images, and texts with --text or --input")
    if args.what == "embed" and not (args.images or asked or many):
        verbs.choices[args.what].error("give --images, --text or --input")
    return args


if __name__ == "__main__":
    main()
