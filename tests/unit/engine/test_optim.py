from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mt_deepspeed.config import OptimConfig
from mt_deepspeed.engine.optim import (
    GroupKey,
    OptimError,
    assign_groups,
    build_optimizer,
    lr_factor,
    parameter_groups,
    reference_decays,
    set_learning_rates,
    vectors_never_decay,
    warmup_steps,
)
from mt_deepspeed.tasks.base import published_role

ROOT = Path(__file__).resolve().parents[3]
GOLDEN = Path(os.environ.get("MT_GOLDEN") or ROOT / "tests" / "golden")
CASES = sorted(GOLDEN.glob("*/optimizer_groups.json"))


@pytest.mark.parametrize("file", CASES, ids=[file.parent.name for file in CASES])
def test_groups_of_the_published_code(file: Path) -> None:
    case = json.loads(file.read_text())
    multipliers = {"tower": 1.0, "head": case["lr_mult_head"], "cross_modal": case["lr_mult_cross_modal"]}
    expected = {
        name: (group["lr_multiplier"], group["weight_decay"])
        for group in case["groups"]
        for name in group["parameters"]
    }
    shapes = {name: (2, 2) for name in expected}
    roles = {name: published_role(name) for name in expected}
    found = {
        name: (multipliers[key.role], 0.01 if key.decays else 0.0)
        for key, names in assign_groups(shapes, roles, "reference").items()
        for name in names
    }
    assert found == expected


def test_some_golden_groups_are_there() -> None:
    assert CASES, f"no optimizer_groups.json below {GOLDEN}"


@pytest.mark.parametrize(
    ("name", "decays"),
    [
        ("text_transformer.encoder.layer.0.output.LayerNorm.weight", False),
        ("vit_model.visual.transformer.resblocks.0.ln_1.weight", True),
        ("cross_modal_text_manager_tower.1.manager_layer.LayerNorm.3.weight", True),
        ("cross_modal_text_manager_tower.1.manager_layer.extra_query_LayerNorm.weight", False),
        ("cross_modal_text_manager_tower.1.manager_layer.softmax_temperature", True),
        ("cross_modal_text_layernorm.weight", False),
        ("mlm_score.bias", False),
        ("vqa_classifier.1.weight", True),
    ],
)
def test_reference_rule_keeps_its_quirks(name: str, decays: bool) -> None:
    assert reference_decays(name) is decays


@pytest.mark.parametrize(
    ("name", "shape", "decays"),
    [
        ("vit.resblocks.0.ln_1.weight", (768,), False),
        ("temperature", (1,), False),
        ("manager.layer_scores", (6, 768), False),
        ("manager.layer_scores_cross", (1, 768), False),
        ("vit.class_embedding", (768,), False),
        ("text.word_embeddings.weight", (50265, 768), True),
        ("vit.conv1.weight", (768, 3, 16, 16), True),
        ("head.fc.weight", (1, 8), False),
    ],
)
def test_norms_and_biases_rule(name: str, shape: tuple[int, ...], decays: bool) -> None:
    assert vectors_never_decay(name, shape) is decays


def test_parameter_without_dimension_and_unknown_role_are_named() -> None:
    with pytest.raises(OptimError, match=r"logit_scale has no dimension.*shape \[1\]"):
        assign_groups({"logit_scale": ()}, {"logit_scale": "tower"}, "reference")
    with pytest.raises(OptimError, match="'tail'"):
        assign_groups({"w": (2, 2)}, {"w": "tail"}, "reference")


def make_groups(config: OptimConfig) -> list[dict[str, Any]]:
    model = nn.ModuleDict({"tower": nn.Linear(2, 2), "cross": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    model["tower"].bias.requires_grad_(False)
    roles = {"tower.weight": "tower", "cross.weight": "cross_modal", "cross.bias": "cross_modal"}
    roles |= {"head.weight": "head", "head.bias": "head"}
    return parameter_groups(model.named_parameters(), roles, config)


def test_groups_have_multiplied_rates_and_leave_out_frozen_parameters() -> None:
    config = OptimConfig(lr=1e-3, cross_modal_lr_multiplier=5, head_lr_multiplier=50, weight_decay=0.1)
    groups = {group["label"]: group for group in make_groups(config)}
    assert list(groups) == [
        "tower/decay",
        "cross_modal/decay",
        "cross_modal/no_decay",
        "head/decay",
        "head/no_decay",
    ]
    assert groups["head/decay"]["peak_lr"] == pytest.approx(0.05)
    assert groups["cross_modal/no_decay"]["weight_decay"] == 0.0
    assert groups["tower/decay"]["weight_decay"] == 0.1
    assert GroupKey("head", True).label == "head/decay"


def test_rates_follow_the_factor() -> None:
    config = OptimConfig(lr=1e-3)
    optimizer = build_optimizer(make_groups(config), config, {})
    assert isinstance(optimizer, torch.optim.AdamW)
    rates = set_learning_rates(optimizer, 0.5)
    assert rates["tower/decay"] == pytest.approx(5e-4)
    assert optimizer.param_groups[-1]["lr"] == pytest.approx(2.5e-3)
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.98)


def test_schedule_of_the_published_code() -> None:
    config = OptimConfig(warmup=0.1)
    assert warmup_steps(config, 105) == 10
    factors = [lr_factor(step, config, 100) for step in (0, 5, 10, 55, 100, 120)]
    assert factors == pytest.approx([0.0, 0.5, 1.0, 0.5, 0.0, 0.0])
    assert warmup_steps(OptimConfig(warmup=7), 100) == 7
    assert lr_factor(0, OptimConfig(warmup=0), 100) == 1.0


@given(
    schedule=st.sampled_from(["polynomial", "cosine", "constant"]),
    warmup=st.one_of(st.floats(0, 0.9), st.integers(1, 60).map(float)),
    power=st.floats(0.5, 3),
    end=st.floats(0, 1),
    max_steps=st.integers(1, 200),
)
def test_schedule_rises_then_falls_to_its_end(
    schedule: Any, warmup: float, power: float, end: float, max_steps: int
) -> None:
    config = OptimConfig(schedule=schedule, warmup=warmup, decay_power=power, end_lr_ratio=end)
    factors = [lr_factor(step, config, max_steps) for step in range(max_steps + 5)]
    top = warmup_steps(config, max_steps)
    assert all(0.0 <= factor <= 1.0 for factor in factors)
    assert all(a <= b for a, b in itertools.pairwise(factors[:top]))
    assert all(a >= b for a, b in itertools.pairwise(factors[top:]))
    if schedule != "constant" and top <= max_steps:
        assert factors[max_steps] == pytest.approx(end)
