"""Task heads, under the names of the published checkpoints.

Shapes: B batch, M masked positions, D hidden, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from mt_deepspeed.config.model import HeadsConfig, ModelConfig
from mt_deepspeed.models.partition import init_weights


class _Transform(nn.Module):
    """`LN(act(dense(x)))`."""

    def __init__(self, size: int, hidden_act: str, eps: float) -> None:
        super().__init__()
        self.dense = nn.Linear(size, size)
        self.activation = ACT2FN[hidden_act]
        self.LayerNorm = nn.LayerNorm(size, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = self.LayerNorm(self.activation(self.dense(x)))
        return normed


class MLMHead(nn.Module):
    """Vocabulary logits; the decoder is not tied to the word embeddings."""

    def __init__(self, size: int, vocab_size: int, hidden_act: str, eps: float) -> None:
        super().__init__()
        self.transform = _Transform(size, hidden_act, eps)
        self.decoder = nn.Linear(size, vocab_size, bias=False)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, feats: Tensor) -> Tensor:
        """`[..., D] -> [..., V]`; give it the masked positions only, `[M, D]`."""
        logits: Tensor = self.decoder(self.transform(feats)) + self.bias
        return logits


class LinearHead(nn.Module):
    """One linear map `fc`: matching and contrastive heads."""

    def __init__(self, in_size: int, out_size: int) -> None:
        super().__init__()
        self.fc = nn.Linear(in_size, out_size)

    def forward(self, feats: Tensor) -> Tensor:
        """`[B, in_size] -> [B, out_size]`."""
        logits: Tensor = self.fc(feats)
        return logits


class ContrastiveHead(LinearHead):
    """Unit-length embedding for contrastive learning."""

    def forward(self, feats: Tensor) -> Tensor:
        """`[B, in_size] -> [B, out_size]`, rows of length 1."""
        return F.normalize(super().forward(feats), dim=-1)


def classifier(in_size: int, hidden_size: int, num_classes: int, num_layers: int) -> nn.Sequential:
    """Linear-LN-GELU-Linear, or a single linear map for `num_layers` 1."""
    if num_layers == 1:
        return nn.Sequential(nn.Linear(in_size, num_classes))
    return nn.Sequential(
        nn.Linear(in_size, hidden_size),
        nn.LayerNorm(hidden_size),
        nn.GELU(),
        nn.Linear(hidden_size, num_classes),
    )


def attach_heads(parent: nn.Module, model: ModelConfig, heads: HeadsConfig) -> None:
    """Registers the wanted heads on `parent`, each under its published name.

    `mlm_score(text_feats)`, `itm_score(cls_feats)`, `rank_output(cls_feats)`, `vqa_classifier(cls_feats)`,
    `snli_classifier(cls_feats)`, `nlvr2_classifier([cls_feats of image 1, of image 2])`;
    contrastive: `cross_modal_itc_text_head(last text state[:, 0])`, `cross_modal_itc_image_head(last image
    state[:, 0])` and the parameter `temperature` `[1]`; of the Hugging Face port: `itc_text_head(last text
    state[:, 0])`, `itc_image_head(last image expert[:, 0])`, `itc_cross_modal_head(cls_feats)` and the
    parameter `logit_scale` `[1]`.
    """
    size = model.cross_modal.hidden_size
    hidden = int(2 * size * heads.classifier_scale)
    depth = heads.classifier_layers
    made: dict[str, nn.Module] = {}
    if heads.mlm:
        made["mlm_score"] = MLMHead(
            size, model.text.vocab_size, heads.mlm_hidden_act, heads.mlm_layer_norm_eps
        )
    if heads.itm:
        made["itm_score"] = LinearHead(2 * size, 2)
    if heads.itc_size is not None:
        made["cross_modal_itc_text_head"] = ContrastiveHead(model.text.hidden_size, heads.itc_size)
        made["cross_modal_itc_image_head"] = ContrastiveHead(model.vision.width, heads.itc_size)
        parent.temperature = nn.Parameter(torch.full((1,), heads.itc_temperature))
    if heads.fused_itc_size is not None:
        made["itc_text_head"] = ContrastiveHead(model.text.hidden_size, heads.fused_itc_size)
        made["itc_image_head"] = ContrastiveHead(size, heads.fused_itc_size)
        made["itc_cross_modal_head"] = ContrastiveHead(2 * size, heads.fused_itc_size)
        parent.logit_scale = nn.Parameter(torch.full((1,), 2.6592))  # ln(1 / 0.07), as CLIP
    if heads.rank:
        made["rank_output"] = nn.Linear(2 * size, 1)
    if heads.vqa_answers is not None:
        made["vqa_classifier"] = classifier(2 * size, hidden, heads.vqa_answers, depth)
    if heads.nlvr2:
        made["nlvr2_classifier"] = classifier(4 * size, hidden, 2, depth)
    if heads.snli_ve:
        made["snli_classifier"] = classifier(2 * size, hidden, 3, depth)
    for name, head in made.items():
        init_weights(head, model.init_std)
        parent.add_module(name, head)
