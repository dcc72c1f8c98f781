"""A trained model with its tokenizer and picture settings: from a run folder or an exported one.

An exported folder holds `model.safetensors` (plain layout: the published parameter names), `config.json`
and the tokenizer's files; nothing in it depends on DeepSpeed or on the machine that trained it.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from mt_deepspeed.config import RunConfig, from_dict, load_config, to_dict
from mt_deepspeed.config.run import TASKS_WITH_ANSWERS
from mt_deepspeed.data.text import CaptionTokenizer, load_tokenizer
from mt_deepspeed.engine.weights import choose_weights
from mt_deepspeed.models.state_dicts import import_checkpoint, plain_state_dict
from mt_deepspeed.models.vision_tower import MEAN, STD
from mt_deepspeed.pretrained.model import Pretrained
from mt_deepspeed.pretrained.starting_weights import run_state_dict
from mt_deepspeed.tasks import build_task

FORMAT_VERSION = 1
WEIGHTS, SETTINGS, RUN_CONFIG = "model.safetensors", "config.json", "config.yaml"
ANSWERS = "answers.json"
"""In the folder of a run and of its exported model: answers (VQA) or classes (CIFAR), in the order of their labels."""
_CONVERT = (
    "Published checkpoints and transformers models are brought in by "
    "`python -m mt_deepspeed.export --checkpoint FILE_OR_FOLDER --out DIR`"
)
EXPORTED_DATA = ("max_text_len", "padding", "eval_transform")


def load(folder: str | Path, device: str | torch.device = "cpu") -> Pretrained:
    """Loads a run folder (its best checkpoint, else its newest), one checkpoint of it, or an exported folder.

    Raises:
        ValueError: None of the three, or damaged.
    """
    folder = Path(folder)
    if folder.is_file():
        raise ValueError(f"{folder}: a file, not a folder. {_CONVERT}")
    run = folder.parent.parent if folder.parent.name == "checkpoints" else folder
    if (folder / SETTINGS).is_file():
        pretrained = _from_export(folder)
    elif (run / RUN_CONFIG).is_file():
        pretrained = _from_run(run, choose_weights(folder))
    else:
        raise ValueError(
            f"{folder}: found neither {SETTINGS} (an exported model) nor {RUN_CONFIG} (a run folder)"
        )
    pretrained.task.to(device)
    return pretrained


def save(pretrained: Pretrained, folder: str | Path) -> None:
    """Writes the exported folder; see the module docstring."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if pretrained.config.reads_texts:
        pretrained.tokenizer.save(folder)
    state = plain_state_dict(pretrained.task)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / WEIGHTS)
    data = {name: getattr(pretrained.config.data, name) for name in EXPORTED_DATA}
    settings = {
        "format_version": FORMAT_VERSION,
        "config": {
            "task": pretrained.config.task,
            "model": to_dict(pretrained.config.model),
            "objectives": to_dict(pretrained.config.objectives),
            "classifier": to_dict(pretrained.config.classifier),
            "glue": to_dict(pretrained.config.glue),
            "retrieval": to_dict(pretrained.config.retrieval),
            "data": data,
        },
        "image_processor": {
            "image_size": pretrained.config.model.vision.image_size,
            "transform": pretrained.config.data.eval_transform,
            "resample": "bicubic",
            "mean": list(MEAN),
            "std": list(STD),
        },
        "labels": list(pretrained.labels),
        "provenance": pretrained.provenance,
    }
    (folder / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", "utf-8")
    if pretrained.answers:
        keep_answers(folder, pretrained.answers)


def _from_export(folder: Path) -> Pretrained:
    settings = json.loads((folder / SETTINGS).read_text("utf-8"))
    if "model_type" in settings:
        raise ValueError(f"{folder}: a transformers model ({settings['model_type']}). {_CONVERT}")
    if settings.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{folder / SETTINGS}: format_version {settings.get('format_version')!r}, expected {FORMAT_VERSION}"
        )
    config = from_dict(RunConfig, settings["config"])
    task = build_task(config)
    import_checkpoint(task, folder / WEIGHTS)
    tokenizer = _tokenizer(config, ".", folder)
    return Pretrained(config, task, tokenizer, settings["provenance"], read_answers(folder, config))


def _from_run(folder: Path, checkpoint: Path) -> Pretrained:
    config = load_config(files=[folder / RUN_CONFIG])
    task = build_task(config)
    import_checkpoint(task, run_state_dict(checkpoint))
    provenance = {"run": folder.resolve().name, "checkpoint": checkpoint.name}
    tokenizer = _tokenizer(config, config.data.tokenizer, config.data.root)
    return Pretrained(config, task, tokenizer, provenance, read_answers(folder, config))


def keep_answers(folder: Path, answers: Sequence[str]) -> None:
    """Writes `answers.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ANSWERS).write_text(json.dumps(list(answers), ensure_ascii=False, indent=0) + "\n", "utf-8")


def read_answers(folder: Path, config: RunConfig) -> list[str]:
    """The answers or classes of a model's folder, in the order of their labels; none for tasks without such a list.

    Raises:
        ValueError: They are missing, or not as many as the model has.
    """
    if config.task not in TASKS_WITH_ANSWERS:
        return []
    try:
        answers = json.loads((folder / ANSWERS).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / ANSWERS}: the model's answers cannot be read: {error}") from error
    if not isinstance(answers, list) or len(answers) != config.classifier.num_answers:
        raise ValueError(f"{folder / ANSWERS}: expected a list of {config.classifier.num_answers} answers")
    return answers


def _tokenizer(config: RunConfig, source: str, root: str | Path) -> CaptionTokenizer | None:
    if not config.reads_texts:
        return None
    return load_tokenizer(source, root, config.data.max_text_len, special_in_text=True)
