"""Pre-training with `transformers`' BridgeTower: the same two objectives as a task for the engine.

Each objective is a pass of its own, as the library's heads are separate models; its attention is the eager one,
since its SDPA path (5.x) makes the image stream's self-attention causal.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BridgeTowerConfig, BridgeTowerForImageAndTextRetrieval, BridgeTowerForMaskedLM

from mt_deepspeed.config import ModelConfig
from mt_deepspeed.models.key_maps import own_name, plain_name
from mt_deepspeed.models.vision_tower import normalise
from mt_deepspeed.tasks.pretrain import PretrainTask

LAYOUT = "hf_bridgetower"


class LibraryTask(nn.Module):
    """A task (`mt_deepspeed.engine.protocols`) around the library's model, in the sizes of `config`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        text, vision, cross = config.text, config.vision, config.cross_modal
        if vision.num_heads != vision.width // 64:
            raise ValueError(
                f"model.vision.num_heads: found {vision.num_heads}, the library always takes width / 64 = "
                f"{vision.width // 64}"
            )
        sizes = BridgeTowerConfig(
            hidden_size=cross.hidden_size,
            num_hidden_layers=cross.num_layers,
            num_attention_heads=cross.num_heads,
            hidden_dropout_prob=cross.dropout,
            attention_probs_dropout_prob=cross.dropout,
            layer_norm_eps=cross.layer_norm_eps,
            text_config={
                "vocab_size": text.vocab_size,
                "hidden_size": text.hidden_size,
                "num_hidden_layers": text.num_layers,
                "num_attention_heads": text.num_heads,
                "intermediate_size": text.intermediate_size,
                "max_position_embeddings": text.max_positions,
                "hidden_dropout_prob": text.dropout,
                "attention_probs_dropout_prob": text.dropout,
                "layer_norm_eps": text.layer_norm_eps,
            },
            vision_config={
                "hidden_size": vision.width,
                "num_hidden_layers": vision.num_layers,
                "patch_size": vision.patch_size,
                "image_size": vision.image_size,
                "layer_norm_eps": vision.layer_norm_eps,
            },
            attn_implementation="eager",
        )
        library = BridgeTowerForMaskedLM(sizes)
        self.bridgetower, self.mlm_score = library.bridgetower, library.mlm_score
        self.itm_score = BridgeTowerForImageAndTextRetrieval(sizes).itm_score
        self.loss_weights = {"mlm": 1.0, "itm": 1.0}

    def take_weights(self, ours: PretrainTask) -> None:
        """Copies the weights of our BridgeTower."""
        weights = {plain_name(name): parameter for name, parameter in ours.named_parameters()}
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                found = weights.get(own_name(name, LAYOUT))
                if found is not None:
                    parameter.copy_(found.reshape(parameter.shape))
                else:  # the library's poolers that nothing calls
                    parameter.requires_grad_(False)

    def forward(self, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Losses, and an empty report."""
        pixels, mask = normalise(batch["pixels"]), batch["text_mask"]
        seen = self.bridgetower(batch["mlm_ids"], mask, pixel_values=pixels[: len(mask)])
        logits = self.mlm_score(seen.text_features)
        mlm = F.cross_entropy(logits.flatten(0, 1).float(), batch["mlm_labels"].flatten())
        seen = self.bridgetower(batch["text_ids"], mask, pixel_values=pixels[batch["itm_image_index"]])
        itm = F.cross_entropy(self.itm_score(seen.pooler_output).float(), batch["itm_labels"])
        return {"mlm": mlm, "itm": itm}, {}

    def loss_counts(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Masked tokens and pairs."""
        return {
            "mlm": (batch["mlm_labels"] != -100).sum(),
            "itm": torch.tensor(len(batch["itm_labels"])),
        }

    def parameter_role(self, name: str) -> str:
        """One role: all learning rates are equal here."""
        return "tower"
