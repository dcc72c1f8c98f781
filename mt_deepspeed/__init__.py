"""ManagerTower and its family, pre-trained with DeepSpeed.

`ManagerTower.from_pretrained(folder)` and `load(folder)` are the same and give a model of any kind with its
processor; see `mt_deepspeed.pretrained.model.Pretrained`.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mt_deepspeed.pretrained.model import Pretrained
    from mt_deepspeed.pretrained.model import Pretrained as ManagerTower

__all__ = ["ManagerTower", "load"]


def load(folder: str | Path, device: str = "cpu") -> "Pretrained":
    """Loads an exported model or a run folder; see `mt_deepspeed.pretrained.loading.load`."""
    from mt_deepspeed.pretrained.loading import load as load_pretrained  # torch takes seconds to import

    return load_pretrained(folder, device)


def __getattr__(name: str) -> Any:
    if name == "ManagerTower":
        from mt_deepspeed.pretrained.model import Pretrained

        return Pretrained
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
