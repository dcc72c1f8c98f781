"""A trained model with its tokenizer and picture settings, and what it can be asked for. Shapes as in `inference`."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mt_deepspeed.config import RunConfig
from mt_deepspeed.config.run import TOWER_OF_TASK
from mt_deepspeed.data.text import CaptionTokenizer
from mt_deepspeed.models.cross_modal import watched
from mt_deepspeed.pretrained.inference import (
    all_pair_scores,
    has_contrastive_heads,
    image_embeddings,
    outputs,
    pair_scores,
    text_embeddings,
)
from mt_deepspeed.pretrained.processor import Picture, Processor
from mt_deepspeed.tasks import AnyTask

ABILITIES = {
    "fill-mask": ("mlm_score",),
    "answer": ("vqa_classifier",),
    "entail": ("snli_classifier",),
    "compare": ("nlvr2_classifier",),
    "rank": ("itm_score", "rank_output", "itc_text_head"),
}
"""What a model may be asked for -> the heads of which it needs one."""

Pictures = Sequence[Picture] | Tensor


@dataclasses.dataclass(frozen=True)
class Guess:
    """A word, answer or class and its probability."""

    text: str
    probability: float


class Pretrained:
    """A model ready for inference: `mt_deepspeed.ManagerTower.from_pretrained(folder)`.

    Everything that takes pictures takes `PIL` images, files, or pixels as `processor.pixels` makes them.

    Attributes:
        config: What it was trained with; of an exported model only the parts that inference needs.
        task: The model with its heads, in evaluation mode.
        processor: Pictures and texts to tensors.
        provenance: Where the weights come from.
        labels: The classes of a classifier in the order of its logits; VQA: the answers.
    """

    def __init__(
        self,
        config: RunConfig,
        task: AnyTask,
        tokenizer: CaptionTokenizer | None,
        provenance: dict[str, Any],
        answers: Sequence[str] = (),
    ) -> None:
        self.config = config
        self.task: Any = task.eval()
        self.answers = tuple(answers)
        self.labels: tuple[str, ...] = self.answers or getattr(task, "labels", ())
        self.processor = Processor(config.data, config.model.vision.image_size, tokenizer)
        self.provenance = provenance

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str | torch.device = "cpu") -> "Pretrained":
        """As `mt_deepspeed.load`."""
        from mt_deepspeed.pretrained.loading import load

        return load(folder, device)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes what `from_pretrained` reads."""
        from mt_deepspeed.pretrained.loading import save

        save(self, folder)

    @property
    def tokenizer(self) -> CaptionTokenizer:
        """See `Processor.tokenizer`."""
        return self.processor.tokenizer

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = next(self.task.parameters()).device
        return device

    @torch.no_grad()
    def __call__(self, text_ids: Tensor, text_mask: Tensor, pixels: Tensor) -> dict[str, Tensor]:
        """What every head makes of a batch of the processor; see `inference.outputs`."""
        ids, mask = text_ids.to(self.device), text_mask.to(self.device)
        return outputs(self.task, ids, mask, self.pixels(pixels))

    def pixels(self, images: Pictures) -> Tensor:
        """Pixels on the model's device."""
        return (images if isinstance(images, Tensor) else self.processor.pixels(images)).to(self.device)

    def tokens(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask `[B, L]` on the model's device."""
        ids, mask = self.processor.tokens(texts)
        return ids.to(self.device), mask.to(self.device)

    def fill_mask(self, image: Picture, text: str, top: int = 5) -> list[list[Guess]]:
        """The likeliest words for each `<mask>` in `text`, best first.

        Raises:
            ValueError: No `<mask>` in the text, or the model was trained without MLM.
        """
        return self.fill_masks([image], [text], top)[0]

    @torch.no_grad()
    def fill_masks(self, images: Pictures, texts: Sequence[str], top: int = 5) -> list[list[list[Guess]]]:
        """As `fill_mask`, for rows of pictures and texts."""
        self.need("fill-mask")
        ids, mask = self.tokens(texts)
        chosen = ids == self.tokenizer.mask_id
        for text, found in zip(texts, chosen.any(dim=1).tolist(), strict=True):
            if not found:
                raise ValueError(f"{text!r}: found no <mask>, expected at least one")
        logits = self.task.fill_masks(self.pixels(images), ids, mask, chosen)
        best = logits.float().softmax(dim=-1).topk(min(top, logits.shape[-1]))
        guesses = [
            [
                Guess(self.tokenizer.decode([token]).strip(), value)
                for token, value in zip(tokens, values, strict=True)
            ]
            for tokens, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
        rows = iter(guesses)
        return [[next(rows) for _ in range(count)] for count in chosen.sum(dim=1).tolist()]

    def answer(self, image: Picture, question: str, top: int = 5) -> list[Guess]:
        """The likeliest answers, best first; their probabilities are independent and need not sum to 1.

        Raises:
            ValueError: The model was not trained for VQA.
        """
        self.need("answer")
        return self.classify([image], [question], top)[0]

    def entail(self, image: Picture, hypothesis: str) -> list[Guess]:
        """`contradiction`, `neutral` and `entailment` of a hypothesis by a picture, likeliest first.

        Raises:
            ValueError: The model was not trained for SNLI-VE.
        """
        self.need("entail")
        return self.classify([image], [hypothesis])[0]

    def compare(self, left: Picture, right: Picture, statement: str) -> list[Guess]:
        """Whether a statement about two pictures is `true` or `false`, likelier first.

        Raises:
            ValueError: The model was not trained for NLVR2.
        """
        self.need("compare")
        return self.classify([left, right], [statement])[0]

    @torch.no_grad()
    def classify(self, images: Pictures, texts: Sequence[str], top: int | None = None) -> list[list[Guess]]:
        """The classes of each row, likeliest first, at most `top`; NLVR2: all left pictures, then all right ones."""
        ids, mask = self.tokens(texts)
        logits = self.task.logits({"text_ids": ids, "text_mask": mask, "pixels": self.pixels(images)}).float()
        # VQA is trained with one binary decision for each answer.
        shares = logits.sigmoid() if self.config.task == "vqa" else logits.softmax(dim=-1)
        best = shares.topk(min(top or len(self.labels), len(self.labels)))
        return [
            [Guess(self.labels[label], value) for label, value in zip(labels, values, strict=True)]
            for labels, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]

    @torch.no_grad()
    def match(self, images: Pictures, texts: Sequence[str]) -> Tensor:
        """How well picture and text of each row fit, `[B]` float32; see `scores`."""
        self.need("rank")
        ids, mask = self.tokens(texts)
        return pair_scores(self.task, ids, mask, self.pixels(images))

    @torch.no_grad()
    def scores(self, texts: Sequence[str], images: Pictures, batch_size: int = 64) -> Tensor:
        """How well each text fits each picture, `[T, I]` float32, every pair computed.

        The probability of the matching head; of models without one the score of the false-text objective, or
        the cosine of contrastive embeddings.

        Raises:
            ValueError: The model has no such head.
        """
        self.need("rank")
        ids, mask = self.tokens(texts)
        blocks = [
            all_pair_scores(self.task, ids, mask, self.pixels(images[start : start + batch_size]))
            for start in range(0, len(images), batch_size)
        ]
        return torch.cat(blocks, dim=1)

    def rank(
        self, texts: Sequence[str], images: Pictures, top: int | None = None
    ) -> list[list[tuple[int, float]]]:
        """For each text (number of the picture, score), best first, at most `top`; see `scores`."""
        table = self.scores(texts, images)
        best = table.topk(min(top or table.shape[1], table.shape[1]))
        return [
            list(zip(numbers, values, strict=True))
            for numbers, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]

    @torch.no_grad()
    def attention(self, image: Picture, text: str, word: str) -> Tensor:
        """Where in the picture a word looks: mean over heads, `[cross-modal layer, S / patch, S / patch]`.

        Shares of the attention to all image tokens, of which the class token is left out.

        Args:
            image: A picture.
            text: A text with the word in it.
            word: As it stands in the text, without punctuation; or `<mask>`. Its tokens, and where it occurs more
                than once its occurrences, are averaged.

        Raises:
            ValueError: The word is not in the text; names those that are.
        """
        chosen = self.processor.places(text, word)
        ids, mask = self.tokens([text])
        model = self.task.model
        with watched(model.cross_modal_text_layers) as seen:
            model.fuse(model.encode_text(ids, mask), model.encode_image(self.pixels([image])), mask)
        maps = torch.stack([weights_BHLP[0, :, chosen, 1:].mean(dim=(0, 1)) for weights_BHLP in seen])
        side = round(maps.shape[-1] ** 0.5)
        return maps.view(-1, side, side).float()

    @property
    def contrastive(self) -> bool:
        """Whether `embed_images` and `embed_texts` share one space, so that their cosines mean something."""
        return has_contrastive_heads(self.task)

    @torch.no_grad()
    def embed_images(self, images: Pictures) -> Tensor:
        """Unit vectors `[B, E]` float32: of the contrastive head, or the tower's first token where there is none."""
        return image_embeddings(self.task, self.pixels(images))

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """As `embed_images`, of texts."""
        return text_embeddings(self.task, *self.tokens(texts))

    def need(self, ability: str) -> None:
        """Refuses what the model has no head for.

        Raises:
            ValueError: Names the task the model was trained for.
        """
        self.need_both_towers()
        heads = ABILITIES[ability]
        if not any(hasattr(self.task, head) for head in heads):
            raise ValueError(
                f"this model cannot {ability}: it was trained for task {self.config.task} and has no "
                f"{' or '.join(heads)}"
            )

    def need_both_towers(self) -> None:
        """Refuses a model of one tower, which is for `mt_deepspeed.evaluate` only.

        Raises:
            ValueError: Names the task it was trained for.
        """
        if self.config.task in TOWER_OF_TASK:
            raise ValueError(
                f"a model of task {self.config.task} is the {TOWER_OF_TASK[self.config.task]} tower alone: "
                "python -m mt_deepspeed.evaluate measures it, nothing else takes it"
            )
