"""Pictures of what a model sees, drawn with matplotlib."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from mt_deepspeed.pretrained.sightings import Filled

matplotlib.use("Agg")
RIGHT, WRONG, OTHER = "#2e7d32", "#c62828", "#757575"


def draw_masks(
    filled: Sequence[Filled], weights: dict[str, Tensor], depths: dict[str, int], out: Path
) -> None:
    """Pictures, their captions and guesses; below, the manager weights if there are any (as `draw_managers`)."""
    rows = len(filled)
    figure = Figure(figsize=(11, 1.9 * rows + (2.6 if weights else 0)), layout="constrained")
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
            _draw_table(axis, f"manager weights, {modality}", table, depths[modality])
    _save(figure, out)


def _draw_guesses(axis: Any, one: Filled) -> None:
    axis.text(0, 0.95, one.text.replace("<mask>", "[ ? ]"), fontsize=12, va="top", weight="bold")
    for i, (answer, guesses) in enumerate(zip(one.answers, one.guesses, strict=True)):
        top = 0.68 - 0.38 * i
        axis.text(0, top, f"[ ? ] {i + 1}: {answer}", fontsize=10, va="top", color="black")
        for k, guess in enumerate(guesses):
            colour = RIGHT if guess.text == answer else WRONG if k == 0 else OTHER
            text = f"{guess.text} {guess.probability:.0%}"
            axis.text(0.25 + 0.15 * k, top, text, fontsize=10, va="top", color=colour)


def draw_managers(weights: dict[str, Tensor], depths: dict[str, int], num_pairs: int, out: Path) -> None:
    """Manager weights of both modalities: as tables, and as one line for each cross-modal layer.

    Args:
        weights: `text` and `image`, `[cross-modal layer, N]`, the lowest of the top N layers first.
        depths: Number of layers of each tower.
        num_pairs: Pairs they are averaged over.
        out: PNG file.

    Raises:
        ValueError: There are none, as bridges have no weights.
    """
    if not weights:
        raise ValueError("this model has bridges (BridgeTower), no managers: there are no weights to draw")
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    pairs = "1 pair" if num_pairs == 1 else f"{num_pairs} pairs"
    figure.suptitle(f"Weights that the managers give to the uni-modal layers, mean over {pairs}", fontsize=12)
    axes = figure.subplots(2, 2)
    for column, (modality, table) in enumerate(sorted(weights.items(), reverse=True)):
        _draw_table(axes[0, column], f"{modality} tower", table, depths[modality])
        axis, layers = axes[1, column], _layers(table, depths[modality])
        colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.85, len(table)))
        for layer, (row, colour) in enumerate(zip(table.numpy(), colours, strict=True), start=1):
            axis.plot(layers, row, marker="o", color=colour, label=f"cross-modal layer {layer}")
        axis.axhline(1 / table.shape[1], color="grey", linestyle=":", label="all alike")
        axis.set(xticks=layers, ylim=(0, 1), xlabel=f"layer of the {modality} tower", ylabel="weight")
        axis.legend(fontsize=8, frameon=False)
    _save(figure, out)


def _layers(table: Tensor, depth: int) -> list[int]:
    """Numbers, from 1, of the uni-modal layers that the columns of a table stand for."""
    return list(range(depth - table.shape[1] + 1, depth + 1))


def _draw_table(axis: Any, title: str, table: Tensor, depth: int) -> None:
    axis.imshow(table.numpy(), vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for (row, column), value in np.ndenumerate(table.numpy()):
        colour = "white" if value < 0.6 else "black"
        axis.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=9)
    axis.set_title(title, fontsize=11)
    axis.set_xlabel("uni-modal layer")
    axis.set_ylabel("cross-modal layer")
    axis.set_xticks(range(table.shape[1]), _layers(table, depth))
    axis.set_yticks(range(table.shape[0]), range(1, table.shape[0] + 1))


def draw_attention(picture: Image.Image, maps: Tensor, text: str, word: str, out: Path) -> None:
    """The picture, and for each cross-modal layer the same as bright as a word looks at its patches.

    Args:
        picture: As the model sees it, S x S.
        maps: `[cross-modal layer, rows, columns]`, shares of the attention; written into the patches of small grids.
        text: The text.
        word: The word.
        out: PNG file.
    """
    layers, side = len(maps), maps.shape[-1]
    columns = min(layers + 1, 4)
    rows = -(-(layers + 1) // columns)
    figure = Figure(figsize=(2.9 * columns, 3.2 * rows + 0.4), layout="constrained")
    figure.suptitle(f'Where "{word}" looks:  {text}', fontsize=12)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes:
        axis.set_axis_off()
    axes[0].imshow(picture, interpolation="nearest")
    axes[0].set_title("picture", fontsize=10)
    patch = picture.size[0] // side
    colours = np.asarray(picture) / 255
    for layer, (axis, share) in enumerate(zip(axes[1:], maps.cpu().numpy(), strict=False), start=1):
        light = 0.15 + 0.85 * share / share.max()
        lit = colours * np.kron(light, np.ones((patch, patch)))[..., None]
        axis.imshow(lit.clip(0, 1), interpolation="nearest")
        axis.set_title(f"cross-modal layer {layer}, {share.sum():.0%} on patches", fontsize=10)
        for (row, column), value in np.ndenumerate(share if side <= 6 else np.zeros((0, 0))):
            place = ((column + 0.04) * patch - 0.5, (row + 0.05) * patch - 0.5)
            colour = "black" if light[row, column] > 0.6 else "white"
            axis.text(*place, f"{value:.0%}", ha="left", va="top", fontsize=8, color=colour)
    _save(figure, out)


def draw_ranking(results: Sequence[dict[str, Any]], out: Path) -> None:
    """A contact sheet: one row of pictures for each text, best first, with their scores.

    Args:
        results: `{"text": TEXT, "images": [{"image": FILE, "score": SCORE}, ...]}`.
        out: PNG file.

    Raises:
        ValueError: There are no results, as no picture could be decoded.
    """
    if not results:
        raise ValueError("no picture could be decoded: there is nothing to draw")
    columns = max(len(one["images"]) for one in results)
    figure = Figure(figsize=(1.5 * columns + 0.4, 1.95 * len(results) + 0.2), layout="constrained")
    sheets = np.atleast_1d(np.asarray(figure.subfigures(len(results), 1)))
    for sheet, one in zip(sheets, results, strict=True):
        sheet.suptitle(one["text"], fontsize=11, x=0.01, ha="left", weight="bold")
        for axis, entry in zip(sheet.subplots(1, columns, squeeze=False)[0], one["images"], strict=True):
            with Image.open(entry["image"]) as picture:
                axis.imshow(picture.convert("RGB"), interpolation="nearest")
            axis.set_title(f"{entry['score']:.2f}", fontsize=9, pad=2)
            axis.set_xlabel(Path(entry["image"]).stem[-16:], fontsize=6, labelpad=2)
            axis.set(xticks=[], yticks=[])
    _save(figure, out)


def _save(figure: Figure, out: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(buffer.getvalue())
