"""Asking a model: the Python API, the command line, what it refuses, and that none of it needs DeepSpeed."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mt_deepspeed import ManagerTower, predict, show
from mt_deepspeed.config import from_dict, to_dict
from mt_deepspeed.pretrained.inference import outputs
from mt_deepspeed.pretrained.questions import pictures_in, read_rows, text_of
from tests.helpers.datasets import make_rows, write_dataset
from tests.helpers.task_runs import ANSWERS
from tests.helpers.tiny_pretrained import tiny_pretrained, write_pictures, write_tokenizer

TASKS = ("pretrain", "vqa", "snli_ve", "nlvr2", "retrieval")
ASKING = {"pretrain": "fill-mask", "vqa": "answer", "snli_ve": "entail", "nlvr2": "compare"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported model of each task, and `pictures/a0.png` to `a4.png`."""
    folder = tmp_path_factory.mktemp("predict")
    tokenizer = write_tokenizer(folder / "tokenizer")
    for task in TASKS:
        tiny_pretrained(tokenizer, task).save_pretrained(folder / task)
    write_pictures(folder / "pictures", 5)
    return folder


def run(root: Path, what: str, task: str, *arguments: object) -> None:
    predict.main([what, "--model", str(root / task), "--device", "cpu", *map(str, arguments)])


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def test_answers_are_those_of_the_forward_pass(root: Path) -> None:
    image = root / "pictures" / "a1.png"
    vqa = ManagerTower.from_pretrained(root / "vqa")
    logits = vqa(**vqa.processor([image], ["is it red"]))["vqa_classifier"][0]
    answers = vqa.answer(image, "is it red", top=2)
    assert [one.text for one in answers] == [ANSWERS[i] for i in logits.topk(2).indices]
    assert answers[0].probability == pytest.approx(float(logits.max().sigmoid()))

    snli = ManagerTower.from_pretrained(root / "snli_ve")
    logits = snli(**snli.processor([image], ["it is red"]))["snli_classifier"][0]
    found = {one.text: one.probability for one in snli.entail(image, "it is red")}
    expected = dict(zip(("contradiction", "neutral", "entailment"), logits.softmax(0).tolist(), strict=True))
    assert found == pytest.approx(expected)

    nlvr2, other = ManagerTower.from_pretrained(root / "nlvr2"), root / "pictures" / "a3.png"
    logits = nlvr2(**nlvr2.processor([image, other], ["both are red"]))["nlvr2_classifier"][0]
    found = {one.text: one.probability for one in nlvr2.compare(image, other, "both are red")}
    assert found == pytest.approx(dict(zip(("false", "true"), logits.softmax(0).tolist(), strict=True)))
    swapped = {one.text: one.probability for one in nlvr2.compare(other, image, "both are red")}
    assert swapped != pytest.approx(found)


def test_batches_change_no_answer(root: Path) -> None:
    model = ManagerTower.from_pretrained(root / "pretrain")
    images = pictures_in([root / "pictures"])
    texts = ["a <mask> circle", "a <mask> <mask> of stars", "the <mask>"]
    together = model.fill_masks(images[:3], texts, top=2)
    assert [len(row) for row in together] == [1, 2, 1]
    for row, image, text in zip(together, images, texts, strict=False):
        alone = model.fill_mask(image, text, top=2)
        assert [[g.text for g in mask] for mask in row] == [[g.text for g in mask] for mask in alone]

    plain = ["a circle", "two stars above a ring"]
    table = model.scores(plain, images, batch_size=2)
    assert table.shape == (2, 5)
    for number, text in enumerate(plain):
        torch.testing.assert_close(table[number], model.match(images, [text] * 5), atol=1e-5, rtol=1e-4)
    ranked = model.rank(plain, images, top=3)
    assert [number for number, _ in ranked[1]] == table[1].topk(3).indices.tolist()


def test_embeddings(root: Path) -> None:
    images = pictures_in([root / "pictures"])
    model = ManagerTower.from_pretrained(root / "retrieval")
    assert model.contrastive
    states = model.task.model.encode_image(model.pixels(images))
    expected = model.task.cross_modal_itc_image_head(states[-1][:, 0])
    torch.testing.assert_close(model.embed_images(images), expected)
    assert model.embed_texts(["a ring", "a star"]).shape == (2, 8)
    towers = ManagerTower.from_pretrained(root / "pretrain")
    assert not towers.contrastive
    torch.testing.assert_close(towers.embed_images(images).norm(dim=1), torch.ones(5))


@pytest.mark.parametrize("task", TASKS)
def test_what_a_model_cannot_do_is_said(root: Path, task: str) -> None:
    model = ManagerTower.from_pretrained(root / task)
    able = {"pretrain": {"fill-mask", "rank"}, "retrieval": {"rank"}}.get(task, {ASKING.get(task)})
    for ability in ("fill-mask", "answer", "entail", "compare", "rank"):
        if ability in able:
            model.need(ability)
            continue
        with pytest.raises(ValueError, match=f"cannot {ability}: it was trained for task {task} and has no"):
            model.need(ability)


@pytest.mark.parametrize("task", sorted(ASKING))
def test_rows_of_a_file(root: Path, tmp_path: Path, task: str) -> None:
    text = "a <mask> circle" if task == "pretrain" else "is it a circle"
    names = [[f"a{i}.png", "a0.png"] if task == "nlvr2" else f"a{i}.png" for i in range(5)]
    (root / "pictures" / "rows.jsonl").write_text(
        "\n".join(json.dumps({"id": i, "image": name, "text": text}) for i, name in enumerate(names))
    )
    out = tmp_path / "new" / "out.jsonl"
    run(
        root, ASKING[task], task, "--input", root / "pictures" / "rows.jsonl", "--batch-size", 2, "--out", out
    )
    rows = lines(out)
    assert [row["id"] for row in rows] == list(range(5))
    key = {"pretrain": "masks", "vqa": "answers"}.get(task, "label")
    assert all(key in row for row in rows)
    if task == "nlvr2":
        assert set(rows[0]["probabilities"]) == {"false", "true"}


def test_one_question_on_the_terminal(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = root / "pictures" / "a0.png"
    run(root, "answer", "vqa", "--image", image, "--text", "what is it", "--top", 2)
    out = capsys.readouterr().out
    assert out.startswith("a0.png  what is it  answer ")
    assert out.count("answer ") == 2
    run(root, "compare", "nlvr2", "--image", image, image, "--text", "both are")
    assert "a0.png, a0.png  both are" in capsys.readouterr().out


def test_wrong_rows_are_named_before_any_work(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(
        '{"image": "a.png", "text": "<mask>"}\n\n{"image": 3, "text": "<mask>"}\nno json\n'
        '{"image": "a.png"}\n[1]\n' + json.dumps({"image": str(root / "pictures/a0.png"), "text": "no"})
    )
    with pytest.raises(SystemExit) as error:
        run(root, "fill-mask", "no-such-model", "--input", file)
    message = str(error.value)
    assert "6 of 6 rows cannot be used" in message
    for part in (
        ":1: image: no file",
        ":3: image: found 3",
        ":4: not JSON",
        ":5: text: found None",
        ":6: found [1]",
    ):
        assert part in message
    assert ":7: text: found no <mask>" in message


def test_rows_that_could_not_be_written_again_are_named(root: Path, tmp_path: Path) -> None:
    picture = str(root / "pictures/a0.png")
    file = tmp_path / "rows.jsonl"
    rows = [
        json.dumps({"image": picture, "text": "half a smile \ud83d"}).encode(),
        json.dumps({"image": picture, "text": "fine", "note": "\udc00"}).encode(),
        json.dumps({"image": picture, "text": "caf\xe9"}, ensure_ascii=False).encode("latin-1"),
        json.dumps({"image": picture, "text": "what is it", "answers": ["a cat"]}).encode(),
        json.dumps({"image": picture, "text": "what is it", "images": 3, "label": 2}).encode(),
    ]
    file.write_bytes(b"\n".join(rows))
    with pytest.raises(SystemExit) as error:
        run(root, "answer", "vqa", "--input", file)
    message = str(error.value)
    assert "4 of 5 rows cannot be used" in message
    for part in (":1: not UTF-8", ":2: not UTF-8", ":3: not UTF-8", ":4: answers: answer writes its result"):
        assert part in message


def test_further_keys_change_no_table(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"image": str(root / "pictures/a0.png"), "text": "what is it", "images": 3, "masks": [], "label": 2}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    run(root, "answer", "vqa", "--input", tmp_path / "rows.jsonl", "--top", 1)
    assert capsys.readouterr().out.startswith("a0.png  what is it  answer ")


def test_a_mask_behind_the_models_length_is_refused(root: Path) -> None:
    with pytest.raises(SystemExit, match="behind the 14 tokens"):
        run(
            root,
            "fill-mask",
            "pretrain",
            "--image",
            root / "pictures/a0.png",
            "--text",
            "red " * 30 + "<mask>",
        )


def test_broken_pictures_lose_no_other_row(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = write_pictures(tmp_path / "some", 4)
    images[1].write_bytes(b"no picture")
    images[2].write_bytes(images[0].read_bytes()[:40])
    rows = [{"image": str(image), "text": "is it red"} for image in images]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "out.jsonl"
    with pytest.raises(SystemExit) as error:
        run(root, "answer", "vqa", "--input", tmp_path / "rows.jsonl", "--batch-size", 3, "--out", out)
    assert error.value.code == 3
    assert ["error" in row for row in lines(out)] == [False, True, True, False]
    assert "2 pictures could not be decoded" in capsys.readouterr().err

    with pytest.raises(SystemExit) as error:
        run(root, "rank", "pretrain", "--images", tmp_path / "some", "--text", "red", "a ring", "--out", out)
    assert error.value.code == 3
    rows = lines(out)
    assert [len(row["images"]) for row in rows[:2]] == [2, 2]
    assert [Path(row["image"]).name for row in rows[2:]] == ["a1.png", "a2.png"]

    with pytest.raises(SystemExit) as error:
        run(
            root,
            "embed",
            "retrieval",
            "--images",
            tmp_path / "some",
            "--text",
            "red",
            "--out",
            tmp_path / "e.parquet",
        )
    assert error.value.code == 3
    table = pq.read_table(tmp_path / "e.parquet")
    assert table.schema.metadata[b"space"] == b"contrastive"
    assert table.column("kind").to_pylist() == ["image"] * 4 + ["text"]
    assert [vector is None for vector in table.column("embedding").to_pylist()] == [
        False,
        True,
        True,
        False,
        False,
    ]


def test_texts_are_ranked_for_each_picture(root: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text('{"text": "a ring"}\n{"text": "a star"}\n')
    arguments = ("--images", root / "pictures", "--input", tmp_path / "texts.jsonl", "--by", "image")
    run(root, "rank", "pretrain", *arguments, "--out", tmp_path / "out.jsonl")
    rows = lines(tmp_path / "out.jsonl")
    assert len(rows) == 5
    assert all({one["text"] for one in row["texts"]} == {"a ring", "a star"} for row in rows)
    assert all(row["texts"][0]["score"] >= row["texts"][1]["score"] for row in rows)


@pytest.mark.parametrize(
    "arguments",
    [[], ["answer", "--model", "m"], ["answer", "--model", "m", "--image", "a", "--text", "b", "--input", "c"],
     ["rank", "--model", "m", "--images", "x"], ["embed", "--model", "m", "--out", "x"],
     ["answer", "--model", "m", "--image", "a", "--text", "b", "--top", "0"]],
)  # fmt: skip
def test_wrong_command_lines(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as error:
        predict.main(arguments)
    assert error.value.code == 2


@given(st.lists(st.text(min_size=1).filter(str.strip), min_size=1, max_size=5))
def test_any_text_survives_a_file_of_rows(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}) for text in texts), "utf-8")
    assert read_rows(file, text_of) == texts


def test_attention_is_that_of_the_layer(root: Path) -> None:
    model = ManagerTower.from_pretrained(root / "pretrain")
    image = root / "pictures" / "a2.png"
    maps = model.attention(image, "a red circle", "red")
    assert maps.shape == (2, 2, 2)
    assert bool((maps.sum(dim=(1, 2)) < 1).all())
    with pytest.raises(ValueError, match="word 'blue': not in the text, whose words are a, red, circle"):
        model.attention(image, "a red circle", "blue")


def test_pictures_of_what_a_model_sees(root: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path / "captions", {"val": make_rows(4)})
    words = sorted({word for row in make_rows(4) for text in row["captions"] for word in text.split()})
    (tmp_path / "words.json").write_text(json.dumps({"any": words}))
    model, image = str(root / "pretrain"), str(root / "pictures" / "a0.png")
    shards = ["--shards", str(tmp_path / "captions")]
    for name, arguments in {
        "masks": [*shards, "--visual-words", str(tmp_path / "words.json"), "--num", "2"],
        "managers": [*shards, "--num", "3"],
        "attention": ["--image", image, "--text", "a red circle", "--word", "red"],
        "ranking": ["--images", str(root / "pictures"), "--text", "a", "b", "--top", "2"],
    }.items():
        out = tmp_path / f"{name}.png"
        show.main([name, "--model", model, "--out", str(out), *arguments])
        assert out.read_bytes()[:4] == b"\x89PNG"


def test_a_folder_is_used_without_deepspeed(root: Path, tmp_path: Path) -> None:
    program = f"""
import sys
sys.modules["deepspeed"] = None  # importing it raises
import mt_deepspeed
from mt_deepspeed import predict
model = mt_deepspeed.ManagerTower.from_pretrained({str(root / "vqa")!r})
print(model.answer({str(root / "pictures" / "a0.png")!r}, "what is it")[0].text)
model.save_pretrained({str(tmp_path / "again")!r})
predict.main(["rank", "--model", {str(root / "retrieval")!r}, "--images", {str(root / "pictures")!r}, "--text", "red"])
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("answer ")
    again, model = (
        ManagerTower.from_pretrained(tmp_path / "again"),
        ManagerTower.from_pretrained(root / "vqa"),
    )
    inputs = model.processor([root / "pictures" / "a0.png"], ["what is it"])
    assert torch.equal(again(**inputs)["vqa_classifier"], model(**inputs)["vqa_classifier"])
    assert again.labels == tuple(ANSWERS)


def test_outputs_name_every_head(root: Path) -> None:
    names = {}
    for task in TASKS:
        model = ManagerTower.from_pretrained(root / task)
        side = model.config.model.vision.image_size
        pixels = torch.randint(256, (4 if task == "nlvr2" else 2, 3, side, side), dtype=torch.uint8)
        ids = torch.randint(4, 50, (2, 6))
        names[task] = set(outputs(model.task, ids, torch.ones_like(ids), pixels))
        assert from_dict(type(model.config), to_dict(model.config)) == model.config
    feats = {"text_feats", "image_feats", "cls_feats"}
    assert names["pretrain"] == feats | {"mlm_score", "itm_score"}
    assert names["retrieval"] == feats | {"itm_score", "text_embeddings", "image_embeddings"}
    assert names["nlvr2"] == {"nlvr2_classifier"}
