"""Import and export of weights."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import RobertaConfig, RobertaForMaskedLM

from mt_deepspeed.config.model import HeadsConfig
from mt_deepspeed.models import TwoTowerModel, attach_heads
from mt_deepspeed.models.state_dicts import KeyMismatchError, import_checkpoint, plain_state_dict
from mt_deepspeed.models.vision_tower import resize_positions
from mt_deepspeed.models.weight_sources import open_source
from tests.helpers.tiny_model import tiny_config

LEFTOVERS = {
    "text_transformer.embeddings.position_ids": torch.arange(20)[None],
    "text_transformer.pooler.dense.weight": torch.zeros(16, 16),
    "vit_model.positional_embedding": torch.zeros(5, 8),
    "vit_model.ln_final.weight": torch.zeros(8),
    "cross_modal_text_manager_tower.0.manager_layer.softmax_temperature_cross": torch.ones(1),
    "temperature": torch.tensor(0.07),
}


def _module(seed: int = 0, kind: Any = "aaue", **heads: Any) -> nn.Module:
    torch.manual_seed(seed)
    config = tiny_config(kind)
    module = nn.Module()
    module.model = TwoTowerModel(config)
    attach_heads(module, config, HeadsConfig(**heads))
    return module


def _same(a: nn.Module, b: nn.Module) -> bool:
    other = dict(b.named_parameters())
    return all(torch.equal(parameter, other[name]) for name, parameter in a.named_parameters())


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt", ".bin", "mapping"])
def test_round_trip(suffix: str, tmp_path: Path) -> None:
    first, second = _module(0, mlm=True, itm=True), _module(1, mlm=True, itm=True)
    assert not _same(first, second)
    state = plain_state_dict(first) | LEFTOVERS
    assert "mlm_score.bias" in state
    assert "cross_modal_text_transform.weight" in state, "the two-tower model's names carry no prefix"
    path = tmp_path / f"weights{suffix}"
    source: Any = path
    if suffix == ".safetensors":
        save_file(state, path)
    elif suffix == ".ckpt":
        torch.save({"state_dict": state, "epoch": 3, "hyper_parameters": {"config": {"lr": 1e-5}}}, path)
    elif suffix == ".bin":
        torch.save(state, path)
    else:
        source = state
    report = import_checkpoint(second, source)
    assert _same(first, second)
    assert report.layout == "reference"
    assert sorted(report.unexpected) == sorted(LEFTOVERS)
    assert not report.missing
    assert not report.resized
    assert "unexpected (6)" in str(report)


class _ForeignHyperparameters(dict):  # type: ignore[type-arg]
    """As the container classes that training frameworks leave in checkpoints."""

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        self.frozen = True


def test_foreign_classes_in_a_checkpoint_stay_inert(tmp_path: Path) -> None:
    module = _module()
    hyper = _ForeignHyperparameters(config={"lr": 1.0})
    content = {
        "state_dict": plain_state_dict(module),
        "hyper_parameters": hyper,
        "callbacks": {_Evil: _Evil()},
    }
    torch.save(content, tmp_path / "official.ckpt")
    fresh = _module(1)
    import_checkpoint(fresh, tmp_path / "official.ckpt")
    assert _same(module, fresh)
    assert not _Evil.ran


class _Evil:
    ran = False

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return _run, ()


def _run() -> str:
    _Evil.ran = True
    return "ran"


def test_everything_wrong_is_told_at_once_and_nothing_written() -> None:
    module, untouched = _module(0, mlm=True), _module(0, mlm=True)
    state = plain_state_dict(_module(1, itm=True))
    state["cross_modal_text_transform.bias"] = torch.zeros(7)
    del state["token_type_embeddings.weight"]
    with pytest.raises(KeyMismatchError) as error:
        import_checkpoint(module, state)
    text = str(error.value)
    assert "missing: token_type_embeddings.weight" in text
    assert "missing: mlm_score.bias" in text
    assert "unexpected: itm_score.fc.weight" in text
    assert "shape of cross_modal_text_transform.bias: found [7], expected [32]" in text
    assert _same(module, untouched)


def test_allowed_heads() -> None:
    module = _module(0, vqa_answers=5)
    head = module.vqa_classifier[0].weight.clone()  # type: ignore[index, union-attr, operator]
    source = plain_state_dict(_module(1, mlm=True, itm=True))
    report = import_checkpoint(
        module, source, allow_missing=["vqa_classifier.*"], allow_unexpected=["mlm_score.*", "itm_score.*"]
    )
    assert len(report.missing) == 6
    assert torch.equal(module.vqa_classifier[0].weight, head)  # type: ignore[index, union-attr]


def test_resolution_and_token_types() -> None:
    config = tiny_config()
    source = plain_state_dict(_module())
    larger = nn.Module()
    larger.model = TwoTowerModel(
        replace(
            config,
            vision=replace(config.vision, image_size=40),
            cross_modal=replace(config.cross_modal, num_token_types=3),
        )
    )
    report = import_checkpoint(larger, source)
    assert set(report.resized) == {"vit_model.visual.positional_embedding", "token_type_embeddings.weight"}
    model: Any = larger.model
    table = model.token_type_embeddings.weight
    assert torch.equal(table[:2], source["token_type_embeddings.weight"])
    assert torch.equal(table[2], table[1])
    old = source["vit_model.visual.positional_embedding"]
    new = model.vit_model.visual.positional_embedding
    assert torch.equal(new[0], old[0])
    assert torch.equal(new, resize_positions(old, (5, 5)))


def test_resize_positions() -> None:
    constant = torch.full((1 + 9, 4), 2.5)
    torch.testing.assert_close(resize_positions(constant, (5, 7)), torch.full((1 + 35, 4), 2.5))
    table = torch.randn(1 + 9, 4)
    assert resize_positions(table, (3, 3)) is table
    half = resize_positions(table.half(), (6, 6))
    assert half.dtype == torch.half
    torch.testing.assert_close(
        half.float(), resize_positions(table.half().float(), (6, 6)), rtol=1e-3, atol=1e-3
    )
    with pytest.raises(ValueError, match="not 1 \\+ a square"):
        resize_positions(torch.randn(9, 4), (3, 3))


def test_scalars_leave_and_return_as_published() -> None:
    module = _module(0, "bridge_scaled_add", itc_size=8)
    state = plain_state_dict(module)
    assert state["temperature"].shape == ()
    assert state["cross_modal_text_link_tower.0.scaled_factor"].shape == ()
    fresh = _module(1, "bridge_scaled_add", itc_size=8)
    import_checkpoint(fresh, state)
    assert _same(module, fresh)


def test_published_bridgetower_names_of_contrastive_heads() -> None:
    module = _module(0, "bridge_add", itc_size=8)
    state = {name.replace("cross_modal_itc", "itc"): t for name, t in plain_state_dict(module).items()}
    assert "itc_text_head.fc.weight" in state
    fresh = _module(1, "bridge_add", itc_size=8)
    import_checkpoint(fresh, state)
    assert _same(module, fresh)


def test_roberta_folder(tmp_path: Path) -> None:
    text = tiny_config().text
    roberta = RobertaForMaskedLM(
        RobertaConfig(
            vocab_size=text.vocab_size,
            hidden_size=text.hidden_size,
            num_hidden_layers=text.num_layers,
            num_attention_heads=text.num_heads,
            intermediate_size=text.intermediate_size,
            max_position_embeddings=text.max_positions,
            type_vocab_size=1,
        )
    )
    roberta.save_pretrained(tmp_path)
    module = _module(0, itm=True)
    before = plain_state_dict(module)
    report = import_checkpoint(module, tmp_path)
    assert report.layout == "hf_roberta"
    assert report.missing == ()
    after = plain_state_dict(module)
    for name, tensor in after.items():
        if name.startswith("text_transformer."):
            assert torch.equal(
                tensor, roberta.state_dict()["roberta." + name.removeprefix("text_transformer.")]
            )
        else:
            assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("image_size", [16, 32])
def test_clip_state_dict_file(image_size: int, tmp_path: Path) -> None:
    import open_clip

    vision = tiny_config().vision
    torch.manual_seed(5)
    clip: Any = open_clip.CLIP(
        embed_dim=8,
        vision_cfg={
            "image_size": image_size,
            "layers": vision.num_layers,
            "width": vision.width,
            "head_width": vision.width // vision.num_heads,
            "patch_size": vision.patch_size,
        },
        text_cfg={"context_length": 5, "vocab_size": 11, "width": 8, "heads": 2, "layers": 1},
        quick_gelu=True,
    )
    torch.save({name: tensor.half() for name, tensor in clip.state_dict().items()}, tmp_path / "clip.pt")
    clip = clip.half().float().eval()
    module: Any = _module()
    report = import_checkpoint(module, tmp_path / "clip.pt")
    assert report.layout == "clip"
    assert bool(report.resized) == (image_size != vision.image_size)
    if image_size == vision.image_size:
        pixels = torch.randn(2, 3, image_size, image_size)
        clip.visual.output_tokens = True
        expected = clip.visual.forward_intermediates(
            pixels, indices=1, normalize_intermediates=True, output_fmt="NLC", output_extra_tokens=True
        )
        found = module.model.encode_image(pixels)[-1]
        torch.testing.assert_close(found[:, 1:], expected["image_intermediates"][0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            found[:, :1], expected["image_intermediates_prefix"][0], rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_sharded_folder(kind: str, tmp_path: Path) -> None:
    state = plain_state_dict(_module())
    names = sorted(state)
    stem, _, suffix = kind.rpartition(".")
    weight_map: dict[str, str] = {}
    for part, chosen in enumerate((names[::2], names[1::2])):
        file = f"{stem}-0000{part}.{suffix}"
        tensors = {name: state[name] for name in chosen}
        save_file(tensors, tmp_path / file) if suffix == "safetensors" else torch.save(
            tensors, tmp_path / file
        )
        weight_map |= dict.fromkeys(chosen, file)
    (tmp_path / f"{kind}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    fresh = _module(1)
    import_checkpoint(fresh, tmp_path)
    assert _same(fresh, _module())


def _write(path: Path, content: Any) -> Path:
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "absent.ckpt", "no such file"),
        (lambda folder: folder, "neither model.safetensors nor pytorch_model.bin"),
        (lambda folder: _write(folder / "a.ckpt", b"garbage"), "not a file that torch.load"),
        (lambda folder: _write(folder / "a.safetensors", b"garbage"), "not a readable safetensors"),
        (lambda folder: _write(folder / "a.ckpt", {"epoch": 1}), "found no tensors"),
        (lambda folder: _write(folder / "a.pt", [torch.ones(1)]), "found no tensors"),
        (lambda folder: "ViT-B-16:nonsense", "open_clip has no such weights.*openai"),
    ],
)
def test_bad_sources(make: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        open_source(make(tmp_path))


def test_unknown_layout_and_twice_the_same_tensor() -> None:
    with pytest.raises(ValueError, match="no known layout"):
        import_checkpoint(_module(), {"foo.weight": torch.ones(1)})
    state: dict[str, Tensor] = {"bridgetower.token_type_embeddings.weight": torch.zeros(2, 32)}
    state["token_type_embeddings.weight"] = torch.zeros(2, 32)
    with pytest.raises(KeyMismatchError, match=r"both mean token_type_embeddings\.weight"):
        import_checkpoint(_module(), state)
