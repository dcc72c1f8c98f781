"""Typed run configuration: dataclasses, presets, strict loading."""

from mt_deepspeed.config.load import ConfigError, from_dict, load_config, preset_names, to_dict, to_yaml
from mt_deepspeed.config.model import (
    CrossModalConfig,
    LinkConfig,
    ModelConfig,
    TextTowerConfig,
    VisionTowerConfig,
)
from mt_deepspeed.config.run import (
    CheckpointConfig,
    ClassifierConfig,
    DataConfig,
    DatasetConfig,
    GlueConfig,
    ObjectivesConfig,
    OptimConfig,
    ResilienceConfig,
    RetrievalConfig,
    RunConfig,
    TrainConfig,
)

__all__ = [
    "CheckpointConfig",
    "ClassifierConfig",
    "ConfigError",
    "CrossModalConfig",
    "DataConfig",
    "DatasetConfig",
    "GlueConfig",
    "LinkConfig",
    "ModelConfig",
    "ObjectivesConfig",
    "OptimConfig",
    "ResilienceConfig",
    "RetrievalConfig",
    "RunConfig",
    "TextTowerConfig",
    "TrainConfig",
    "VisionTowerConfig",
    "from_dict",
    "load_config",
    "preset_names",
    "to_dict",
    "to_yaml",
]
