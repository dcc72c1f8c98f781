"""Reference cases: a folder with config.json, state_dict, inputs and outputs (see tests/golden/README.md)."""

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mt_deepspeed.models import TwoTowerModel, attach_heads
from mt_deepspeed.models.foreign_configs import ForeignSetup, from_reference
from mt_deepspeed.models.hf_bridgetower import from_hf_bridgetower
from mt_deepspeed.models.state_dicts import KeyReport, import_checkpoint

GOLDEN = Path(os.environ.get("MT_GOLDEN") or Path(__file__).parents[1] / "golden")


class ModelWithHeads(nn.Module):
    """A two-tower model with its heads beside it, as a task holds them."""

    def __init__(self, setup: ForeignSetup) -> None:
        super().__init__()
        self.model = TwoTowerModel(setup.model)
        attach_heads(self, setup.model, setup.heads)


@dataclass(frozen=True)
class Case:
    folder: Path

    @property
    def name(self) -> str:
        return str(self.folder.relative_to(GOLDEN))

    @cached_property
    def config(self) -> dict[str, Any]:
        config: dict[str, Any] = json.loads((self.folder / "config.json").read_text("utf-8"))
        return config

    @property
    def from_library(self) -> bool:
        """Whether the public library's port of BridgeTower made the case."""
        return "class_name" in self.config

    @property
    def layout(self) -> str:
        return "hf_bridgetower" if self.from_library else "reference"

    @cached_property
    def setup(self) -> ForeignSetup:
        if self.from_library:
            return from_hf_bridgetower(self.config["config"], self.config["class_name"])
        return from_reference(self.config["config"], self.config)

    @property
    def active(self) -> set[str]:
        """Names of the reference's active objectives."""
        weights = self.config["config"].get("loss_names", {})
        return {name for name, weight in weights.items() if weight > 0}

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        return load_file(self.folder / "inputs.safetensors")

    @cached_property
    def outputs(self) -> dict[str, Tensor]:
        return load_file(self.folder / "outputs.safetensors")

    @cached_property
    def state_dict(self) -> dict[str, Tensor]:
        return load_file(self.folder / "state_dict.safetensors")

    def build(self) -> tuple[ModelWithHeads, KeyReport]:
        """The case's model with its weights, in evaluation mode."""
        torch.manual_seed(0)
        module = ModelWithHeads(self.setup)
        report = import_checkpoint(
            module, self.folder / "state_dict.safetensors", allow_unexpected=self.setup.unused
        )
        return module.eval(), report


def find_cases() -> list[Case]:
    """Every case below `$MT_GOLDEN`, by default below tests/golden."""
    return [Case(path.parent) for path in sorted(GOLDEN.rglob("config.json"))]
