"""Trains a tokenizer on one's own captions: `python -m mt_deepspeed.build_tokenizer --shards DIR ... --out DIR`.

Byte-level BPE in RoBERTa's layout. Not needed with published RoBERTa weights, which come with their own.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from mt_deepspeed.data.shards import CaptionDataset
from mt_deepspeed.data.text import train_tokenizer


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m mt_deepspeed.build_tokenizer", description=__doc__)
    parser.add_argument("--shards", required=True, nargs="+", type=Path, help="shard folders")
    parser.add_argument("--split", default="train", help="split to read of each folder (default: train)")
    parser.add_argument("--vocab-size", type=int, default=50265, help="entries (default: 50265, as RoBERTa)")
    parser.add_argument("--out", required=True, type=Path, help="folder for vocab.json and merges.txt")
    args = parser.parse_args(arguments)
    try:
        train_tokenizer(captions(args.shards, args.split), args.out, args.vocab_size)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"tokenizer of {args.vocab_size} tokens: {args.out}")


def captions(folders: list[Path], split: str) -> Iterator[str]:
    """All captions of the split of each folder, in order."""
    for folder in folders:
        dataset = CaptionDataset(folder, [split])
        for index in range(dataset.num_pairs):
            yield dataset.pair(index).caption


if __name__ == "__main__":
    main()
