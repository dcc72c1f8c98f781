"""Takes a model out of a run, or brings one in from elsewhere, as a folder that needs neither.

    python -m mt_deepspeed.export --checkpoint RUN --out DIR
    python -m mt_deepspeed.export --checkpoint RUN --out DIR --format hf-bridgetower
    python -m mt_deepspeed.export --checkpoint ManagerTower_ftfpt_base_vqav2.ckpt --answers SHARDS --out DIR

The folder holds the weights as safetensors in the published parameter names, configuration, tokenizer and picture
settings; `mt_deepspeed.load(DIR)` reads it without DeepSpeed. With `--format hf-bridgetower` it is what transformers
reads (BridgeTower only). Either is loaded back, and its logits are compared, before this says that they are equal.
"""

import argparse
import shutil
import sys
from pathlib import Path

import torch

from mt_deepspeed.pretrained.foreign import is_foreign, load_foreign
from mt_deepspeed.pretrained.hf_folder import export_bridgetower
from mt_deepspeed.pretrained.loading import load
from mt_deepspeed.pretrained.model import Pretrained
from mt_deepspeed.pretrained.probe import probe


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    args = _parse(arguments)
    out = args.out.resolve()
    part = out.with_name(out.name + ".part")  # becomes --out when it has proved right
    try:
        _refuse_other_content(args.out)
        if is_foreign(args.checkpoint):
            pretrained, report = load_foreign(args.checkpoint, args.tokenizer, args.answers)
            print(report)
        elif args.tokenizer is not None or args.answers is not None:
            raise ValueError(f"--checkpoint {args.checkpoint}: brings its own tokenizer and answers")
        else:
            pretrained = load(args.checkpoint)
        shutil.rmtree(part, ignore_errors=True)
        if args.format == "hf-bridgetower":
            differences, notes = export_bridgetower(pretrained, part)
            print("".join(f"{note}\n" for note in notes), end="")
            shown = "; ".join(f"{kind}: logits within {value:.1e}" for kind, value in differences.items())
        else:
            export(pretrained, part)
            shown = "logits of the reloaded model are equal"
        shutil.rmtree(out, ignore_errors=True)
        part.rename(out)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    files = sorted(file.name for file in args.out.iterdir())
    size_mib = sum((args.out / file).stat().st_size for file in files) / 2**20
    print(f"exported to {args.out}: {', '.join(files)} ({size_mib:.1f} MiB); {shown}")


def _refuse_other_content(out: Path) -> None:
    if out.exists() and (
        not out.is_dir() or (any(out.iterdir()) and not (out / "model.safetensors").exists())
    ):
        raise ValueError(f"--out {out}: is not empty and holds no exported model; choose another folder")


def export(pretrained: Pretrained, out: Path) -> None:
    """Writes `out` and proves it.

    Raises:
        ValueError: The reloaded model computes other logits.
    """
    pretrained.save_pretrained(out)
    batch = probe(pretrained)
    reloaded = load(out)(**batch)
    for name, before in pretrained(**batch).items():
        after = reloaded[name]
        if not torch.equal(before, after):
            raise ValueError(
                f"{out}: {name} logits of the reloaded model differ by up to {(before - after).abs().max():.3g}"
            )


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m mt_deepspeed.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=Path,
        help="run folder, one of its checkpoints, an exported model, a published .ckpt, or a transformers BridgeTower",
    )
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    parser.add_argument("--format", choices=("mt-deepspeed", "hf-bridgetower"), default="mt-deepspeed")
    parser.add_argument("--tokenizer", help="published .ckpt: folder or hub name; default: the one it names")
    parser.add_argument(
        "--answers", type=Path, help="published VQA .ckpt: VQAv2 shards, or a JSON file of its answers"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
