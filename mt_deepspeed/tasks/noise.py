"""Batches of noise with the shapes and value ranges of real ones, to plan with and to try a run on.

Nothing here looks at values: a plan makes these batches on tensors that have none.
"""

import torch
from torch import Tensor

from mt_deepspeed.config import ModelConfig


def noise_batch(model: ModelConfig, samples: int, text_len: int, images: int) -> dict[str, Tensor]:
    """What the batches of all two-tower tasks hold: `pixels [images, 3, S, S]`, `text_ids`, `text_mask`, `sample_ids`.

    Args:
        model: Gives image size and vocabulary.
        samples: B.
        text_len: L; every text is that long.
        images: Pictures of the batch.
    """
    ids_BL = noise_ids(model, samples, text_len)
    return {
        "pixels": noise_pixels(model, images),
        "text_ids": ids_BL,
        "text_mask": torch.ones_like(ids_BL),
        "sample_ids": torch.arange(samples),
    }


def noise_pixels(model: ModelConfig, images: int) -> Tensor:
    """Pictures of the model's size, uint8."""
    side = model.vision.image_size
    return torch.randint(256, (images, 3, side, side), dtype=torch.uint8)


def noise_ids(model: ModelConfig, *shape: int) -> Tensor:
    """Tokens that are no padding."""
    return torch.randint(model.text.pad_token_id + 1, model.text.vocab_size, shape)


def noise_matching(samples: int, false_images: int) -> dict[str, Tensor]:
    """`itm_image_index`, `itm_labels` `[B]`: the first half does not match.

    Args:
        samples: B.
        false_images: Pictures behind the B true ones, which the first samples are paired with.
    """
    index_B = torch.arange(samples)
    index_B[:false_images] += samples
    labels_B = torch.ones(samples, dtype=torch.int64)
    labels_B[: samples // 2] = 0
    return {"itm_image_index": index_B, "itm_labels": labels_B}
