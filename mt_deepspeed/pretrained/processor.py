"""Pictures and texts to what a model takes."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mt_deepspeed.config import DataConfig
from mt_deepspeed.data.collate import tokens_and_mask
from mt_deepspeed.data.images import decode_image, from_pillow
from mt_deepspeed.data.text import MASK_TOKEN, CaptionTokenizer
from mt_deepspeed.data.transforms import ImageTransform

Picture = str | Path | Image.Image
"""A picture or its file."""


class Processor:
    """Tokenizer and evaluation transform of a model: `model(**model.processor(pictures, texts))`.

    Args:
        data: Evaluation transform, padding and text length.
        image_size: S, pixels per side.
        tokenizer: Reads `<mask>` in a text as the mask token; None: the model reads no texts.
    """

    def __init__(self, data: DataConfig, image_size: int, tokenizer: CaptionTokenizer | None) -> None:
        self._tokenizer = tokenizer
        self.padding, self.max_text_len = data.padding, data.max_text_len
        self.transform = ImageTransform(data.eval_transform, image_size, train=False)

    @property
    def tokenizer(self) -> CaptionTokenizer:
        """Texts to token ids.

        Raises:
            ValueError: The model reads no texts.
        """
        if self._tokenizer is None:
            raise ValueError("this model reads no texts, it has no tokenizer")
        return self._tokenizer

    def __call__(self, images: Sequence[Picture], texts: Sequence[str]) -> dict[str, Tensor]:
        """`text_ids`, `text_mask` `[B, L]` and `pixels` `[B, 3, S, S]` (NLVR2: B left pictures, then B right)."""
        ids, mask = self.tokens(texts)
        return {"text_ids": ids, "text_mask": mask, "pixels": self.pixels(images)}

    def pixels(self, images: Sequence[Picture]) -> Tensor:
        """Pixels `[B, 3, S, S]` uint8.

        Raises:
            ValueError: A file is no image, or damaged; names it.
            OSError: A file cannot be read.
        """
        return torch.stack([self._one(image) for image in images])

    def _one(self, image: Picture) -> Tensor:
        generator = np.random.default_rng(0)  # evaluation transforms draw nothing from it
        if isinstance(image, Image.Image):
            return self.transform(from_pillow(image), generator)
        try:
            return self.transform(decode_image(np.fromfile(image, dtype=np.uint8)), generator)
        except ValueError as error:
            raise ValueError(f"{image}: {error}") from error

    def tokens(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask `[B, L]` (int64; 1 token, 0 padding), padded as in training."""
        encoded = [self.tokenizer.encode(text).ids for text in texts]
        longest = max(len(ids) for ids in encoded)
        length = self.max_text_len if self.padding == "max_length" else longest
        return tokens_and_mask(encoded, length, self.tokenizer.pad_id)

    def places(self, text: str, word: str) -> list[int]:
        """Numbers of the tokens that make up `word` in a text.

        Raises:
            ValueError: It is not there.
        """
        encoded = self.tokenizer.encode(text)
        numbers = range(int(encoded.words.max(initial=-1)) + 1)
        words = [self.tokenizer.decode(encoded.ids[encoded.words == n].tolist()).strip() for n in numbers]
        if word == MASK_TOKEN:
            chosen = encoded.ids == self.tokenizer.mask_id
        else:
            chosen = np.isin(encoded.words, [n for n in numbers if words[n] == word])
        if not chosen.any():
            raise ValueError(f"word {word!r}: not in the text, whose words are {', '.join(words)}")
        return [int(place) for place in np.flatnonzero(chosen)]
