"""ManagerTower and its family, pre-trained with DeepSpeed."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mt_deepspeed.pretrained import Pretrained


def load(folder: str | Path, device: str = "cpu") -> "Pretrained":
    """Loads an exported model or a run folder; see `mt_deepspeed.pretrained.load`."""
    from mt_deepspeed.pretrained import load as load_pretrained  # torch takes seconds to import

    return load_pretrained(folder, device)
