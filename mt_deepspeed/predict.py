"""Shows what a model sees: fills masked words and draws a picture of it.

    python -m mt_deepspeed.predict --model DIR --image cat.jpg --text "a <mask> cat on a <mask>"
    python -m mt_deepspeed.predict --model DIR --shards DIR --split val --visual-words FILE --out predictions.png

The second form masks visual words in captions of held-out pictures and draws each picture with its caption, the
likeliest words, and the weights the managers give to the uni-modal layers.
"""

import argparse
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mt_deepspeed.data.images import decode_image, to_picture
from mt_deepspeed.data.shards import CaptionDataset
from mt_deepspeed.pretrained import Guess, Pretrained, load
from mt_deepspeed.tasks.heatmaps import manager_weights


@dataclass(frozen=True)
class Filled:
    """One picture whose caption had words masked."""

    picture: Image.Image
    text: str
    """The caption with `<mask>` in it."""
    answers: tuple[str, ...]
    """The masked words."""
    guesses: list[list[Guess]]
    """For each mask the likeliest words, best first."""


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    args = _parse(arguments)
    try:
        pretrained = load(args.model)
        if args.image is not None:
            with Image.open(args.image) as picture:
                print_guesses(args.text, pretrained.fill_masks(picture, args.text, args.top))
            return
        filled, weights = fill_held_out(
            pretrained, args.shards, args.split, args.num, _words(args.visual_words), args.top
        )
        for one in filled:
            print_guesses(one.text, one.guesses, one.answers)
        if args.out is not None:
            draw(filled, weights, args.out)
            print(f"picture: {args.out}")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def fill_held_out(
    pretrained: Pretrained, shards: Path, split: str, num: int, words: set[str], top: int
) -> tuple[list[Filled], dict[str, Tensor]]:
    """Masks up to two of `words` in captions of `num` pictures, spread over the split, and fills them.

    Returns:
        The filled captions, and the managers' mean weights `text`, `image` `[cross-modal layer, N]` (empty for
        bridges).
    """
    dataset = CaptionDataset(shards, [split])
    filled: list[Filled] = []
    totals: dict[str, Tensor] = {}
    seen: set[int] = set()
    for index in (
        np.linspace(0, dataset.num_pairs - 1, num=min(dataset.num_pairs, 8 * num)).astype(int).tolist()
    ):
        pair = dataset.pair(index)
        text, answers = mask_words(pair.caption, words, at_most=2)
        if not answers or pair.row in seen:
            continue
        seen.add(pair.row)
        picture = to_picture(decode_image(dataset.image(pair.row).data))
        record: dict[str, Tensor] = {}
        guesses = pretrained.fill_masks(picture, text, top, record)
        filled.append(Filled(picture, text, answers, guesses))
        if pretrained.config.model.has_managers:
            for key, table in manager_weights(record, pretrained.config.model.cross_modal.num_layers).items():
                totals[key] = totals.get(key, torch.zeros_like(table)) + table
        if len(filled) == num:
            break
    if not filled:
        raise ValueError(f"{shards}: no caption of split {split} holds any of the visual words")
    return filled, {key: table / len(filled) for key, table in totals.items()}


def mask_words(caption: str, words: set[str], at_most: int) -> tuple[str, tuple[str, ...]]:
    """Replaces up to `at_most` of `words` in a caption, the last ones first, by `<mask>`."""
    parts = caption.split()
    places = [i for i, part in enumerate(parts) if part.strip(".,") in words][-at_most:]
    answers = tuple(parts[i] for i in places)
    return " ".join("<mask>" if i in places else part for i, part in enumerate(parts)), answers


def print_guesses(text: str, guesses: list[list[Guess]], answers: tuple[str, ...] = ()) -> None:
    """One line per text, one per mask."""
    print(text)
    for i, row in enumerate(guesses):
        shown = ", ".join(f"{guess.word} {guess.probability:.2f}" for guess in row)
        print(f"    mask {i + 1}: {shown}" + (f"   (answer: {answers[i]})" if answers else ""))


def draw(filled: list[Filled], weights: dict[str, Tensor], out: Path) -> None:
    """Draws pictures, captions, guesses and manager weights into one PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = len(filled)
    figure = plt.figure(figsize=(11, 1.9 * rows + (2.6 if weights else 0)), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=[1.9 * rows, 2.6]) if weights else [figure]
    axes = parts[0].subplots(rows, 2, squeeze=False, gridspec_kw={"width_ratios": [1, 4]})
    for (left, right), one in zip(axes, filled, strict=True):
        left.imshow(one.picture, interpolation="nearest")
        left.set_axis_off()
        right.set_axis_off()
        _draw_guesses(right, one)
    if weights:
        grids = parts[1].subplots(1, len(weights), squeeze=False)[0]
        for axis, (modality, table) in zip(grids, sorted(weights.items()), strict=True):
            _draw_weights(axis, modality, table)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(buffer.getvalue())


def _draw_guesses(axis: Any, one: Filled) -> None:
    axis.text(0, 0.95, one.text.replace("<mask>", "[ ? ]"), fontsize=12, va="top", weight="bold")
    for i, (answer, guesses) in enumerate(zip(one.answers, one.guesses, strict=True)):
        top = 0.68 - 0.38 * i
        axis.text(0, top, f"[ ? ] {i + 1}: {answer}", fontsize=10, va="top", color="black")
        for k, guess in enumerate(guesses):
            colour = "tab:green" if guess.word == answer.strip(".,") else "tab:red" if k == 0 else "grey"
            text = f"{guess.word} {guess.probability:.0%}"
            axis.text(0.25 + 0.15 * k, top, text, fontsize=10, va="top", color=colour)


def _draw_weights(axis: Any, modality: str, table: Tensor) -> None:
    axis.imshow(table.numpy(), vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for (row, column), value in np.ndenumerate(table.numpy()):
        axis.text(
            column, row, f"{value:.2f}", ha="center", va="center", color="white" if value < 0.6 else "black"
        )
    axis.set_title(f"manager weights, {modality}")
    axis.set_xlabel("uni-modal layer, lowest of the top N first")
    axis.set_ylabel("cross-modal layer")
    axis.set_xticks(range(table.shape[1]), [str(i + 1) for i in range(table.shape[1])])
    axis.set_yticks(range(table.shape[0]), [str(i + 1) for i in range(table.shape[0])])


def _words(file: Path) -> set[str]:
    return {word for words in json.loads(file.read_text("utf-8")).values() for word in words}


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m mt_deepspeed.predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, type=Path, help="exported model or run folder")
    parser.add_argument("--image", type=Path, help="one picture, with --text")
    parser.add_argument("--text", help="a text with <mask> in it")
    parser.add_argument("--shards", type=Path, help="shard folder of held-out pictures")
    parser.add_argument("--split", default="val", help="split of --shards (default: val)")
    parser.add_argument("--num", type=int, default=6, help="pictures (default: 6)")
    parser.add_argument("--visual-words", type=Path, help="JSON file: class -> words to mask")
    parser.add_argument("--top", type=int, default=3, help="guesses per mask (default: 3)")
    parser.add_argument("--out", type=Path, help="PNG to write")
    args = parser.parse_args(arguments)
    one, many = args.image is not None and args.text is not None, args.shards is not None
    if one == many or (many and args.visual_words is None):
        parser.error("give --image and --text, or --shards and --visual-words")
    return args


if __name__ == "__main__":
    main()
