"""Two-tower vision-language models: ManagerTower, BridgeTower and their parts."""

from mt_deepspeed.models.heads import attach_heads
from mt_deepspeed.models.two_tower import FusionOutput, TwoTowerModel

__all__ = ["FusionOutput", "TwoTowerModel", "attach_heads"]
