"""`--dry-run`: a run without data on several ranks, and what it must not leave behind or let pass."""

from __future__ import annotations

from pathlib import Path

import pytest

from mt_deepspeed import train
from mt_deepspeed.config import load_config
from mt_deepspeed.engine.exit_codes import Exit
from mt_deepspeed.engine.launch import Place
from tests.helpers.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[2]


def dry(place: Place, run_dir: Path, deepspeed_config: Path, preset: str, *settings: str) -> int:
    small = ["train.global_batch_size=8", "train.micro_batch_size=2", f"run_dir={run_dir}"]
    config = load_config(preset, overrides=[*small, f"data.root={run_dir / 'nothing'}", *settings])
    return int(train.run(config, deepspeed_config, dry=True))


def test_dry_run_needs_no_data_and_writes_nothing(tmp_path: Path) -> None:
    found = run_ranks(2, dry, tmp_path / "run", ROOT / "ds_configs" / "zero2.json", "quickstart")
    assert found == [Exit.FINISHED, Exit.FINISHED]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("task", ["vqa", "snli-ve", "nlvr2", "retrieval"])
def test_dry_run_of_fine_tuning(tmp_path: Path, task: str) -> None:
    arguments = (tmp_path / "run", ROOT / "ds_configs" / "zero1.json", f"quickstart-{task}")
    assert run_ranks(2, dry, *arguments) == [Exit.FINISHED, Exit.FINISHED]
    assert list(tmp_path.iterdir()) == []


ONE_TOWER = {
    "cifar": ["classifier.num_answers=10"],
    "glue": [
        "glue.name=mnli",
        "data.train=[{path: glue, splits: [mnli-train]}]",
        "data.eval=[{path: glue, splits: [mnli-dev_matched]}, {path: glue, splits: [mnli-dev_mismatched]}]",
    ],
}


@pytest.mark.parametrize("task", ONE_TOWER)
def test_dry_run_of_one_tower(tmp_path: Path, task: str) -> None:
    arguments = (tmp_path / "run", ROOT / "ds_configs" / "zero3.json", "quickstart", f"task={task}")
    assert run_ranks(2, dry, *arguments, *ONE_TOWER[task]) == [Exit.FINISHED, Exit.FINISHED]
    assert list(tmp_path.iterdir()) == []


def test_dry_run_refuses_what_the_run_would(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="cannot be split"):  # SystemExit inside a rank
        run_ranks(
            1,
            dry,
            tmp_path / "run",
            ROOT / "ds_configs" / "zero1.json",
            "quickstart",
            "train.micro_batch_size=3",
        )
