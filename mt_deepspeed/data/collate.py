"""From a planned micro-batch to tensors.

Letters: B samples of the micro-batch, F false images, S pixels per side, L tokens.

| key | shape, type | meaning |
|---|---|---|
| pixels | [B + F, 3, S, S] uint8 | the images of the samples, then the false images; or B first, then B second ones |
| text_ids, text_mask | [B, L] int64 | token ids; 1 token, 0 padding |
| mlm_ids, mlm_labels | [B, L] int64 | masked ids; true id where masked, -100 elsewhere (MLM on) |
| mlm_positions | [M] int64 | where labels are, in the flattened [B * L]; found here, as a GPU would stall (MLM on) |
| itm_image_index | [B] int64 | row of `pixels` that the text is matched with (ITM on) |
| itm_labels | [B] int64 | 1 the image of the text, 0 another one (ITM on) |
| sample_ids | [B] int64 | pair number in the corpus |

Tasks of one tower have either `pixels` or texts.

All randomness is keyed by (seed, stream position), so a sample looks the same wherever it is made.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mt_deepspeed.data.corpus import Corpus, Sample
from mt_deepspeed.data.images import decode_image
from mt_deepspeed.data.keyed import Purpose, keyed_bits, keyed_generator
from mt_deepspeed.data.shards import EncodedImage, ShardReadError
from mt_deepspeed.data.skipped import Skipped
from mt_deepspeed.data.text import IGNORED, CaptionTokenizer
from mt_deepspeed.data.transforms import ImageTransform

Batch = dict[str, Tensor]
Made = tuple[Batch, list[Skipped]]
"""A batch, and what was skipped for it."""
Negatives = Literal["dataset", "in_batch"]
_Int64 = NDArray[np.int64]

REPLACEMENTS = 10
"""Samples tried in the place of one that cannot be read before the run gives up."""
_SPARE = {Purpose.IMAGE: Purpose.SPARE, Purpose.FALSE_IMAGE: Purpose.FALSE_SPARE}


@dataclass(frozen=True)
class MicroBatch:
    """A planned micro-batch.

    Attributes:
        positions: [B] stream positions.
        pairs: [B] pairs that stand there.
        others: [B] pairs of the same data sets, whose images serve where one must not match.
        blocks: [B] first pairs of the blocks that the pairs are read in (see `shuffle`).
    """

    positions: _Int64
    pairs: _Int64
    others: _Int64
    blocks: _Int64


@dataclass(frozen=True, kw_only=True)
class BatchMaker:
    """Makes the tensors of planned micro-batches; a pure function of the plan, fit for threads and processes.

    Attributes:
        corpus: Where pairs and images come from.
        tokenizer: Cuts texts to its `max_text_len`; None: texts are not read.
        transform: Brings images to S x S.
        seed: Key of all randomness.
        pad_to: L; None: the longest text of the micro-batch.
        mlm_probability: Chance of a word, or token, to be masked; None: no MLM.
        whole_words: Mask whole words.
        negatives: Where images that do not match come from; None: no ITM.
        num_images: Images of a sample: 1; 2 or 0 (without ITM).
        second_text: List column of what is encoded behind a text, as a pair, where it is not empty; None: none.
        skip_bad: Put another pair in the place of one that cannot be read, and tell.
    """

    corpus: Corpus
    tokenizer: CaptionTokenizer | None
    transform: ImageTransform
    seed: int
    pad_to: int | None
    mlm_probability: float | None
    whole_words: bool
    negatives: Negatives | None
    num_images: int
    skip_bad: bool
    second_text: str | None = None

    def __call__(self, plan: MicroBatch) -> Made:
        """Reads, decodes and collates; also returns what was skipped.

        Raises:
            ShardReadError: A sample that cannot be read; names file, row and reason.
        """
        positions, skipped = plan.positions.tolist(), list[Skipped]()
        labels_B, index_B = match_labels(self.seed, plan.positions), np.arange(len(positions))
        false = np.flatnonzero(labels_B == 0).tolist() if self.negatives == "dataset" else []
        index_B[false] = len(positions) + np.arange(len(false))
        # Every picture is put straight into its place.
        count, size = len(positions), self.transform.size
        pixels = torch.empty(self.num_images * count + len(false), 3, size, size, dtype=torch.uint8)
        true_pixels, false_pixels = pixels[: self.num_images * count], pixels[self.num_images * count :]
        samples = [
            self._read(position, pair, Purpose.IMAGE, None, true_pixels[i::count], skipped)
            for i, (position, pair) in enumerate(zip(positions, plan.pairs.tolist(), strict=True))
        ]
        for i, out in zip(false, false_pixels, strict=True):
            self._read(positions[i], int(plan.others[i]), Purpose.FALSE_IMAGE, samples[i], out[None], skipped)
        batch = {"pixels": pixels} if self.num_images else {}
        if self.tokenizer is not None:
            batch |= self._text_tensors(self.tokenizer, samples, positions)
        if self.negatives == "in_batch":
            self._swap_in_batch(samples, positions, labels_B, index_B)
        if self.negatives is not None:
            batch |= {"itm_image_index": torch.from_numpy(index_B), "itm_labels": torch.from_numpy(labels_B)}
        batch["sample_ids"] = torch.tensor([sample.pair for sample in samples], dtype=torch.int64)
        return batch, skipped

    def _read(
        self,
        position: int,
        pair: int,
        purpose: Purpose,
        apart_from: Sample | None,
        out: Tensor,
        skipped: list[Skipped],
    ) -> Sample:
        """Reads a pair and puts its images, or the next pair's if they are those of `apart_from`, into `out`."""
        fault: ShardReadError | None = None
        for candidate in self._candidates(position, pair, purpose):
            try:
                sample = self.corpus.sample(candidate)
                if apart_from is not None and sample.row == apart_from.row:
                    rows = self.corpus.datasets[sample.dataset].num_rows
                    sample = replace(sample, row=(sample.row + 1) % rows)
                for number, own in enumerate(out):
                    generator = keyed_generator(
                        self.seed, position, Purpose.SECOND_IMAGE if number else purpose
                    )
                    own.copy_(self.picture(sample.dataset, sample.row, generator, number))
            except ShardReadError as error:
                if not self.skip_bad:
                    raise
                fault = fault or error
                continue
            if fault is not None:
                skipped.append(Skipped(position, pair, sample.pair, str(fault)))
            return sample
        raise ShardReadError(f"{fault}; {REPLACEMENTS} other samples could not be read either")

    def _candidates(self, position: int, pair: int, purpose: Purpose) -> Iterator[int]:
        """The pair, then others of its data set, drawn for this position."""
        yield pair
        first, last = self.corpus.range_of(pair)
        generator = keyed_generator(self.seed, position, _SPARE[purpose])
        yield from generator.integers(first, last, size=REPLACEMENTS).tolist()

    def _text_tensors(
        self, tokenizer: CaptionTokenizer, samples: Sequence[Sample], positions: Sequence[int]
    ) -> Batch:
        texts = [tokenizer.encode(sample.caption, self._second(sample)) for sample in samples]
        length = self.pad_to or max((len(text.ids) for text in texts), default=1)
        ids_BL, mask_BL = tokens_and_mask([text.ids for text in texts], length, tokenizer.pad_id)
        batch = {"text_ids": ids_BL, "text_mask": mask_BL}
        if self.mlm_probability is not None:
            masked = [
                tokenizer.mask(
                    text,
                    keyed_generator(self.seed, position, Purpose.MASK),
                    self.mlm_probability,
                    self.whole_words,
                )
                for text, position in zip(texts, positions, strict=True)
            ]
            batch["mlm_ids"] = pad([ids for ids, _ in masked], length, tokenizer.pad_id)
            batch["mlm_labels"] = pad([labels for _, labels in masked], length, IGNORED)
            batch["mlm_positions"] = (batch["mlm_labels"].flatten() != IGNORED).nonzero()[:, 0]
        return batch

    def _second(self, sample: Sample) -> str | None:
        if self.second_text is None:
            return None
        return self.corpus.annotations(sample.pair)[self.second_text] or None

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
            return self.transform(decode_image(image.data, self._decoded_side(image)), generator)
        except ValueError as error:
            raise ShardReadError(f"{image.where}: {error}") from error

    def _decoded_side(self, image: EncodedImage) -> int | None:
        """What to ask the decoder for: nothing where the picture is too small to be decoded smaller."""
        side = self.transform.smallest_side
        return side if side is not None and min(image.width, image.height) >= 2 * side else None


def match_labels(seed: int, positions_B: _Int64) -> _Int64:
    """ITM labels [B]: of the positions 2k and 2k + 1 one matches, by a keyed coin."""
    coins_B = (keyed_bits(seed, positions_B // 2, Purpose.MATCH) >> np.uint64(63)).astype(np.int64)
    return coins_B ^ (positions_B % 2)


def tokens_and_mask(rows: Sequence[_Int64], length: int, pad_id: int) -> tuple[Tensor, Tensor]:
    """Token rows as [B, length] int64, and their mask: 1 at tokens, 0 at padding."""
    return pad(rows, length, pad_id), pad([np.ones_like(row) for row in rows], length, 0)


def pad(rows: Sequence[_Int64], length: int, value: int) -> Tensor:
    """Rows of at most `length` numbers as [B, length] int64, filled up with `value`."""
    out = torch.full((len(rows), length), value, dtype=torch.int64)
    for target, row in zip(out, rows, strict=True):
        target[: len(row)] = torch.from_numpy(row)
    return out
