"""From a planned micro-batch to tensors.

Letters: B samples of the micro-batch, F false images, S pixels per side, L tokens.

| key | shape, type | meaning |
|---|---|---|
| pixels | [B + F, 3, S, S] uint8 | the images of the samples, then the false images |
| text_ids, text_mask | [B, L] int64 | token ids; 1 token, 0 padding |
| mlm_ids, mlm_labels | [B, L] int64 | masked ids; true id where masked, -100 elsewhere (MLM on) |
| mlm_positions | [M] int64 | where labels are, in the flattened [B * L]; found here, as a GPU would stall (MLM on) |
| itm_image_index | [B] int64 | row of `pixels` that the text is matched with (ITM on) |
| itm_labels | [B] int64 | 1 the image of the text, 0 another one (ITM on) |
| sample_ids | [B] int64 | pair number in the corpus |

All randomness is keyed by (seed, stream position), so a sample looks the same wherever it is made.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mt_deepspeed.data.corpus import Corpus, Sample
from mt_deepspeed.data.images import decode_image
from mt_deepspeed.data.order import Purpose, keyed_coins, keyed_generator
from mt_deepspeed.data.shards import ShardReadError
from mt_deepspeed.data.text import IGNORED, CaptionTokenizer, EncodedText
from mt_deepspeed.data.transforms import ImageTransform

Batch = dict[str, Tensor]
Negatives = Literal["dataset", "in_batch"]
_Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class MicroBatch:
    """A planned micro-batch: stream positions [B] and the pairs [B] that stand there."""

    positions: _Int64
    samples: _Int64


@dataclass(frozen=True, kw_only=True)
class BatchMaker:
    """Makes the tensors of planned micro-batches; a pure function of the plan, fit for threads and processes.

    Attributes:
        corpus: Where pairs and images come from.
        tokenizer: Cuts texts to its `max_text_len`.
        transform: Brings images to S x S.
        seed: Key of all randomness.
        pad_to: L; None: the longest text of the micro-batch.
        mlm_probability: Chance of a word, or token, to be masked; None: no MLM.
        whole_words: Mask whole words.
        negatives: Where images that do not match come from; None: no ITM.
    """

    corpus: Corpus
    tokenizer: CaptionTokenizer
    transform: ImageTransform
    seed: int
    pad_to: int | None
    mlm_probability: float | None
    whole_words: bool
    negatives: Negatives | None

    def __call__(self, plan: MicroBatch) -> Batch:
        """Reads, decodes and collates.

        Raises:
            ShardReadError: A sample that cannot be read; names file, row and reason.
        """
        positions = plan.positions.tolist()
        samples = [self.corpus.sample(index) for index in plan.samples.tolist()]
        texts = [self.tokenizer.encode(sample.caption) for sample in samples]
        batch = self._text_tensors(texts, positions)
        images = [(s.dataset, s.row, p, Purpose.IMAGE) for s, p in zip(samples, positions, strict=True)]
        if self.negatives is not None:
            labels_B = match_labels(self.seed, plan.positions)
            index_B = np.arange(len(samples))
            if self.negatives == "in_batch":
                self._swap_in_batch(samples, positions, labels_B, index_B)
            else:
                images += self._false_images(samples, positions, labels_B, index_B)
            batch |= {"itm_image_index": torch.from_numpy(index_B), "itm_labels": torch.from_numpy(labels_B)}
        size = self.transform.size
        pixels = torch.empty(len(images), 3, size, size, dtype=torch.uint8)
        for out, (dataset, row, position, purpose) in zip(pixels, images, strict=True):
            out.copy_(self.picture(dataset, row, keyed_generator(self.seed, position, purpose)))
        return {"pixels": pixels, **batch, "sample_ids": torch.from_numpy(plan.samples.copy())}

    def _text_tensors(self, texts: Sequence[EncodedText], positions: Sequence[int]) -> Batch:
        length = self.pad_to or max((len(text.ids) for text in texts), default=1)
        batch = {
            "text_ids": pad([text.ids for text in texts], length, self.tokenizer.pad_id),
            "text_mask": pad([np.ones_like(text.ids) for text in texts], length, 0),
        }
        if self.mlm_probability is not None:
            masked = [
                self.tokenizer.mask(
                    text,
                    keyed_generator(self.seed, position, Purpose.MASK),
                    self.mlm_probability,
                    self.whole_words,
                )
                for text, position in zip(texts, positions, strict=True)
            ]
            batch["mlm_ids"] = pad([ids for ids, _ in masked], length, self.tokenizer.pad_id)
            batch["mlm_labels"] = pad([labels for _, labels in masked], length, IGNORED)
            batch["mlm_positions"] = (batch["mlm_labels"].flatten() != IGNORED).nonzero()[:, 0]
        return batch

    def _false_images(
        self, samples: Sequence[Sample], positions: Sequence[int], labels_B: _Int64, index_B: _Int64
    ) -> list[tuple[int, int, int, Purpose]]:
        """Draws another image of the same data set for every row that must not match; sets `index_B`."""
        images: list[tuple[int, int, int, Purpose]] = []
        for i in np.flatnonzero(labels_B == 0).tolist():
            generator = keyed_generator(self.seed, positions[i], Purpose.NEGATIVE)
            own = samples[i]
            row = int(generator.integers(self.corpus.datasets[own.dataset].num_rows - 1))
            index_B[i] = len(samples) + len(images)
            images.append((own.dataset, row + (row >= own.row), positions[i], Purpose.FALSE_IMAGE))
        return images

    def _swap_in_batch(
        self, samples: Sequence[Sample], positions: Sequence[int], labels_B: _Int64, index_B: _Int64
    ) -> None:
        """Points rows that must not match to another image of the micro-batch; sets `index_B`.

        Where all rows show the same image there is no other: the row then counts as matched.
        """
        for i in np.flatnonzero(labels_B == 0).tolist():
            own = samples[i]
            others = [j for j, s in enumerate(samples) if (s.dataset, s.row) != (own.dataset, own.row)]
            if others:
                generator = keyed_generator(self.seed, positions[i], Purpose.NEGATIVE)
                index_B[i] = others[int(generator.integers(len(others)))]
            else:
                labels_B[i] = 1

    def picture(self, dataset: int, row: int, generator: np.random.Generator, number: int = 0) -> Tensor:
        """Image `number` of a row, decoded and transformed: `[3, S, S]` uint8.

        Raises:
            ShardReadError: It cannot be decoded; names file, row and reason.
        """
        image = self.corpus.image(dataset, row, number)
        try:
            return self.transform(decode_image(image.data), generator)
        except ValueError as error:
            raise ShardReadError(f"{image.where}: {error}") from error


def match_labels(seed: int, positions_B: _Int64) -> _Int64:
    """ITM labels [B]: of the positions 2k and 2k + 1 one matches, by a keyed coin."""
    coins_B = keyed_coins(seed, positions_B // 2, Purpose.MATCH)
    return (coins_B ^ (positions_B % 2 == 1)).astype(np.int64)


def pad(rows: Sequence[_Int64], length: int, value: int) -> Tensor:
    """Rows of at most `length` numbers as [B, length] int64, filled up with `value`."""
    out = torch.full((len(rows), length), value, dtype=torch.int64)
    for target, row in zip(out, rows, strict=True):
        target[: len(row)] = torch.from_numpy(row)
    return out
