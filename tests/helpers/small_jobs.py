"""Data and settings of training jobs that take seconds: for the tests on SLURM and the soak."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SETTINGS = (
    *["model.text.hidden_size=32", "model.text.intermediate_size=64", "model.text.dropout=0.1"],
    *["model.vision.width=32", "model.cross_modal.hidden_size=32", "model.cross_modal.intermediate_size=64"],
    *["model.text.vocab_size=384", "data.train=[{path: coco, splits: [train, restval]}]"],
    *["train.global_batch_size=8", "train.micro_batch_size=4", "train.log_every_steps=1"],
    *["train.eval_every_steps=0", "train.eval_max_samples=8"],
)
# One rank a node; the devices of the test cluster only pretend to be GPUs.
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1", "--time=60")
VARIABLES = {"PYTHON": sys.executable, "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false"}


def make_raw(folder: Path) -> Path:
    """Raw data: 48 drawn pictures in COCO's layout."""
    size = ["--num-images", "48", "--image-size", "48", "--workers", "1"]
    _python("data_tools", "synth", "--layout", "coco", *size, "--out", str(folder))
    return folder / "coco"


def make_shards(raw: Path, folder: Path) -> Path:
    """Shards `coco` and a tokenizer."""
    shards = folder / "coco"
    _python("data_tools", "convert", "coco", "--raw", str(raw), "--out", str(shards), "--workers", "1")
    tokenizer = ["--vocab-size", "384", "--shards", str(shards), "--out", str(folder / "tokenizer")]
    _python("mt_deepspeed.build_tokenizer", *tokenizer)
    return folder


def train_arguments(shards: Path, run_dir: Path, *settings: str) -> list[str]:
    """Arguments of slurm/pretrain.sbatch."""
    own = [*SETTINGS, f"data.root={shards}", f"run_dir={run_dir}", *settings]
    return ["--preset", "quickstart", "--deepspeed_config", "ds_configs/zero1.json", "--set", *own]


def _python(*arguments: str) -> None:
    environment = {**os.environ, **VARIABLES}
    subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL
    )
