"""ManagerTower and its family, pre-trained with DeepSpeed."""
