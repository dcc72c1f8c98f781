"""Computes every tensor that a reference case may hold, with the public parts of the package."""

import re
from typing import Any

import torch
from torch import Tensor

from mt_deepspeed.models.key_maps import own_name, plain_name
from mt_deepspeed.models.state_dicts import import_checkpoint
from mt_deepspeed.objectives.classification import cross_entropy, false_text_loss, vqa_loss
from mt_deepspeed.objectives.contrastive import contrastive_loss, three_way_contrastive_loss
from mt_deepspeed.objectives.hard_negatives import negative_weights
from mt_deepspeed.objectives.mlm import gather_labelled
from tests.parity.cases import Case, ModelWithHeads
from tests.parity.trace import Tensors, features, forward


def compute(case: Case) -> Tensors:
    """All tensors of the case that this package can compute, under the names of the reference cases."""
    module, _ = case.build()
    result: Tensors = {"loaded.positional_embedding": module.model.vit_model.visual.positional_embedding}
    losses = (
        _library_case(case, module, result) if case.from_library else _reference_case(case, module, result)
    )
    total = torch.stack(list(losses.values())).sum()
    total.backward()
    result["total_loss"] = total
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            result[f"grad.{plain_name(name)}"] = parameter.grad
            result[f"grad_norm.{plain_name(name)}"] = parameter.grad.norm()
    return {name: tensor.detach() for name, tensor in result.items()}


def own_key(case: Case, name: str) -> str:
    """The name under which `compute` returns the case's tensor `name`."""
    kind, _, parameter = name.partition(".")
    return f"{kind}.{own_name(parameter, case.layout)}" if kind in ("grad", "grad_norm") else name


def _prefixed(prefix: str, tensors: Tensors) -> Tensors:
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def _library_case(case: Case, module: Any, result: Tensors) -> Tensors:
    data, heads = case.inputs, case.setup.heads
    ids, mask = data["input_ids"], data["attention_mask"]
    losses: Tensors = {}
    for prefix, key in (("", "pixel_values"), ("nonsquare", "pixel_values_nonsquare")):
        if key not in data:
            continue
        seen = forward(module.model, ids, mask, data[key])
        if heads.mlm:
            seen["mlm.logits"] = module.mlm_score(seen["text_feats"])
            feats, labels = gather_labelled(seen["text_feats"], data["labels"])
            seen["mlm.loss"] = cross_entropy(module.mlm_score(feats), labels)
        if heads.itm:
            seen["itm.logits"] = module.itm_score(seen["cls_feats"])
            seen["itm.loss"] = cross_entropy(seen["itm.logits"], data["labels"])
        if heads.fused_itc_size:
            _library_contrastive(module, seen)
        if prefix:
            result.update(_prefixed(prefix, seen))
        else:
            losses = {name: tensor for name, tensor in seen.items() if name.endswith(".loss")}
            result.update(seen)
    return losses or {"features": result["cls_feats"].sum() * 0}


def _library_contrastive(module: Any, seen: Tensors) -> None:
    text = module.itc_text_head(seen["text.last_state"][:, 0])
    image = module.itc_image_head(seen["image.last_expert"][:, 0])
    fused = module.itc_cross_modal_head(seen["cls_feats"])
    scale = module.logit_scale.exp()
    seen.update(_prefixed("itc", {"text_feats": text, "image_feats": image, "cross_feats": fused}))
    seen["itc.logits_t2i"], seen["itc.logits_i2t"] = text @ image.T * scale, image @ text.T * scale
    seen["itc.logits"] = torch.stack([text, image, fused], dim=-2)
    seen["itc.loss"] = three_way_contrastive_loss(text, image, fused, module.logit_scale)


def _reference_case(case: Case, module: Any, result: Tensors) -> Tensors:
    data, heads, active = case.inputs, case.setup.heads, case.active
    model, ids, mask = module.model, data["text_ids"], data["text_masks"]
    pixels = data["image_0"] if heads.nlvr2 else data["image"]
    result.update(forward(model, ids, mask, pixels))
    for length in {int(n) for key in case.outputs for n in re.findall(r"^padded(\d+)\.", key)}:
        more = (0, length - ids.shape[1])
        pad_id = case.setup.model.text.pad_token_id
        longer = torch.nn.functional.pad(ids, more, value=pad_id), torch.nn.functional.pad(mask, more)
        result.update(_prefixed(f"padded{length}", forward(model, *longer, pixels)))
    losses: Tensors = {}
    if "mlm" in active:
        losses["mlm"] = _mlm(module, data, result)
    if "itm" in active:
        losses["itm"] = _itm(module, data, result)
    if active & {"itc", "itm_itc", "irtr_itm_itc"}:
        losses["contrastive"] = _contrastive(case, module, result)
    if "vqa" in active:
        result["vqa.logits"] = module.vqa_classifier(result["cls_feats"])
        losses["vqa"] = result["vqa.loss"] = vqa_loss(result["vqa.logits"], data["vqa_targets"])
    if "snli" in active:
        result["snli.logits"] = module.snli_classifier(result["cls_feats"])
        losses["snli"] = result["snli.loss"] = cross_entropy(result["snli.logits"], data["labels"])
    if "nlvr2" in active:
        losses["nlvr2"] = _nlvr2(case, module, result)
    if "irtr" in active:
        losses["irtr"] = _false_texts(module, data, result)
    return losses


def _mlm(module: Any, data: Tensors, result: Tensors) -> Tensor:
    seen = forward(module.model, data["text_ids_mlm"], data["text_masks"], data["image"])
    result.update(_prefixed("mlm", seen))
    result["mlm.logits"] = module.mlm_score(seen["text_feats"])
    feats, labels = gather_labelled(seen["text_feats"], data["text_labels_mlm"])
    result["mlm.loss"] = cross_entropy(module.mlm_score(feats), labels)
    return result["mlm.loss"]


def _itm(module: Any, data: Tensors, result: Tensors) -> Tensor:
    labels = data["itm_labels"]
    pixels = torch.where(labels.bool()[:, None, None, None], data["image"], data["false_image_0"])
    seen = forward(module.model, data["text_ids"], data["text_masks"], pixels)
    result.update(_prefixed("itm", seen))
    result["itm.logits_matched_batch"] = module.itm_score(result["cls_feats"])
    result["itm.logits"] = module.itm_score(seen["cls_feats"])
    result["itm.loss"] = cross_entropy(result["itm.logits"], labels)
    return result["itm.loss"]


def _contrastive(case: Case, module: Any, result: Tensors) -> Tensor:
    data, active = case.inputs, case.active
    text = module.cross_modal_itc_text_head(result["text.last_state"][:, 0])
    image = module.cross_modal_itc_image_head(result["image.last_state"][:, 0])
    ids = data["img_index"] if "irtr_itm_itc" in active else None
    contrast = contrastive_loss(text, image, module.temperature, ids)
    result.update({"itc.text_feats": text, "itc.image_feats": image})
    result.update({"itc.logits_i2t": contrast.logits_i2t, "itc.logits_t2i": contrast.logits_t2i})
    result["itc.loss"] = result["itm_itc.itc_loss"] = contrast.loss
    if not active & {"itm_itc", "irtr_itm_itc"}:
        return contrast.loss
    model, mask = module.model, data["text_masks"]
    texts, images = model.encode_text(data["text_ids"], mask), model.encode_image(data["image"])
    drawn = {}
    for direction, logits in (("t2i", contrast.logits_t2i), ("i2t", contrast.logits_i2t)):
        weights = negative_weights(logits, contrast.positives)
        result[f"itm_itc.sampling_weights_{direction}"] = weights
        drawn[direction] = weights.argmax(dim=1)
    result["itm_itc.neg_image_index"], result["itm_itc.neg_text_index"] = drawn["t2i"], drawn["i2t"]
    own = torch.arange(len(mask))
    text_rows, image_rows = torch.cat([own, own, drawn["i2t"]]), torch.cat([own, drawn["t2i"], own])
    output = model.fuse([t[text_rows] for t in texts], [i[image_rows] for i in images], mask[text_rows])
    result.update(_prefixed("itm_itc", features(output)))
    result["itm_itc.itm_logits"] = module.itm_score(output.cls_feats)
    labels = torch.cat([torch.ones_like(own), torch.zeros_like(own), torch.zeros_like(own)])
    result["itm_itc.itm_loss"] = cross_entropy(result["itm_itc.itm_logits"], labels)
    if "irtr_itm_itc" in active:
        _rerank(module, texts, images, mask, result)
    return contrast.loss + result["itm_itc.itm_loss"]


@torch.no_grad()
def _rerank(module: Any, texts: list[Tensor], images: list[Tensor], mask: Tensor, result: Tensors) -> None:
    """Matching logit of every pair: one image with all texts, and one text with all images."""
    model = module.model
    text_experts, image_experts = model.text_experts(texts), model.image_experts(images)
    everything = torch.arange(len(mask))
    scores: dict[str, list[Tensor]] = {"i2t": [], "t2i": []}
    for row in everything:
        one = row.expand(len(mask))
        for direction, text_rows, image_rows in (("i2t", everything, one), ("t2i", one, everything)):
            output = model.fuse_experts(
                [t[text_rows] for t in text_experts], [i[image_rows] for i in image_experts], mask[text_rows]
            )
            scores[direction].append(module.itm_score(output.cls_feats)[:, 1])
    i2t, t2i = torch.stack(scores["i2t"]), torch.stack(scores["t2i"])
    result.update({"rerank.i2t": i2t, "rerank.t2i": t2i, "rerank.final": torch.maximum(i2t, t2i.T)})


def _nlvr2(case: Case, module: Any, result: Tensors) -> Tensor:
    data = case.inputs
    second = forward(module.model, data["text_ids"], data["text_masks"], data["image_1"], token_type=2)
    result.update(_prefixed("second_image", second))
    both = torch.cat([result["cls_feats"], second["cls_feats"]], dim=-1)
    result["nlvr2.logits"] = module.nlvr2_classifier(both)
    result["nlvr2.loss"] = cross_entropy(result["nlvr2.logits"], data["answers"])
    # A pre-training checkpoint has neither this head nor the second image's type row.
    state = {k: v for k, v in case.state_dict.items() if not k.startswith("nlvr2_classifier.")}
    state["token_type_embeddings.weight"] = state["token_type_embeddings.weight"][:2]
    fresh = ModelWithHeads(case.setup)
    import_checkpoint(fresh, state, allow_missing=["nlvr2_classifier.*"])
    result["init.token_type_embeddings"] = fresh.model.token_type_embeddings.weight
    result["init.positional_embedding"] = fresh.model.vit_model.visual.positional_embedding
    return result["nlvr2.loss"]


def _false_texts(module: Any, data: Tensors, result: Tensors) -> Tensor:
    count = sum(re.fullmatch(r"false_text_\d+_ids", key) is not None for key in data)
    ids = torch.stack([data["text_ids"], *(data[f"false_text_{n}_ids"] for n in range(count))], dim=1)
    masks = torch.stack([data["text_masks"], *(data[f"false_text_{n}_masks"] for n in range(count))], dim=1)
    model = module.model
    images = [state.repeat_interleave(1 + count, dim=0) for state in model.encode_image(data["image"])]
    texts = model.encode_text(ids.flatten(0, 1), masks.flatten(0, 1))
    output = model.fuse(texts, images, masks.flatten(0, 1))
    result.update(_prefixed("irtr", features(output)))
    result["irtr.score"] = module.rank_output(output.cls_feats).view(-1, 1 + count)
    result["irtr.loss"] = false_text_loss(result["irtr.score"])
    return result["irtr.loss"]
