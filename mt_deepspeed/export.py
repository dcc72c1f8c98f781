"""Exports a run: `python -m mt_deepspeed.export --checkpoint RUN --out DIR`.

Writes weights as safetensors in the published parameter names, configuration, tokenizer and picture settings,
loads them back and compares the logits bit for bit before it says so.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

from mt_deepspeed.pretrained import load
from mt_deepspeed.pretrained_model import Pretrained


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m mt_deepspeed.export", description=__doc__)
    parser.add_argument("--checkpoint", required=True, type=Path, help="run folder")
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    args = parser.parse_args(arguments)
    try:
        pretrained = load(args.checkpoint)
        export(pretrained, args.out)
    except ValueError as error:
        sys.exit(f"error: {error}")
    files = sorted(file.name for file in args.out.iterdir())
    size_mib = sum((args.out / file).stat().st_size for file in files) / 2**20
    print(
        f"exported to {args.out}: {', '.join(files)} ({size_mib:.1f} MiB); logits of the reloaded model are equal"
    )


def export(pretrained: Pretrained, out: Path) -> None:
    """Writes `out` and proves it.

    Raises:
        ValueError: `out` holds something else, or the reloaded model computes other logits.
    """
    if out.exists() and any(out.iterdir()) and not (out / "model.safetensors").exists():
        raise ValueError(f"--out {out}: is not empty and holds no exported model; choose another folder")
    pretrained.save_pretrained(out)
    reloaded = probe_logits(load(out))
    for name, before in probe_logits(pretrained).items():
        after = reloaded[name]
        if not torch.equal(before, after):
            raise ValueError(
                f"{out}: {name} logits of the reloaded model differ by up to {(before - after).abs().max():.3g}"
            )


def probe_logits(pretrained: Pretrained) -> dict[str, Tensor]:
    """What every head makes of fixed random input; see `inference.outputs`."""
    return pretrained(**probe(pretrained))


def probe(pretrained: Pretrained) -> dict[str, Tensor]:
    """Two texts of random tokens and as many random pictures as the task takes for them."""
    generator = torch.Generator().manual_seed(0)
    model, data = pretrained.config.model, pretrained.config.data
    length = min(8, data.max_text_len)
    ids = torch.randint(4, model.text.vocab_size, (2, length), generator=generator)
    mask = torch.ones_like(ids)
    if data.padding == "longest":  # then padding must not matter, so that it may be there
        ids[1, length // 2 :], mask[1, length // 2 :] = model.text.pad_token_id, 0
    side, images = model.vision.image_size, 4 if pretrained.config.task == "nlvr2" else 2
    return {
        "text_ids": ids,
        "text_mask": mask,
        "pixels": torch.randn(images, 3, side, side, generator=generator),
    }


if __name__ == "__main__":
    main()
