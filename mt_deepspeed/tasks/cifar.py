"""Which class does a picture show? (CIFAR-10, CIFAR-100): a probe of the vision tower alone, as BridgeTower has it.

Shapes: B samples, C classes.
"""

import torch
from torch import Tensor, nn

from mt_deepspeed.config import RunConfig
from mt_deepspeed.models.flops import vision_flops
from mt_deepspeed.models.partition import init_weights
from mt_deepspeed.models.single_tower import VisionOnly
from mt_deepspeed.tasks.classification import Batch, ClassificationTask
from mt_deepspeed.tasks.noise import noise_pixels


class CifarTask(ClassificationTask):
    """A linear map of the last layer's class token, after `ln_post`.

    The published code leaves the map out of its optimizer, so that it stays as it was drawn; here it is trained.
    """

    head_name, loss_name = "cifar_classifier", "cifar"
    model: VisionOnly

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config, VisionOnly(config.model))
        self.num_classes = config.classifier.num_answers
        self.cifar_classifier = nn.Linear(config.model.vision.width, self.num_classes)
        init_weights(self.cifar_classifier, config.model.init_std)

    def logits(self, batch: Batch) -> Tensor:
        """`[B, C]` of a batch with `pixels`."""
        logits: Tensor = self.cifar_classifier(self.model.encode_image(batch["pixels"])[-1][:, 0])
        return logits

    def fake_batch(self, samples: int, text_len: int) -> Batch:
        """See `PretrainTask.fake_batch`; there are no texts."""
        return {
            "pixels": noise_pixels(self.model.config, samples),
            "labels": torch.randint(self.num_classes, (samples,)),
            "sample_ids": torch.arange(samples),
            "dataset_ids": torch.zeros(samples, dtype=torch.int64),
        }

    def flops_per_sample(self, text_len: int | None = None) -> float:
        """Floating-point operations of forward and backward per sample."""
        return 3 * vision_flops(self.model.config)
