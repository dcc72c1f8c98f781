"""Models come and go: published `.ckpt` files of every task, and transformers' BridgeTower both ways."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor

from mt_deepspeed import export, load
from mt_deepspeed.data.text import train_tokenizer
from mt_deepspeed.models.key_maps import hf_bridgetower_name, own_name
from mt_deepspeed.models.state_dicts import plain_state_dict
from mt_deepspeed.models.vision_tower import normalise
from mt_deepspeed.pretrained.foreign import load_foreign
from tests.helpers.datasets import make_rows
from tests.helpers.tiny_pretrained import tiny_pretrained
from tests.parity import test_transformers as library
from tests.parity.cases import Case, find_cases
from tests.parity.compute import compute
from tests.parity.test_tasks import MADE, make_case, task_of

SIZES = ("text_encoder", "vision_encoder", "cross_modal", "managers", "bridges")
OUTPUTS = {
    "mlm_score": "mlm.logits",
    "itm_score": "itm.logits_matched_batch",
    "vqa_classifier": "vqa.logits",
    "snli_classifier": "snli.logits",
    "nlvr2_classifier": "nlvr2.logits",
    "text_embeddings": "itc.text_feats",
    "image_embeddings": "itc.image_feats",
    "cls_feats": "cls_feats",
}
"""Our output -> tensor of a reference case."""
BRIDGES: dict[str, Any] = {
    "text": {"hidden_size": 32, "intermediate_size": 48, "num_layers": 3},
    "vision": {"width": 64, "num_heads": 1, "num_layers": 3},
    "cross_modal": {"hidden_size": 32, "intermediate_size": 48, "num_token_types": 2},
    "link": {"kind": "bridge_add"},
}
"""A BridgeTower that transformers can have, at the published epsilons."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many tokens as the smallest case has."""
    folder = tmp_path_factory.mktemp("import") / "tokenizer"
    train_tokenizer([text for row in make_rows(40) for text in row["captions"]], folder, 270)
    return folder


def published(case: Case, file: Path) -> Path:
    """The weights of a case as a `.ckpt` in the published layout."""
    options = case.config["config"] | {key: case.config[key] for key in SIZES if key in case.config}
    options |= {"val_transform_keys": ["albef"], "max_text_len": 12, "tokenizer": "roberta-base"}
    state = dict(case.state_dict)
    torch.save({"state_dict": state, "epoch": 3, "hyper_parameters": {"config": options}}, file)
    return file


def check_import(case: Case, expected: dict[str, Tensor], tokenizer: Path, folder: Path) -> None:
    """Imports, exports and loads; compares every head's output, before and after."""
    checkpoint, answers = published(case, folder / "model.ckpt"), folder / "answers.json"
    answers.write_text(json.dumps([f"a{i}" for i in range(case.setup.heads.vqa_answers or 0)]))
    is_vqa = case.setup.heads.vqa_answers is not None
    model, report = load_foreign(checkpoint, str(tokenizer), answers if is_vqa else None)
    assert model.config.task == task_of(case)
    assert model.config.model.vision.image_size == case.config["config"]["image_size"]
    assert (model.config.data.eval_transform, model.config.data.max_text_len) == ("albef", 12)
    assert not report.missing or set(report.missing) <= {"itm_score.fc.weight", "itm_score.fc.bias"}
    resized = case.state_dict["vit_model.visual.positional_embedding"].shape
    assert bool(report.resized) == (resized != model.task.model.vit_model.visual.positional_embedding.shape)
    data = case.inputs
    pixels = torch.cat([data["image_0"], data["image_1"]]) if "image_1" in data else data["image"]
    inputs = {"text_ids": data["text_ids"], "text_mask": data["text_masks"], "pixels": pixels}
    found = model(**inputs)
    if "mlm_score" in found:
        found["mlm_score"] = model(**inputs | {"text_ids": data["text_ids_mlm"]})["mlm_score"]
    compared = [name for name in found if OUTPUTS.get(name) in expected]
    assert set(compared) - {"cls_feats"} or case.setup.heads.rank
    for name in compared:
        torch.testing.assert_close(found[name], expected[OUTPUTS[name]], atol=5e-5, rtol=1e-4)
    if case.setup.heads.rank:
        torch.testing.assert_close(
            found["rank_output"][:, 0], expected["irtr.score"][:, 0], atol=5e-5, rtol=1e-4
        )
    export.export(model, folder / "out")
    again = load(folder / "out")
    assert again.labels == model.labels
    for name, tensor in again(**inputs).items():
        if name != "mlm_score":
            assert torch.equal(tensor, found[name])


@pytest.mark.parametrize("case", [case for case in find_cases() if task_of(case)], ids=lambda case: case.name)
def test_published_checkpoints_of_reference_cases(case: Case, tokenizer: Path, tmp_path: Path) -> None:
    check_import(case, case.outputs, tokenizer, tmp_path)


@pytest.mark.parametrize("name", ["vqa", "vqa-one-layer", "snli", "irtr-itm", "irtr"])
def test_published_checkpoints_of_other_tasks(name: str, tokenizer: Path, tmp_path: Path) -> None:
    case = make_case(tmp_path / name, *MADE[name])
    check_import(case, compute(case), tokenizer, tmp_path)


def test_import_from_the_command_line(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = make_case(tmp_path / "case", *MADE["vqa"])
    state = case.state_dict | {"mlm_score.bias": torch.zeros(3)}
    checkpoint = published(case, tmp_path / "vqav2.ckpt")
    content = torch.load(checkpoint)
    torch.save({**content, "state_dict": state}, checkpoint)
    arguments = [
        "--checkpoint",
        str(checkpoint),
        "--tokenizer",
        str(tokenizer),
        "--out",
        str(tmp_path / "out"),
    ]
    with pytest.raises(SystemExit, match="give its answers with --answers"):
        export.main(arguments)
    (tmp_path / "answers.json").write_text('["yes"]')
    with pytest.raises(SystemExit, match="1 answers, the model has 11"):
        export.main([*arguments, "--answers", str(tmp_path / "answers.json")])
    (tmp_path / "answers.json").write_text(json.dumps({f"answer {i}": 10 - i for i in range(11)}))
    export.main([*arguments, "--answers", str(tmp_path / "answers.json")])
    shown = capsys.readouterr().out
    assert "unexpected" in shown
    assert "mlm_score.bias" in shown
    assert "logits of the reloaded model are equal" in shown
    model = load(tmp_path / "out")
    assert model.labels[0] == "answer 10"
    picture = Image.new("RGB", (70, 40), "red")
    assert len(model.answer(picture, "what is it", top=3)) == 3
    with pytest.raises(ValueError, match="a file, not a folder"):
        load(checkpoint)


@pytest.mark.parametrize(
    "variant", ["add_mlm", "interpolate_itm", "scaled_add_mlm", "own_transforms_itm", "contrastive"]
)
def test_the_library_round_trip(
    variant: str, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(library.TEXT, "vocab_size", 300)
    theirs = library._library_model(variant)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, back = tmp_path / "ours", tmp_path / "back"
    export.main(["--checkpoint", str(tmp_path / "theirs"), "--tokenizer", str(tokenizer), "--out", str(ours)])
    export.main(["--checkpoint", str(ours), "--out", str(back), "--format", "hf-bridgetower"])
    again, info = type(theirs).from_pretrained(back, output_loading_info=True)
    assert not any(info.values()), info
    before, after = theirs.state_dict(), again.state_dict()
    unused = {
        name for name in before if ("pooler.dense" in name and "text_model" in name) or "ln_separate" in name
    }
    assert unused >= before.keys() - after.keys()
    for name in after.keys() - unused:
        assert torch.equal(before[name], after[name]), name
    batch = library._batch("plain")
    with torch.no_grad():
        one, two = theirs(**batch).logits, again.eval()(**batch).logits
    torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="a transformers model"):
        load(back)


def test_a_bridgetower_of_ours_leaves(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_pretrained(tokenizer, "pretrain", model=BRIDGES, data={"max_text_len": 30})
    model.save_pretrained(tmp_path / "own")
    out = tmp_path / "hf"
    export.main(["--checkpoint", str(tmp_path / "own"), "--out", str(out), "--format", "hf-bridgetower"])
    shown = capsys.readouterr().out
    assert "BridgeTowerForMaskedLM: logits within" in shown
    assert "BridgeTowerForImageAndTextRetrieval: logits within" in shown
    assert "squashed" in shown
    # At the published epsilons, of which the library has two instead of four.
    processor = transformers.AutoProcessor.from_pretrained(out)
    picture = Image.effect_noise((40, 40), 90).convert("RGB")
    texts = ["a red <mask>", "two <mask> stars above a ring."]
    batch = processor(images=[picture, picture], text=texts, padding=True, return_tensors="pt")
    batch.pop("pixel_mask", None)
    inputs = model.processor([picture, picture], texts)
    assert torch.equal(batch["input_ids"], inputs["text_ids"])
    torch.testing.assert_close(batch["pixel_values"], normalise(inputs["pixels"]), atol=0.02, rtol=0)
    ours = model(**{**inputs, "pixels": batch["pixel_values"]})
    for kind, head in (
        (transformers.BridgeTowerForMaskedLM, "mlm_score"),
        (transformers.BridgeTowerForImageAndTextRetrieval, "itm_score"),
    ):
        with torch.no_grad():
            logits = kind.from_pretrained(out).eval()(**batch).logits
        difference = (logits - ours[head]).abs().max() / ours[head].abs().max()
        assert difference < 2e-4, (head, difference)


def test_what_has_no_counterpart_is_named(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def leave(task: str, **changes: Any) -> None:
        tiny_pretrained(tokenizer, task, **changes).save_pretrained(tmp_path / "own")
        to = str(tmp_path / "hf")
        export.main(["--checkpoint", str(tmp_path / "own"), "--out", to, "--format", "hf-bridgetower"])

    with pytest.raises(SystemExit, match="error: transformers has no ManagerTower"):
        leave("pretrain")
    assert not (tmp_path / "hf").exists()
    with pytest.raises(SystemExit, match="no head for task snli_ve"):
        leave("snli_ve", model=BRIDGES)
    with pytest.raises(
        SystemExit, match=r"model\.vision\.num_heads is 2, must be 1; .*num_layers is 4, must be 3"
    ):
        leave("pretrain", model={**BRIDGES, "vision": {"width": 64, "num_layers": 4}})
    leave("retrieval", model=BRIDGES)
    assert "no counterpart in transformers, left out (5): " in (shown := capsys.readouterr().out)
    assert "cross_modal_itc_image_head.fc.bias" in shown
    assert "temperature" in shown


def test_names_of_the_library_are_inverted(tokenizer: Path) -> None:
    model = tiny_pretrained(
        tokenizer, "retrieval", model=BRIDGES, retrieval={"objective": "three_way", "itc_size": 8}
    )
    for name in plain_state_dict(model.task):
        foreign = hf_bridgetower_name(name)
        assert foreign is not None
        assert own_name(foreign, "hf_bridgetower") == name
