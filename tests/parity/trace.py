"""Intermediate results of one forward pass under the names of the reference cases."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from mt_deepspeed.models import FusionOutput, TwoTowerModel

Tensors = dict[str, Tensor]


def forward(model: TwoTowerModel, ids: Tensor, mask: Tensor, pixels: Tensor, token_type: int = 1) -> Tensors:
    """Runs towers and fusion; returns everything on the way, and the features with their graph."""
    seen: Tensors = {}
    handles = [module.register_forward_hook(hook) for module, hook in _hooks(model, seen)]
    try:
        text, image = model.encode_text(ids, mask), model.encode_image(pixels)
        output = model.fuse(text, image, mask, token_type, record=seen)
    finally:
        for handle in handles:
            handle.remove()
    seen["text.last_state"], seen["image.last_state"] = text[-1], image[-1]
    seen["image.last_expert"] = model.image_experts(image, token_type)[-1]
    seen.update(features(output))
    return seen


def features(output: FusionOutput) -> Tensors:
    return {
        "text_feats": output.text_feats,
        "image_feats": output.image_feats,
        "cls_feats": output.cls_feats,
    }


def _hooks(model: TwoTowerModel, seen: Tensors) -> list[tuple[nn.Module, Callable[..., None]]]:
    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, result: Tensor) -> None:
            seen[name] = result.detach()

        return hook

    def keep_each(prefix: str, first: int) -> Callable[..., None]:
        calls: list[int] = []

        def hook(module: nn.Module, args: Any, result: Tensor) -> None:
            # Projections add an embedding in the same call; the reference case has them without it.
            seen[f"{prefix}.{first + len(calls)}"] = (result - sum(args[1:])).detach()
            calls.append(0)

        return hook

    text: Any = model.text_transformer
    visual: Any = model.vit_model.visual
    blocks = visual.transformer.resblocks
    hooks: list[tuple[nn.Module, Callable[..., None]]] = [
        (text.embeddings, keep("text.embeddings")),
        (visual.ln_pre, keep("image.pre")),
        (visual.ln_post, keep_each("image.post", len(blocks) - model.config.num_image_states)),
    ]
    hooks += [(layer, keep(f"text.layer.{k}")) for k, layer in enumerate(text.encoder.layer)]
    hooks += [(block, keep(f"image.layer.{k}")) for k, block in enumerate(blocks)]
    for modality in ("text", "image"):
        transform = getattr(model, f"cross_modal_{modality}_transform")
        if isinstance(transform, nn.ModuleList):
            hooks += [(part, keep_each(f"transform.{modality}", i)) for i, part in enumerate(transform)]
        else:
            hooks.append((transform, keep_each(f"transform.{modality}", 0)))
        for i, layer in enumerate(getattr(model, f"cross_modal_{modality}_layers")):
            hooks += [(layer.attention, keep(f"cross.{modality}.{i}.self_attention"))]
            hooks += [(layer.crossattention, keep(f"cross.{modality}.{i}.cross_attention"))]
    return hooks
