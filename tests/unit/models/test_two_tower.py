"""Behaviour of the whole model that holds for every kind of link."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.transforms import Normalize

from mt_deepspeed.config.model import (
    CrossModalConfig,
    HeadsConfig,
    LinkConfig,
    ModelConfig,
    VisionTowerConfig,
)
from mt_deepspeed.models import FusionOutput, TwoTowerModel, attach_heads
from mt_deepspeed.models.vision_tower import normalise
from mt_deepspeed.objectives.classification import cross_entropy
from mt_deepspeed.objectives.mlm import gather_labelled
from tests.helpers.tiny_model import KINDS, tiny_batch, tiny_config, with_link


def _model(config: ModelConfig, seed: int = 0) -> TwoTowerModel:
    torch.manual_seed(seed)
    return TwoTowerModel(config)


def _forward(model: TwoTowerModel, batch: dict[str, Tensor]) -> FusionOutput:
    output: FusionOutput = model(**batch)
    return output


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_gets_a_gradient(kind: str) -> None:
    config = tiny_config(kind, dropout=0.1)
    module = nn.Module()
    module.model = _model(config)
    attach_heads(module, config, HeadsConfig(mlm=True, itm=True))
    heads: Any = module
    batch = tiny_batch(config)
    labels = torch.where(batch["text_mask"].bool(), batch["text_ids"], -100)
    module.train()
    output = _forward(heads.model, batch)
    feats, targets = gather_labelled(output.text_feats, labels)
    loss = cross_entropy(heads.mlm_score(feats), targets)
    loss = loss + cross_entropy(heads.itm_score(output.cls_feats), torch.tensor([1, 0, 1]))
    loss.backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        if not name.endswith("key.bias") and not name.endswith("k_proj.bias"):
            # A bias on all keys shifts every score of a row alike: its gradient is rounding only.
            assert parameter.grad.abs().max() > 1e-12, name
    if config.has_managers:
        unused = heads.model.layer_embeddings_text.weight.grad[: 4 - 3]
        assert not unused.any(), "rows of layers below the experts"


@pytest.mark.parametrize("kind", KINDS)
def test_result_does_not_depend_on_padding(kind: str) -> None:
    model = _model(tiny_config(kind)).eval()
    batch = tiny_batch(model.config)
    longer = dict(batch)
    longer["text_ids"] = nn.functional.pad(batch["text_ids"], (0, 5), value=1)
    longer["text_mask"] = nn.functional.pad(batch["text_mask"], (0, 5))
    short, long = _forward(model, batch), _forward(model, longer)
    torch.testing.assert_close(long.cls_feats, short.cls_feats, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(long.image_feats, short.image_feats, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(long.text_feats[:, :9], short.text_feats, rtol=1e-5, atol=1e-6)


def test_published_managers_depend_on_padding() -> None:
    config = replace(tiny_config("aaue"), mask_padding_in_managers=False)
    model = _model(config).eval()
    with torch.no_grad():  # an untrained query hardly tells keys apart
        for name, parameter in model.named_parameters():
            if "fusion_attention" in name:
                parameter.mul_(10)
    batch = tiny_batch(config)
    longer = dict(batch)
    longer["text_ids"] = nn.functional.pad(batch["text_ids"], (0, 5), value=1)
    longer["text_mask"] = nn.functional.pad(batch["text_mask"], (0, 5))
    difference = (_forward(model, longer).cls_feats - _forward(model, batch).cls_feats).abs().max()
    assert difference > 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_independent_and_may_be_gathered(kind: str) -> None:
    model = _model(tiny_config(kind)).eval()
    batch = tiny_batch(model.config)
    texts = model.encode_text(batch["text_ids"], batch["text_mask"])
    images = model.encode_image(batch["pixels"])
    rows = torch.tensor([2, 0, 0, 1])
    pairs = torch.tensor([1, 1, 0, 2])
    once = model.fuse([t[rows] for t in texts], [i[pairs] for i in images], batch["text_mask"][rows])
    again = model(batch["text_ids"][rows], batch["text_mask"][rows], batch["pixels"][pairs])
    torch.testing.assert_close(once.cls_feats, again.cls_feats, rtol=1e-5, atol=1e-6)
    alone = model(*(batch[key][:1] for key in ("text_ids", "text_mask", "pixels")))
    torch.testing.assert_close(alone.cls_feats, _forward(model, batch).cls_feats[:1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_same_training_step(kind: str) -> None:
    config = tiny_config(kind, dropout=0.2)
    results = []
    for _ in range(2):
        model = _model(config).train()
        torch.manual_seed(3)
        output = _forward(model, tiny_batch(config))
        output.cls_feats.square().sum().backward()
        results.append([output.cls_feats, *(parameter.grad for parameter in model.parameters())])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)  # type: ignore[arg-type]
    torch.manual_seed(4)
    assert not torch.equal(_forward(model, tiny_batch(config)).cls_feats, results[0][0])  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_autocast(kind: str) -> None:
    model = _model(tiny_config(kind)).train()
    batch = tiny_batch(model.config)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = _forward(model.eval(), batch)
    high = _forward(model, batch)
    torch.testing.assert_close(low.cls_feats.float(), high.cls_feats, rtol=0.1, atol=0.05)
    low.cls_feats.float().sum().backward()


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_parameters(kind: str) -> None:
    config = tiny_config(kind)
    model = _model(config).eval()
    batch = tiny_batch(config)
    high = _forward(model, batch)
    model = model.bfloat16()
    low = _forward(model, {**batch, "pixels": batch["pixels"].bfloat16()})
    assert low.cls_feats.dtype == torch.bfloat16
    torch.testing.assert_close(low.cls_feats.float(), high.cls_feats, rtol=0.1, atol=0.06)
    model.train()(**{**batch, "pixels": batch["pixels"].bfloat16()}).cls_feats.sum().backward()


def test_second_image_has_its_own_type() -> None:
    config = tiny_config()
    model = _model(replace(config, cross_modal=replace(config.cross_modal, num_token_types=3))).eval()
    states = model.encode_image(tiny_batch(config)["pixels"])
    first, second = model.image_experts(states)[0], model.image_experts(states, token_type=2)[0]
    table = model.token_type_embeddings.weight
    torch.testing.assert_close(second - first, (table[2] - table[1]).expand_as(first))


def test_pictures_of_other_shapes_resize_positions() -> None:
    model = _model(tiny_config()).eval()
    assert model.encode_image(torch.randn(2, 3, 24, 40))[0].shape == (2, 1 + 3 * 5, 24)


def test_unused_published_tensors_are_absent() -> None:
    names = " ".join(dict(_model(tiny_config("aaue")).named_parameters()))
    for unused in ("pooler.dense.weight text_transformer", "ln_final", "temperature_cross", "visual.proj"):
        assert unused not in names
    assert "text_transformer.pooler" not in names
    shapes = {name: tuple(parameter.shape) for name, parameter in _model(tiny_config()).named_parameters()}
    assert () not in shapes.values(), "ZeRO cannot split parameters without dimensions"


def test_first_sae_weight_needs_no_parameter() -> None:
    model = _model(tiny_config("sae"))
    links: list[Any] = model.links("text")
    shapes = [link.layer_scores.shape[1] for link in links]
    assert shapes == [3, 3, 5]
    record: dict[str, Tensor] = {}
    batch = tiny_batch(model.config)
    texts, images = (
        model.encode_text(batch["text_ids"], batch["text_mask"]),
        model.encode_image(batch["pixels"]),
    )
    model.eval().fuse(texts, images, batch["text_mask"], record=record)
    torch.testing.assert_close(record["manager.text.1.weight_previous"], torch.ones(1, 1))
    torch.testing.assert_close(record["manager.text.2.weight_previous"].sum(0), torch.ones(32))


def test_shared_bridges_equal_equal_bridges() -> None:
    config = tiny_config("bridge_scaled_add")
    single, shared = _model(config), _model(with_link(config, shared=True))
    state = {name: tensor + 0.1 for name, tensor in shared.state_dict().items()}
    shared.load_state_dict(state)
    for modality in ("text", "image"):
        prefix = f"cross_modal_{modality}_link_tower."
        for name in [name for name in state if name.startswith(prefix)]:
            tensor = state.pop(name)
            state |= {f"{prefix}{i}.{name.removeprefix(prefix)}": tensor for i in range(2)}
    single.load_state_dict(state)
    batch = tiny_batch(config)
    assert torch.equal(_forward(single.eval(), batch).cls_feats, _forward(shared.eval(), batch).cls_feats)


def test_recording_changes_nothing() -> None:
    model = _model(tiny_config()).eval()
    batch = tiny_batch(model.config)
    texts, images = (
        model.encode_text(batch["text_ids"], batch["text_mask"]),
        model.encode_image(batch["pixels"]),
    )
    record: dict[str, Tensor] = {}
    recorded = model.fuse(texts, images, batch["text_mask"], record=record)
    assert torch.equal(recorded.cls_feats, model.fuse(texts, images, batch["text_mask"]).cls_feats)
    assert record["manager.image.1.weights"].shape == (3, 5, 4)
    assert record["manager.image.1.query_attention"][1, :, 6:].eq(0).all(), "padding is not asked"
    assert not any(tensor.requires_grad for tensor in record.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: VisionTowerConfig(image_size=100, patch_size=16), "not a multiple of patch_size"),
        (lambda: CrossModalConfig(num_heads=7), "not a multiple of its num_heads"),
        (lambda: CrossModalConfig(num_layers=0), "at least 1"),
        (lambda: LinkConfig(num_text_experts=13), "top 13 layers of the text tower"),
        (lambda: LinkConfig(shared=True), "need bridges"),
    ],
)
def test_impossible_configurations(change: Any, message: str) -> None:
    part = change()
    where = {"VisionTowerConfig": "vision", "CrossModalConfig": "cross_modal", "LinkConfig": "link"}
    with pytest.raises(ValueError, match=message):
        ModelConfig(**{where[type(part).__name__]: part})


def test_pixels_as_decoded_are_normalised_as_clip_does() -> None:
    config = tiny_config("saue")
    model, batch = _model(config).eval(), tiny_batch(config)
    pixels = torch.randint(256, batch["pixels"].shape, dtype=torch.uint8)
    norm = Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    torch.testing.assert_close(normalise(pixels), norm(pixels.float() / 255), rtol=1e-5, atol=1e-5)
    decoded = _forward(model, {**batch, "pixels": pixels})
    normalised = _forward(model, {**batch, "pixels": normalise(pixels)})
    assert torch.equal(decoded.cls_feats, normalised.cls_feats)


@pytest.mark.parametrize("kind", ["saue", "aaue", "bridge_add"])
def test_class_features_alone_are_the_same(kind: str) -> None:
    """Skipping the last image layer's other tokens changes neither features nor gradients."""
    config = tiny_config(kind, noise=False)
    model = _model(config).double().train()
    batch = tiny_batch(config)
    batch["pixels"] = batch["pixels"].double()
    texts = model.encode_text(batch["text_ids"], batch["text_mask"])
    images = model.encode_image(batch["pixels"])
    found = []
    for pooled_from in (None, 1):
        fused = model.fuse(texts, images, batch["text_mask"], pooled_from=pooled_from)
        classes = fused.cls_feats[1:] if pooled_from is None else fused.cls_feats
        loss = fused.text_feats.square().sum() + classes.sin().sum()
        grads = torch.autograd.grad(loss, [*model.parameters()], retain_graph=True, allow_unused=True)
        found.append((fused.text_feats, classes, *(grad for grad in grads if grad is not None)))
    for whole, part in zip(*found, strict=True):
        torch.testing.assert_close(whole, part)


@pytest.mark.parametrize("kind", ["saue", "aaue"])
def test_noise_is_in_training_only_and_can_be_switched_off(kind: str) -> None:
    batch = tiny_batch(tiny_config(kind))

    def twice_equal(noise: bool, training: bool) -> bool:
        model = _model(tiny_config(kind, noise=noise)).train(training)
        return torch.equal(_forward(model, batch).cls_feats, _forward(model, batch).cls_feats)

    assert not twice_equal(noise=True, training=True)
    assert twice_equal(noise=True, training=False)
    assert twice_equal(noise=False, training=True)
