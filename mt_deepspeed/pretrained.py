"""A trained model with its tokenizer and picture settings: from a run folder or an exported one.

An exported folder holds `model.safetensors` (plain layout: the published parameter names), `config.json`
and the tokenizer's files; nothing in it depends on DeepSpeed or on the machine that trained it.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from mt_deepspeed.config import DataConfig, RunConfig, from_dict, load_config, to_dict
from mt_deepspeed.data.images import decode_image, to_tensor
from mt_deepspeed.data.text import CaptionTokenizer, load_tokenizer
from mt_deepspeed.data.transforms import ImageTransform
from mt_deepspeed.engine.weights import choose_weights
from mt_deepspeed.models.state_dicts import import_checkpoint, plain_state_dict
from mt_deepspeed.models.vision_tower import MEAN, STD
from mt_deepspeed.starting_weights import run_state_dict
from mt_deepspeed.tasks import AnyTask, build_task
from mt_deepspeed.tasks.pretrain import PretrainTask

FORMAT_VERSION = 1
WEIGHTS, SETTINGS, RUN_CONFIG = "model.safetensors", "config.json", "config.yaml"
ANSWERS = "answers.json"
"""In the folder of a VQA run and of its exported model: the answers, in the order of their labels."""
EXPORTED_DATA = ("max_text_len", "padding", "eval_transform")

Picture = str | Path | Image.Image


@dataclasses.dataclass(frozen=True)
class Guess:
    """A word for a mask and its probability."""

    word: str
    probability: float


class Pretrained:
    """A model ready for inference.

    Attributes:
        config: What it was trained with; of an exported model only the parts that inference needs.
        task: The model with its heads, in evaluation mode.
        tokenizer: Reads `<mask>` in a text as the mask token.
        provenance: Where the weights come from.
        answers: VQA: the answers, in the order of their labels.
    """

    def __init__(
        self,
        config: RunConfig,
        task: AnyTask,
        tokenizer: CaptionTokenizer,
        provenance: dict[str, Any],
        answers: Sequence[str] = (),
    ) -> None:
        self.config = config
        self.task = task
        self.task.eval()
        self.answers = tuple(answers)
        self.tokenizer = tokenizer
        self.provenance = provenance
        self.transform = ImageTransform(
            config.data.eval_transform, config.model.vision.image_size, train=False
        )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.task.parameters()).device

    def pixels(self, pictures: Sequence[Picture]) -> Tensor:
        """Pixels `[B, 3, S, S]` uint8 of pictures or picture files, as the model takes them."""
        generator = np.random.default_rng(0)  # evaluation transforms draw nothing from it
        decoded = []
        for picture in pictures:
            if isinstance(picture, Image.Image):
                raw = to_tensor(picture.convert("RGB"))
            else:
                raw = decode_image(np.fromfile(picture, dtype=np.uint8))
            decoded.append(self.transform(raw, generator))
        return torch.stack(decoded).to(self.device)

    def tokens(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask `[B, L]` (int64; 1 token, 0 padding), padded as in training."""
        encoded = [self.tokenizer.encode(text).ids for text in texts]
        longest = max(len(ids) for ids in encoded)
        length = self.config.data.max_text_len if self.config.data.padding == "max_length" else longest
        ids = torch.full((len(encoded), length), self.tokenizer.pad_id)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(encoded):
            ids[row, : len(tokens)] = torch.from_numpy(tokens)
            mask[row, : len(tokens)] = 1
        return ids.to(self.device), mask.to(self.device)

    @torch.no_grad()
    def match(self, pictures: Sequence[Picture], texts: Sequence[str]) -> Tensor:
        """Probability that picture and text of each row belong together, `[B]` float32.

        Raises:
            ValueError: The model was trained without ITM.
        """
        head = getattr(self.task, "itm_score", None)
        if head is None:
            raise ValueError("this model has no matching head (itm_score): it was trained without ITM")
        fused = self.task.model(*self.tokens(texts), self.pixels(pictures))
        probability: Tensor = head(fused.cls_feats).float().softmax(dim=-1)[:, 1]
        return probability

    @torch.no_grad()
    def fill_masks(
        self, picture: Picture, text: str, top: int = 5, record: dict[str, Tensor] | None = None
    ) -> list[list[Guess]]:
        """The likeliest words for each `<mask>` in `text`, best first.

        Raises:
            ValueError: No `<mask>` in the text, or the model was trained without MLM.
        """
        if not isinstance(self.task, PretrainTask) or not self.task.has_mlm:
            raise ValueError("this model has no vocabulary head (mlm_score): it was trained without MLM")
        ids, mask = self.tokens([text])
        chosen = ids == self.tokenizer.mask_id
        if not chosen.any():
            raise ValueError(f"{text!r}: found no <mask>, expected at least one")
        logits = self.task.fill_masks(self.pixels([picture]), ids, mask, chosen, record)
        best = logits.float().softmax(dim=-1).topk(top)
        return [
            [
                Guess(self.tokenizer.decode([token]).strip(), value)
                for token, value in zip(tokens, values, strict=True)
            ]
            for tokens, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]

    def save(self, folder: Path) -> None:
        """Writes the exported folder; see the module docstring."""
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save(folder)
        state = plain_state_dict(self.task)
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / WEIGHTS)
        data = {name: getattr(self.config.data, name) for name in EXPORTED_DATA}
        settings = {
            "format_version": FORMAT_VERSION,
            "config": {
                "task": self.config.task,
                "model": to_dict(self.config.model),
                "objectives": to_dict(self.config.objectives),
                "classifier": to_dict(self.config.classifier),
                "retrieval": to_dict(self.config.retrieval),
                "data": data,
            },
            "image_processor": {
                "image_size": self.config.model.vision.image_size,
                "transform": self.config.data.eval_transform,
                "resample": "bicubic",
                "mean": list(MEAN),
                "std": list(STD),
            },
            "provenance": self.provenance,
        }
        (folder / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", "utf-8")
        if self.answers:
            keep_answers(folder, self.answers)


def load(folder: str | Path, device: str | torch.device = "cpu") -> Pretrained:
    """Loads a run folder (its best checkpoint, else its newest), one checkpoint of it, or an exported folder.

    Raises:
        ValueError: None of the three, or damaged.
    """
    folder = Path(folder)
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


def _from_export(folder: Path) -> Pretrained:
    settings = json.loads((folder / SETTINGS).read_text("utf-8"))
    if settings.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{folder / SETTINGS}: format_version {settings.get('format_version')!r}, expected {FORMAT_VERSION}"
        )
    config = from_dict(RunConfig, settings["config"])
    task = build_task(config)
    import_checkpoint(task, folder / WEIGHTS)
    tokenizer = _tokenizer(config.data, ".", folder)
    return Pretrained(config, task, tokenizer, settings["provenance"], read_answers(folder, config))


def _from_run(folder: Path, checkpoint: Path) -> Pretrained:
    config = load_config(files=[folder / RUN_CONFIG])
    task = build_task(config)
    import_checkpoint(task, run_state_dict(checkpoint))
    provenance = {"run": folder.resolve().name, "checkpoint": checkpoint.name}
    tokenizer = _tokenizer(config.data, config.data.tokenizer, config.data.root)
    return Pretrained(config, task, tokenizer, provenance, read_answers(folder, config))


def keep_answers(folder: Path, answers: Sequence[str]) -> None:
    """Writes `answers.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ANSWERS).write_text(json.dumps(list(answers), ensure_ascii=False, indent=0) + "\n", "utf-8")


def read_answers(folder: Path, config: RunConfig) -> list[str]:
    """The answers of a VQA model's folder, in the order of their labels; none for other tasks.

    Raises:
        ValueError: They are missing, or not as many as the model has.
    """
    if config.task != "vqa":
        return []
    try:
        answers = json.loads((folder / ANSWERS).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / ANSWERS}: the model's answers cannot be read: {error}") from error
    if not isinstance(answers, list) or len(answers) != config.classifier.num_answers:
        raise ValueError(f"{folder / ANSWERS}: expected a list of {config.classifier.num_answers} answers")
    return answers


def _tokenizer(data: DataConfig, source: str, root: str | Path) -> CaptionTokenizer:
    return load_tokenizer(source, root, data.max_text_len, special_in_text=True)
