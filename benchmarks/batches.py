"""Pre-training batches of random tokens and pixels, for benchmarks that need no data."""

import torch
from torch import Tensor

from mt_deepspeed.config import RunConfig

CAPTION_TOKENS = (9, 16)
"""Fewest and most tokens of a made caption: COCO's captions have about 13, special tokens included."""


def make_batch(
    config: RunConfig, batch_size: int, seed: int = 0, text_tokens: int | None = None
) -> dict[str, Tensor]:
    """A micro-batch as `mt_deepspeed.data` makes it: half of the ITM pairs show a false picture of their own.

    Args:
        config: Sizes of model and objectives.
        batch_size: Samples.
        seed: Of all random numbers.
        text_tokens: Tokens of every text, without padding; None: captions of 9 to 16 tokens, padded to the longest.
    """
    generator = torch.Generator().manual_seed(seed)
    low, high = (text_tokens, text_tokens) if text_tokens else CAPTION_TOKENS
    lengths = torch.randint(low, high + 1, (batch_size,), generator=generator)
    lengths[0] = high
    vocab, pad = config.model.text.vocab_size, config.model.text.pad_token_id
    mask = (torch.arange(high) < lengths[:, None]).long()
    ids = torch.randint(5, vocab, (batch_size, high), generator=generator)
    ids = torch.where(mask.bool(), ids, pad)
    chosen = torch.rand(batch_size, high, generator=generator) < config.objectives.mlm_probability
    chosen[:, 1] = True
    chosen &= mask.bool()
    side = config.model.vision.image_size
    labels = (torch.arange(batch_size) % 2).long()
    index = torch.arange(batch_size)
    index[labels == 0] = batch_size + torch.arange(int((labels == 0).sum()))
    pixels = torch.randint(0, 256, (batch_size + len(index[labels == 0]), 3, side, side), generator=generator)
    return {
        "pixels": pixels.to(torch.uint8),
        "text_ids": ids,
        "text_mask": mask,
        "mlm_ids": torch.where(chosen, 4, ids),
        "mlm_labels": torch.where(chosen, ids, -100),
        "mlm_positions": chosen.flatten().nonzero()[:, 0],
        "itm_image_index": index,
        "itm_labels": labels,
        "sample_ids": torch.arange(batch_size),
    }
