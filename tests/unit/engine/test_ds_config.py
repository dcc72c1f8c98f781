from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mt_deepspeed.config import OptimConfig, RunConfig, TrainConfig
from mt_deepspeed.engine.ds_config import (
    ALLOWED_KEYS,
    OWNED_KEYS,
    DsConfigError,
    check_ds_config,
    check_precision,
    load_ds_config,
    merge,
    offload_device,
    split_batch,
    zero_stage,
)

ROOT = Path(__file__).resolve().parents[3]
SHIPPED = {
    "zero0": (0, "none"),
    "zero1": (1, "none"),
    "zero2": (2, "none"),
    "zero3": (3, "none"),
    "zero3_offload": (3, "cpu"),
    "zero_infinity": (3, "nvme"),
}


def test_every_shipped_file_loads() -> None:
    assert {path.stem for path in (ROOT / "ds_configs").glob("*.json")} == set(SHIPPED)
    for name, (stage, device) in SHIPPED.items():
        values = load_ds_config(ROOT / "ds_configs" / f"{name}.json", environment={"NVME_PATH": "/scratch"})
        assert (zero_stage(values), offload_device(values)) == (stage, device)


@pytest.mark.parametrize("key", sorted(OWNED_KEYS))
def test_keys_of_the_run_configuration_are_refused(key: str) -> None:
    with pytest.raises(DsConfigError, match=f"`{key}` belongs to the run configuration"):
        check_ds_config({key: 1}, "some.json")


def test_unknown_key_names_the_nearest() -> None:
    with pytest.raises(DsConfigError, match="did you mean `zero_optimization`"):
        check_ds_config({"zero_optimisation": {}}, "some.json")
    assert not set(ALLOWED_KEYS) & set(OWNED_KEYS)


@pytest.mark.parametrize(
    ("zero", "said"),
    [
        ({"stage": 4}, "expected 0, 1, 2 or 3"),
        ({"stage": 2, "elastic_checkpoint": True}, "elastic_checkpoint is refused"),
        ({"stage": 2, "offload_param": {"device": "cpu"}}, "offload_param needs stage 3"),
        ({"stage": 0, "offload_optimizer": {"device": "cpu"}}, "needs stage 1, 2 or 3"),
        ({"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}, "ratio must be 1"),
        ({"stage": 3, "zero_quantized_weights": True}, "zero_quantized_weights is refused"),
    ],
)
def test_harmful_zero_keys_are_refused(zero: dict[str, Any], said: str) -> None:
    with pytest.raises(DsConfigError, match=said):
        check_ds_config({"zero_optimization": zero}, "some.json")


def test_partitioned_activations_are_refused() -> None:
    with pytest.raises(DsConfigError, match="needs model parallelism"):
        check_ds_config({"activation_checkpointing": {"partition_activations": True}}, "some.json")


def test_broken_files_name_the_place(tmp_path: Path) -> None:
    file = tmp_path / "broken.json"
    file.write_text('{\n "zero_optimization": {"stage": 2,}\n}')
    with pytest.raises(DsConfigError, match=r"broken\.json:2:\d+: not valid JSON"):
        load_ds_config(file)
    with pytest.raises(DsConfigError, match="cannot be read"):
        load_ds_config(tmp_path / "missing.json")
    file.write_text("[]")
    with pytest.raises(DsConfigError, match="expected a JSON object"):
        load_ds_config(file)


def test_variables_of_a_file_come_from_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "nvme.json"
    file.write_text(
        '{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "${FAST}/x"}}}'
    )
    values = load_ds_config(file, environment={"FAST": "/disk"})
    assert values["zero_optimization"]["offload_optimizer"]["nvme_path"] == "/disk/x"
    with pytest.raises(DsConfigError, match="FAST"):
        load_ds_config(file, environment={})


@given(micro=st.integers(1, 64), accumulation=st.integers(1, 64), ranks=st.integers(1, 64))
def test_every_exact_split_is_found(micro: int, accumulation: int, ranks: int) -> None:
    split = split_batch(micro * accumulation * ranks, micro, ranks)
    assert (split.accumulation, split.micro_batch, split.world_size) == (accumulation, micro, ranks)


@given(batch=st.integers(1, 600), micro=st.integers(1, 40), ranks=st.integers(1, 12))
def test_impossible_splits_list_possible_ones(batch: int, micro: int, ranks: int) -> None:
    if batch % (micro * ranks) == 0:
        return
    with pytest.raises(DsConfigError) as caught:
        split_batch(batch, micro, ranks)
    message = str(caught.value)
    offered = message.split("ranks: ", 1)[1].split(". Valid rank counts")[0]
    if batch % ranks:
        assert offered.startswith("none")
    for part in () if batch % ranks else offered.split(", "):
        assert split_batch(batch, int(part.split()[0]), ranks)
    counts = message.rsplit(": ", 1)[1]
    for count in () if counts == "none" else counts.split(", "):
        assert split_batch(batch, micro, int(count))


def test_fp16_needs_a_gpu() -> None:
    cpu = torch.device("cpu")
    with pytest.raises(DsConfigError, match="fp16 needs a GPU"):
        check_precision("fp16", cpu, {})
    check_precision("bf16", cpu, {})
    nvme = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}
    with pytest.raises(DsConfigError, match="NVMe"):
        check_precision("fp16", torch.device("cuda"), nvme)


def test_merge_always_says_what_deepspeed_would_guess() -> None:
    config = RunConfig(
        train=TrainConfig(global_batch_size=24, micro_batch_size=4), optim=OptimConfig(max_grad_norm=0.0)
    )
    given_values = {
        "zero_optimization": {"stage": 2},
        "activation_checkpointing": {"cpu_checkpointing": True},
    }
    before = json.dumps(given_values)
    merged = merge(given_values, config, split_batch(24, 4, 2), torch.device("cpu"))
    assert merged["gradient_clipping"] == 0.0
    assert merged["train_batch_size"] == 24
    assert merged["gradient_accumulation_steps"] == 3
    assert not {"bf16", "fp16", "torch_autocast"} & set(merged)
    assert merged["activation_checkpointing"]["cpu_checkpointing"] is False  # activations are on the CPU
    assert json.dumps(given_values) == before
