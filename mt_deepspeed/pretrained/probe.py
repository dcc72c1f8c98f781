"""Fixed random input on which exported models are compared."""

import torch
from torch import Tensor

from mt_deepspeed.pretrained.model import Pretrained


def probe(pretrained: Pretrained) -> dict[str, Tensor]:
    """Two texts of random tokens and as many random pictures as the task takes for them."""
    generator = torch.Generator().manual_seed(0)
    model, data = pretrained.config.model, pretrained.config.data
    length = min(8, data.max_text_len)
    ids = torch.randint(4, model.text.vocab_size, (2, length), generator=generator)
    mask = torch.ones_like(ids)
    if data.padding == "longest":  # then padding must not matter, so that it may be there
        ids[1, length // 2 :], mask[1, length // 2 :] = model.text.pad_token_id, 0
    side, images = model.vision.image_size, 4 if pretrained.config.task == "nlvr2" else 2
    return {
        "text_ids": ids,
        "text_mask": mask,
        "pixels": torch.randn(images, 3, side, side, generator=generator),
    }
