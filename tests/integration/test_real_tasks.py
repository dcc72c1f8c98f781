"""The pieces of the real data sets, where they are at hand: converted, trained on and evaluated, by every task."""

import os
from pathlib import Path
from typing import Any

import pytest

from data_tools.cli import main
from data_tools.shard_format import read_manifest
from mt_deepspeed.data.text import train_tokenizer
from mt_deepspeed.engine.launch import Place
from tests.helpers.datasets import VOCABULARY
from tests.helpers.ranks import run_ranks
from tests.helpers.task_runs import evaluate_run, task_config, train_run

ROOT = Path(__file__).resolve().parents[2]
REAL = Path(os.environ.get("MT_REAL_DATA") or ROOT.parent / "shared" / "data")

pytestmark = pytest.mark.skipif(not REAL.is_dir(), reason="no real data: MT_REAL_DATA names no folder")

ANSWERS = ("--answers", str(REAL / "vqa" / "trainval_label2ans.json"))
SETS: dict[str, tuple[str, str, str, str, tuple[str, ...]]] = {
    "vqa": ("vqav2", "vqa", "train", "train", ("--images", str(REAL / "coco"), *ANSWERS)),
    "nlvr2": ("nlvr2", "nlvr2", "dev", "test1", ()),
    "snli_ve": (
        "snli_ve",
        "snli-ve",
        "train",
        "train",
        ("--annotations", "sample_pairs.allennlp.jsonl", "--images", str(REAL / "flickr30k")),
    ),
    "retrieval": ("flickr30k", "flickr30k", "val", "test", ()),
}
"""Task -> source, raw folder, split to train on, split to evaluate on, options of the conversion."""


def train_and_evaluate(place: Place, root: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for task, (_, _, train, test, _) in SETS.items():
        config = task_config(
            root,
            task,
            root / f"run-{task}",
            data={
                "train": [{"path": task, "splits": [train]}],
                "eval": [{"path": task, "splits": [test]}],
                "max_text_len": 38,
                "train_transform": "albef_randaug_wohf" if task == "vqa" else "albef_randaug_wc",
            },
            train={"global_batch_size": 8, "micro_batch_size": 2},
            classifier={"num_answers": 3129},
        )
        train_run(place, config)
        found[task] = evaluate_run(place, root / f"run-{task}")
    return found


@pytest.mark.slow
def test_real_rows_train_and_evaluate(tmp_path: Path) -> None:
    counts = {}
    for task, (source, raw, _, test, options) in SETS.items():
        out = ["--out", str(tmp_path / task), "--workers", "1"]
        assert main(["convert", source, "--raw", str(REAL / raw), *out, *options]) == 0
        counts[task] = read_manifest(tmp_path / task).splits[test].texts
    train_tokenizer(["Is this a man?", "A man in a red shirt."] * 20, tmp_path / "tokenizer", VOCABULARY)
    alone = run_ranks(1, train_and_evaluate, tmp_path, timeout_s=500.0)[0]
    for task in ("vqa", "nlvr2", "snli_ve"):
        assert sorted(alone[task]["predictions"]) == list(range(counts[task]))
    assert 0 <= alone["vqa"]["metrics"]["vqa_score"] <= 1
    assert alone["retrieval"]["metrics"]["tr@10"] > 0
