"""Planned memory against the peak that a dry run on one GPU reaches."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 0.10
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(
    ("stage", "checkpointing", "micro_batch"), [(0, 0, 8), (1, 0, 16), (2, 0, 8), (2, 1, 32), (3, 0, 8)]
)
def test_plan_is_within_a_tenth_of_the_peak(
    tmp_path: Path, stage: int, checkpointing: int, micro_batch: int
) -> None:
    zero = {"zero_optimization": {"stage": stage, "overlap_comm": True, "reduce_bucket_size": 50_000_000}}
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(zero))
    settings = [
        "--preset",
        "managertower-base",
        "--deepspeed_config",
        str(file),
        "--set",
        "model.text.pretrained=null",
        "model.vision.pretrained=null",
        f"run_dir={tmp_path / 'run'}",
        f"train.micro_batch_size={micro_batch}",
        f"train.global_batch_size={2 * micro_batch}",
        f"train.activation_checkpointing={checkpointing}",
    ]
    cluster = ["--nodes", "1", "--gpus-per-node", "1", "--gpu", "h200", "--json"]
    plan = json.loads(_run("mt_deepspeed.plan", *settings, *cluster))
    said = _run("mt_deepspeed.train", *settings, "--dry-run")
    match = re.search(r"peak memory ([\d.]+) GiB", said)
    assert match, said
    planned, measured = plan["stages"][stage]["total"] / 2**30, float(match[1])
    assert planned == pytest.approx(measured, rel=TOLERANCE)


def _run(module: str, *arguments: str) -> str:
    command = [sys.executable, "-m", module, *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout
