"""Shows what a run reached and what a model sees.

    python -m mt_deepspeed.show run --run RUN [--evaluation FILE.json]

run         a table: held-out accuracies with their chance levels, speed, memory
masks       held-out pictures, captions with masked words, and what the model fills in
managers    the weights that the managers give to the uni-modal layers, in each cross-modal layer
attention   where in the picture a word looks, in each cross-modal layer
ranking     for each text the pictures of a folder that fit best, as a contact sheet

All but the first write a PNG to --out.
"""

import argparse
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

ITM_CHANCE = 0.5
"""Half of the evaluated pairs match."""


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    args = _parse(arguments)
    try:
        if args.what == "run":
            figures = json.loads(args.evaluation.read_text("utf-8")) if args.evaluation else {}
            print(table(read_metrics(args.run), figures))
        else:
            _draw(args)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


def _draw(args: argparse.Namespace) -> None:
    from mt_deepspeed.pretrained import drawings, sightings  # torch and matplotlib take seconds to import
    from mt_deepspeed.pretrained.asking import rank
    from mt_deepspeed.pretrained.loading import load
    from mt_deepspeed.pretrained.questions import pictures_in

    model = load(args.model)
    model.need_both_towers()
    sizes = model.config.model
    depths = {"text": sizes.text.num_layers, "image": sizes.vision.num_layers}
    if args.what == "masks":
        filled = sightings.fill_held_out(
            model, args.shards, args.split, args.num, args.visual_words, args.top
        )
        for one in filled:
            print(one)
        weights = sightings.manager_tables(model, [(one.picture, one.text) for one in filled])
        drawings.draw_masks(filled, weights, depths, args.out)
    elif args.what == "managers":
        alone = [(args.image, args.text)] if args.image else None
        pairs = alone or sightings.held_out(args.shards, args.split, args.num)
        weights = sightings.manager_tables(model, pairs)
        drawings.draw_managers(weights, depths, len(pairs), args.out)
    elif args.what == "attention":
        picture = sightings.seen_picture(model, args.image)
        maps = model.attention(args.image, args.text, args.word)
        drawings.draw_attention(picture, maps, args.text, args.word, args.out)
    else:
        model.need("rank")
        results = list(rank(model, args.text, pictures_in(args.images), "text", args.top, batch_size=32))
        for failed in (one for one in results if "error" in one):
            print(f"left out: {failed['error']}", file=sys.stderr)
        drawings.draw_ranking([one for one in results if "error" not in one], args.out)
    print(f"picture: {args.out}")


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """All records of a run's `metrics.jsonl`.

    Raises:
        ValueError: The file is missing, empty or damaged; names file and line.
    """
    file = run / "metrics.jsonl"
    if not file.is_file():
        raise ValueError(f"{file}: not found; is {run} a run folder?")
    records = []
    for number, line in enumerate(file.read_text("utf-8").splitlines(), start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}, line {number}: not a JSON record: {error}") from error
    if not records:
        raise ValueError(f"{file}: empty; the run has logged nothing yet")
    return records


def table(records: list[dict[str, Any]], figures: dict[str, float]) -> str:
    """The summary as text: held-out accuracies with their chance levels, speed, memory."""
    held_out = {
        key.removeprefix("eval/"): value for record in records for key, value in record.items()
    } | figures
    rows = [("", "result", "chance")]

    def add(label: str, name: str, chance: float | None = None) -> None:
        value = held_out.get(name)
        if value is not None and math.isfinite(value):
            rows.append((label, f"{value:.1%}", "" if chance is None else f"{chance:.1%}"))

    guess = figures.get("visual_chance")
    add("ITM accuracy, held-out pairs", "itm_accuracy", ITM_CHANCE)
    add("MLM accuracy, all masked words", "mlm_accuracy")
    add("MLM accuracy at visual words, right picture", "visual_right_image", guess)
    add("    shuffled pictures", "visual_shuffled_images", guess)
    add("    no picture", "visual_no_image", guess)
    for name in sorted(key for key in figures if key.startswith("visual_right_image/")):
        add(f"    right picture, {name.rpartition('/')[2]}", name)
    speeds = [record["speed/samples_per_s"] for record in records if "speed/samples_per_s" in record]
    if speeds:
        rows.append(("training speed, median", f"{statistics.median(speeds):.0f} samples/s", ""))
    peaks = [record["memory/peak_gib"] for record in records if "memory/peak_gib" in record]
    if peaks:
        rows.append(("peak memory per process", f"{max(peaks):.2f} GiB", ""))
    rows.append(("optimizer steps", str(max(record["step"] for record in records)), ""))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [f"{a:{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}".rstrip() for a, b, c in rows]
    return "\n".join([lines[0], "-" * (sum(widths) + 4), *lines[1:]])


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m mt_deepspeed.show",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="what", required=True, metavar="run|masks|managers|attention|ranking")
    run = verbs.add_parser("run")
    run.add_argument("--run", required=True, type=Path, help="run folder")
    run.add_argument("--evaluation", type=Path, help="what `mt_deepspeed.evaluate --out` wrote")
    for name in ("masks", "managers", "attention", "ranking"):
        verb = verbs.add_parser(name)
        verb.add_argument("--model", required=True, type=Path, help="exported model or run folder")
        verb.add_argument("--out", required=True, type=Path, help="PNG to write")
        if name in ("masks", "managers"):
            verb.add_argument("--shards", type=Path, required=name == "masks", help="caption shards")
            verb.add_argument("--split", default="val", help="split of --shards (default: val)")
            verb.add_argument("--num", type=int, default=6 if name == "masks" else 64, help="pictures")
        if name in ("managers", "attention"):
            verb.add_argument("--image", type=Path, required=name == "attention", help="picture file")
            verb.add_argument("--text", required=name == "attention", help="its text")
    masks, attention, ranking = (verbs.choices[name] for name in ("masks", "attention", "ranking"))
    masks.add_argument("--visual-words", type=Path, required=True, help="JSON file: class -> words to mask")
    masks.add_argument("--top", type=int, default=3, help="guesses per mask (default: 3)")
    attention.add_argument("--word", required=True, help="a word of the text")
    ranking.add_argument(
        "--images", nargs="+", type=Path, required=True, help="folders of pictures, or files"
    )
    ranking.add_argument("--text", nargs="+", required=True, help="texts")
    ranking.add_argument("--top", type=int, default=6, help="pictures per text (default: 6)")
    args = parser.parse_args(arguments)
    if args.what == "managers":
        alone = args.image is not None and args.text is not None
        if alone == (args.shards is not None) or (args.image is None) != (args.text is None):
            verbs.choices["managers"].error("give --shards, or --image and --text")
    if min(getattr(args, "num", 1), getattr(args, "top", 1)) < 1:
        verbs.choices[args.what].error("--num and --top must be at least 1")
    return args


if __name__ == "__main__":
    main()
