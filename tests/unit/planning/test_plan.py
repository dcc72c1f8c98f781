"""Plans: splits that work out, the choice of a stage, what is said and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from mt_deepspeed import plan as command
from mt_deepspeed.config import DataConfig, RunConfig, TrainConfig
from mt_deepspeed.engine.ds_config import DsConfigError
from mt_deepspeed.engine.gpus import GPUS, Gpu
from mt_deepspeed.planning import estimate
from mt_deepspeed.planning.activations import activation_bytes
from mt_deepspeed.planning.estimate import USABLE_SHARE, Cluster, Plan, make_plan
from tests.helpers.tiny_model import tiny_config

RUN = RunConfig(
    model=tiny_config(),
    data=DataConfig(max_text_len=9),
    train=TrainConfig(global_batch_size=96, micro_batch_size=8, max_steps=1000),
)
SMALL_BUCKET = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 1000}}


def plan(monkeypatch: pytest.MonkeyPatch, memory_mib: float, ranks: int = 4) -> Plan:
    monkeypatch.setattr(estimate, "RESERVED_GIB", 0.0)
    monkeypatch.setitem(GPUS, "tiny", Gpu("Tiny", memory_mib / 1024, 1.0))
    return make_plan(RUN, SMALL_BUCKET, Cluster(1, ranks, "tiny"), 0.5)


def test_splits_make_the_global_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    made = plan(monkeypatch, 500)
    assert made.recommended_stage == 2
    assert made.micro_batch == 8
    assert set(made.splits) == {1, 2, 3, 4, 6, 8, 12, 24}
    assert all(micro * times * 4 == 96 for micro, times in made.splits.items())
    assert made.hours == pytest.approx(96 * 1000 / made.samples_per_s / 3600)
    assert made.decodes_per_s_per_node == pytest.approx(made.samples_per_s * 1.5)


def test_less_memory_means_recomputing_and_smaller_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    ample = plan(monkeypatch, 500)
    at_eight, recomputing = ample.stages[2], activation_bytes(RUN, 1, 9).at(8)
    between = at_eight.states.gpu + (at_eight.activations + recomputing) / 2
    tight = plan(monkeypatch, between / USABLE_SHARE / 2**20)
    assert (ample.checkpointing, tight.checkpointing) == (0, 1)
    assert max(tight.splits) < max(ample.splits)
    assert tight.samples_per_s < ample.samples_per_s
    chosen = tight.stages[2]
    assert not chosen.fits
    assert chosen.largest[1] > chosen.largest[0]  # recomputing makes room


def test_nothing_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    made = plan(monkeypatch, 0.1)
    assert made.recommended_stage is None
    assert made.splits == {}


def test_impossible_split_and_precision_are_refused() -> None:
    with pytest.raises(DsConfigError, match="Valid rank counts"):
        make_plan(RUN, None, Cluster(1, 5, "h200"), 0.5)
    with pytest.raises(DsConfigError, match="no bf16"):
        make_plan(RUN, None, Cluster(1, 4, "v100-32"), 0.5)
    half = replace(RUN, train=replace(RUN.train, precision="fp16"))
    assert make_plan(half, None, Cluster(1, 4, "v100-32"), 0.5).micro_batch == 8


def test_command_prints_table_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--preset", "quickstart", "--gpus-per-node", "2", "--gpu", "a100-40"]
    command.main(arguments)
    text = capsys.readouterr().out
    assert "recommended   ds_configs/zero1.json, train.micro_batch_size=64" in text
    command.main([*arguments, "--json"])
    made = json.loads(capsys.readouterr().out)
    assert made["parameters"] == 795212
    assert [stage["stage"] for stage in made["stages"]] == [0, 1, 2, 3]


def test_wrong_arguments_end_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(["--preset", "quickstart", "--gpu", "h200", "--gpus-per-node", "3"])
    assert "train.global_batch_size=128 cannot be split" in str(ended.value)
    with pytest.raises(SystemExit) as ended:
        command.main(["--preset", "quickstart", "--gpu", "abacus"])
    assert ended.value.code == 2
    assert "invalid choice: 'abacus'" in capsys.readouterr().err
