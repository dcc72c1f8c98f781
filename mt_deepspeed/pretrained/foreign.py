"""Models of others with their heads: published ManagerTower and BridgeTower `.ckpt`, transformers' BridgeTower."""

import json
from pathlib import Path
from typing import Any

from data_tools.sources.answers import read_vocabulary
from mt_deepspeed.config import ClassifierConfig, DataConfig, ObjectivesConfig, RetrievalConfig, RunConfig
from mt_deepspeed.config.model import HeadsConfig
from mt_deepspeed.data.text import load_tokenizer
from mt_deepspeed.models.foreign_configs import ForeignSetup, from_reference, published_options
from mt_deepspeed.models.hf_bridgetower import from_hf_bridgetower
from mt_deepspeed.models.state_dicts import KeyReport, import_checkpoint
from mt_deepspeed.pretrained.model import Pretrained
from mt_deepspeed.pretrained.starting_weights import HEADS
from mt_deepspeed.tasks import build_task

HF_CONFIG = "config.json"


def is_foreign(source: Path) -> bool:
    """Whether `source` is one of them: a file, or a folder with a transformers configuration."""
    if source.is_file():
        return True
    try:
        return "model_type" in json.loads((source / HF_CONFIG).read_text("utf-8"))
    except (OSError, ValueError):
        return False


def load_foreign(
    source: Path, tokenizer: str | None = None, answers: Path | None = None
) -> tuple[Pretrained, KeyReport]:
    """Builds the model that a file or folder describes, at the resolution it was trained for, and fills it.

    Args:
        source: A published `.ckpt`, or a folder of a transformers BridgeTower.
        tokenizer: Folder or hub name; None: the folder itself, or what the `.ckpt` names.
        answers: VQA: the answers in the order of their labels, which no published file holds: a JSON list, a JSON
            object answer -> label, or VQA shards.

    Returns:
        The model, and what became of every tensor by name. Heads of tasks that are not the model's stay behind.

    Raises:
        ValueError: Another kind of file, a model that is not supported, tensors that do not fit, or no answers.
    """
    setup, data, named = _published(source) if source.is_file() else _hf_folder(source)
    config = _run_config(setup, data)
    words = _answers(config, answers)
    reader = load_tokenizer(tokenizer or named, ".", data.max_text_len, special_in_text=True)
    if reader.vocab_size > config.model.text.vocab_size:
        raise ValueError(
            f"tokenizer {tokenizer or named}: has {reader.vocab_size} tokens, the model {config.model.text.vocab_size}"
        )
    task = build_task(config)
    # The false-text score was trained beside a frozen matching head, which its checkpoint need not hold.
    spare = ("itm_score.*",) if setup.heads.rank else ()
    report = import_checkpoint(task, source, allow_missing=spare, allow_unexpected=(*setup.unused, *HEADS))
    return Pretrained(config, task, reader, {"imported": source.resolve().name}, words), report


def _published(file: Path) -> tuple[ForeignSetup, DataConfig, str]:
    options = published_options(file)
    keys: Any = options.get("val_transform_keys") or ["clip"]
    data = DataConfig(max_text_len=options.get("max_text_len", 50), eval_transform=keys[0])
    # Encoders other than the named ones have their sizes beside the options.
    return from_reference(options, options), data, str(options.get("tokenizer", "roberta-base"))


def _hf_folder(folder: Path) -> tuple[ForeignSetup, DataConfig, str]:
    config = json.loads((folder / HF_CONFIG).read_text("utf-8"))
    if config["model_type"] != "bridgetower":
        raise ValueError(f"{folder}: model_type {config['model_type']!r}, expected 'bridgetower'")
    setup = from_hf_bridgetower(config, (config.get("architectures") or [""])[0])
    text = setup.model.text
    data = DataConfig(max_text_len=min(50, text.max_positions - text.pad_token_id - 1), eval_transform="clip")
    return setup, data, str(folder.resolve())


def _run_config(setup: ForeignSetup, data: DataConfig) -> RunConfig:
    heads = setup.heads
    return RunConfig(
        task=_task(heads),  # type: ignore[arg-type]
        model=setup.model,
        data=data,
        objectives=ObjectivesConfig(
            mlm_weight=float(heads.mlm),
            itm_weight=float(heads.itm),
            mlm_layer_norm_eps=heads.mlm_layer_norm_eps,
        ),
        classifier=ClassifierConfig(
            layers=heads.classifier_layers,
            scale=heads.classifier_scale,
            num_answers=heads.vqa_answers or ClassifierConfig().num_answers,
        ),
        retrieval=RetrievalConfig(
            objective="false_texts" if heads.rank else "three_way" if heads.fused_itc_size else "itc_itm",
            itc_size=heads.itc_size or heads.fused_itc_size or RetrievalConfig().itc_size,
            itc_temperature=heads.itc_temperature,
        ),
    )


def _task(heads: HeadsConfig) -> str:
    if heads.vqa_answers is not None:
        return "vqa"
    if heads.nlvr2 or heads.snli_ve:
        return "nlvr2" if heads.nlvr2 else "snli_ve"
    if heads.rank or heads.fused_itc_size or (heads.itc_size and not heads.mlm):
        return "retrieval"
    if heads.mlm or heads.itm:
        return "pretrain"
    raise ValueError(
        "the model has no head: it can only be a start for training (checkpoint.init_from), or be loaded by "
        "transformers' class with a head and saved again"
    )


def _answers(config: RunConfig, file: Path | None) -> list[str]:
    if config.task != "vqa":
        return []
    if file is None:
        raise ValueError(
            "a VQA model: give its answers with --answers, in the order of the labels it was trained with: VQAv2 "
            "shards, a JSON list, or a JSON object answer -> label"
        )
    answers = read_vocabulary(file)
    if len(answers) != config.classifier.num_answers:
        raise ValueError(f"{file}: {len(answers)} answers, the model has {config.classifier.num_answers}")
    return answers
