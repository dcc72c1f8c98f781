"""What the heads of a task make of encoded pictures and texts; no gradient, evaluation mode.

Shapes: B rows, T texts, I images, L text tokens, P image tokens, S pixels a side, D width, E embedding.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mt_deepspeed.tasks.retrieval import match_scores


def outputs(task: Any, text_ids: Tensor, text_mask: Tensor, pixels: Tensor) -> dict[str, Tensor]:
    """`text_feats [B,L,D]`, `image_feats [B,P,D]`, `cls_feats [B,2D]`, and the logits of each head by its name.

    NLVR2 takes 2B pictures, first ones first, and gives its logits only, as do models of one tower. Contrastive
    heads give unit vectors `[B, E]`.

    Args:
        task: A two-tower model as `model` with its heads beside it.
        text_ids: `[B, L]` int64.
        text_mask: 1 where a token is, 0 at padding.
        pixels: `[B, 3, S, S]`, uint8, or float and normalised.
    """
    batch = {"text_ids": text_ids, "text_mask": text_mask, "pixels": pixels}
    for name in ("cifar_classifier", "glue_classifier"):  # one tower, which reads its part
        if hasattr(task, name):
            return {name: task.logits(batch)}
    if hasattr(task, "nlvr2_classifier"):
        return {"nlvr2_classifier": task.logits(batch)}
    model = task.model
    text, image = model.encode_text(text_ids, text_mask), model.encode_image(pixels)
    fused = model.fuse(text, image, text_mask)
    found: dict[str, Tensor] = fused._asdict()
    if hasattr(task, "mlm_score"):
        found["mlm_score"] = task.mlm_score(fused.text_feats)
    for name in ("itm_score", "rank_output", "vqa_classifier", "snli_classifier", "itc_cross_modal_head"):
        if hasattr(task, name):
            found[name] = getattr(task, name)(fused.cls_feats)
    if has_contrastive_heads(task):
        found["text_embeddings"] = _embedded(task, "text", text)
        found["image_embeddings"] = _embedded(task, "image", image)
    return found


def pair_scores(task: Any, text_ids: Tensor, text_mask: Tensor, pixels: Tensor) -> Tensor:
    """How well text and picture of each row fit, `[B]` float32: see `Pretrained.scores`."""
    if _matches_by_cosine(task):
        return (text_embeddings(task, text_ids, text_mask) * image_embeddings(task, pixels)).sum(dim=-1)
    return _fused_scores(task, task.model(text_ids, text_mask, pixels).cls_feats)


def all_pair_scores(task: Any, text_ids: Tensor, text_mask: Tensor, pixels: Tensor) -> Tensor:
    """The same for each text with each picture, `[T, I]`; every text and picture passes its tower once."""
    if _matches_by_cosine(task):
        return text_embeddings(task, text_ids, text_mask) @ image_embeddings(task, pixels).T
    model = task.model
    images = model.image_experts(model.encode_image(pixels))
    rows = []
    for ids_L, mask_L in zip(text_ids, text_mask, strict=True):
        texts = model.text_experts(model.encode_text(ids_L[None], mask_L[None]))
        repeated = [expert.expand(len(pixels), -1, -1) for expert in texts]
        fused = model.fuse_experts(repeated, images, mask_L.expand(len(pixels), -1), pooled_from=0)
        rows.append(_fused_scores(task, fused.cls_feats))
    return torch.stack(rows)


def has_contrastive_heads(task: Any) -> bool:
    """Whether texts and pictures have embeddings in one space."""
    return hasattr(task, "cross_modal_itc_text_head") or hasattr(task, "itc_text_head")


def text_embeddings(task: Any, text_ids: Tensor, text_mask: Tensor) -> Tensor:
    """Unit vectors `[T, E]` float32, contrastive where the task has such heads, else the tower's first token."""
    return _embedded(task, "text", task.model.encode_text(text_ids, text_mask))


def image_embeddings(task: Any, pixels: Tensor) -> Tensor:
    """As `text_embeddings`, of pictures."""
    return _embedded(task, "image", task.model.encode_image(pixels))


def _embedded(task: Any, modality: str, states: list[Tensor]) -> Tensor:
    vector: Tensor
    if hasattr(task, "cross_modal_itc_text_head"):
        vector = getattr(task, f"cross_modal_itc_{modality}_head")(states[-1][:, 0])
    elif hasattr(task, "itc_text_head"):
        # The library's port embeds the text as its tower leaves it, and the picture after projection.
        last = states[-1] if modality == "text" else task.model.image_experts(states)[-1]
        vector = getattr(task, f"itc_{modality}_head")(last[:, 0])
    else:
        vector = F.normalize(states[-1][:, 0].float(), dim=-1)
    return vector.float()


def _matches_by_cosine(task: Any) -> bool:
    return not (hasattr(task, "itm_score") or hasattr(task, "rank_output"))


def _fused_scores(task: Any, cls_feats: Tensor) -> Tensor:
    if hasattr(task, "rank_output"):
        return match_scores(task, cls_feats).float()
    probability: Tensor = task.itm_score(cls_feats).float().softmax(dim=-1)[:, 1]
    return probability
