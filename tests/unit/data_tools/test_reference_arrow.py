"""The `.arrow` files of the published code."""

import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from data_tools.cli import main
from data_tools.shard_format import read_manifest
from data_tools.sources import SOURCES, AnnotationError, Request, Row, Slice
from tests.helpers.conversion import faults, picture, stored

SOURCE = SOURCES["reference-arrow"]
Rows = list[dict[str, Any]]


def write(path: Path, rows: Rows, schema: pa.Schema | None = None, batch: int = 100) -> None:
    """As the published converters do: one table, written in batches."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows, schema)
    with pa.OSFile(str(path), "wb") as sink, pa.RecordBatchFileWriter(sink, table.schema) as writer:
        writer.write_table(table, batch)


def read(raw: Path, answers: tuple[str, ...] = (), files: list[Path] | None = None) -> list[Row]:
    return list(SOURCE.rows(Request(raw, files or SOURCE.find(raw), answers=answers)))


def captions(first: int, count: int, **more: Any) -> Rows:
    return [
        {"image": picture(i), "caption": [f"c{i}", f"c{i}", f" d{i}"], "image_id": f"{i}.jpg", **more}
        for i in range(first, first + count)
    ]


def question_row(
    image_id: int, first: int, answers: list[list[str]], labels: list[list[int]]
) -> dict[str, Any]:
    count = max(1, len(answers))
    return {
        "image": picture(image_id),
        "questions": [f"Q{first + i}?" for i in range(count)],
        "answers": answers,
        "answer_labels": labels,
        "answer_scores": [[1.0, 0.3][: len(one)] for one in answers],
        "image_id": image_id,
        "question_id": [first + i for i in range(count)],
        "split": "train",
    }


def test_captions(tmp_path: Path) -> None:
    for split, first in (("val", 0), ("train", 3), ("test", 6), ("restval", 9)):
        write(tmp_path / f"coco_caption_karpathy_{split}.arrow", captions(first, 3, split="x"), batch=2)
    found = read(tmp_path)
    assert [row.split for row in found] == [s for s in ("train", "restval", "val", "test") for _ in range(3)]
    assert found[0].image_id == "3.jpg"
    assert stored(found[0]) == [picture(3)]
    assert isinstance(found[0].images[0], Slice)  # not read before a worker wants it
    assert found[0].columns == {"captions": ["c3", "d3"]}
    assert found[0].dropped == {"duplicate_text": 1}
    assert found[2].where.endswith("coco_caption_karpathy_train.arrow: row 2")


def test_numbered_files_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in range(12):
        write(tmp_path / f"conceptual_caption_train_{number}.arrow", captions(number, 1, split="cc"))
    empty: dict[str, list[str]] = {
        name: [] for name in ("image", "caption", "image_id", "split")
    }  # for an exact multiple of 100,000
    with pa.OSFile(str(tmp_path / "conceptual_caption_train_12.arrow"), "wb") as sink:
        table = pa.table(empty)
        with pa.RecordBatchFileWriter(sink, table.schema) as writer:
            writer.write_table(table)
    write(tmp_path / "conceptual_caption_val_0.arrow", captions(50, 1, split="cc"))
    assert [row.image_id for row in read(tmp_path)] == [f"{i}.jpg" for i in (*range(12), 50)]
    shuffled = list(reversed(SOURCE.find(tmp_path)))
    assert [row.image_id for row in read(tmp_path, files=shuffled)] == [f"{i}.jpg" for i in (*range(12), 50)]
    (tmp_path / "conceptual_caption_train_7.arrow").unlink()
    with pytest.raises(AnnotationError, match="conceptual_caption, train: number 7 of 13 files is missing"):
        SOURCE.find(tmp_path)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("vg", "train"),
        ("sbu_8", "train"),
        ("f30k_caption_karpathy_test", "test"),
        ("mine_2014", "train"),
        ("nlvr2_balanced_test1", "balanced_test1"),
        ("vqav2_test-dev", "test-dev"),
        ("vqav2_trainable_val_fix", "trainable_val"),
        ("vgqa_coco_val", "val"),
    ],
)
def test_file_names(name: str, split: str, tmp_path: Path) -> None:
    write(tmp_path / f"{name}.arrow", captions(0, 1, x=[4], width=[3]))
    assert [row.split for row in read(tmp_path, files=[tmp_path / f"{name}.arrow"])] == [split]


def test_several_data_sets_in_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("sbu_0", "sbu_1", "vg"):
        write(tmp_path / "raw" / f"{name}.arrow", captions(0, 2))
    command = ["convert", "reference-arrow", "--raw", str(tmp_path / "raw"), "--workers", "1"]
    command += ["--out", str(tmp_path / "out")]
    assert main(command) == 1
    assert "files of 2 data sets (sbu, vg); choose one" in capsys.readouterr().err
    assert main([*command, "--annotations", "sbu_*.arrow"]) == 0
    manifest = read_manifest(tmp_path / "out")
    assert [source.file for source in manifest.sources] == ["sbu_0.arrow", "sbu_1.arrow"]
    assert (manifest.splits["train"].rows, manifest.splits["train"].texts) == (4, 8)
    assert "answers" not in manifest.options
    assert faults(tmp_path / "out") == []
    assert main([*command, "--annotations", "f30k_*.arrow"]) == 1


def test_questions(tmp_path: Path) -> None:
    train = [
        question_row(7, 70, [["red", "two"], []], [[0, 2], []]),
        question_row(5, 50, [["yes"]], [[1]]),
    ]
    write(tmp_path / "raw" / "vqav2_train_fix.arrow", train)
    write(tmp_path / "raw" / "vqav2_val_fix.arrow", [question_row(9, 90, [["red"]], [[0]])])
    tests = [question_row(11, 110, [], [])]  # whose lists are empty: columns of type list<null>
    write(tmp_path / "test" / "vqav2_test.arrow", tests)
    assert SOURCE.answers is not None
    raw = tmp_path / "raw"
    assert SOURCE.answers(Request(raw, SOURCE.find(raw))) == ["red", "yes", "two"]
    first, _, third = read(raw, ("red", "yes", "two"))
    assert (first.split, first.image_id, third.split) == ("train", "7", "val")
    assert first.columns == {
        "questions": ["Q70?"],
        "question_ids": [70],
        "answers": [["red", "two"]],
        "labels": [[0, 2]],
        "scores": [[1.0, 0.3]],
    }
    assert first.dropped == {"no_known_answer": 1}
    out = str(tmp_path / "out")
    assert main(["convert", "reference-arrow", "--raw", str(raw), "--workers", "1", "--out", out]) == 0
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.task, manifest.options) == ("vqa", {"answers": ["red", "yes", "two"]})
    assert faults(tmp_path / "out") == []
    with pytest.raises(AnnotationError, match=r"vqav2_test\.arrow: label 0 has no answer .* give --answers"):
        SOURCE.answers(Request(tmp_path / "test", SOURCE.find(tmp_path / "test")))
    (row,) = read(tmp_path / "test", ("red",))
    assert (row.split, row.columns["answers"], row.columns["questions"]) == ("test", [[]], ["Q110?"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer_labels": [[1]]}, "with its label in the vocabulary"),
        ({"answers": [["green"]]}, "with its label in the vocabulary"),
        ({"answers": [["red", "red"]], "answer_labels": [[0, 0]]}, "expected each once"),
        ({"answer_scores": [[float("nan")]]}, "expected 0 to 1"),
        ({"answer_scores": [[]]}, "expected 0 to 1"),
        ({"question_id": [1, 2]}, "expected an id, answers, labels and scores for each question"),
        ({"questions": None}, "questions: found None"),
    ],
)
def test_wrong_questions(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(tmp_path / "vqav2_train.arrow", [{**question_row(7, 70, [["red"]], [[0]]), **change}])
    with pytest.raises(AnnotationError, match=rf"vqav2_train\.arrow: row 0: .*{message}"):
        read(tmp_path, ("red", "yes"))


def test_statements(tmp_path: Path) -> None:
    row = {
        "image_0": picture(1),
        "image_1": picture(2),
        "questions": ["Both are red.", " ", "One is."],
        "answers": ["True", "False", "False"],
        "identifier": "dev-850-0",
    }
    write(tmp_path / "raw" / "nlvr2_dev.arrow", [row])
    (found,) = read(tmp_path / "raw")
    assert (found.split, found.image_id, stored(found)) == ("dev", "dev-850-0", [picture(1), picture(2)])
    assert found.columns == {
        "statements": ["Both are red.", "One is."],
        "identifiers": ["dev-850-0-0", "dev-850-0-2"],
        "labels": [1, 0],
    }
    assert found.dropped == {"empty_text": 1}
    write(tmp_path / "bad" / "nlvr2_dev.arrow", [{**row, "answers": ["True", "False", "maybe"]}])
    with pytest.raises(AnnotationError, match="expected True or False for each statement"):
        read(tmp_path / "bad")


def test_entailment(tmp_path: Path) -> None:
    pairs = [["A man.", "He sleeps."], ["A man.", ""], ["A man.", "A person."]]
    row = {"image": picture(1), "sentences": pairs, "labels": [0, 1, 2]}
    write(tmp_path / "raw" / "snli_test.arrow", [row, row])
    found = read(tmp_path / "raw")
    assert [(row.split, row.image_id) for row in found] == [("test", "snli_test/0"), ("test", "snli_test/1")]
    assert found[0].columns == {
        "hypotheses": ["He sleeps.", "A person."],
        "premises": ["A man.", "A man."],
        "labels": [0, 2],
    }
    for change, message in (
        ({"labels": [0, 1, 3]}, "expected 0, 1 or 2"),
        ({"sentences": [["a"], ["b"], ["c"]]}, "expected premise and hypothesis"),
    ):
        write(tmp_path / "bad" / "snli_test.arrow", [{**row, **change}])
        with pytest.raises(AnnotationError, match=message):
            read(tmp_path / "bad")


def test_compressed_files_and_missing_pictures(tmp_path: Path) -> None:
    table = pa.Table.from_pylist([*captions(0, 2), {**captions(2, 1)[0], "image": None}])
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with (
        pa.OSFile(str(tmp_path / "vg.arrow"), "wb") as sink,
        pa.ipc.new_file(sink, table.schema, options=options) as writer,
    ):
        writer.write_table(table)
    assert [stored(row) for row in read(tmp_path)] == [[picture(0)], [picture(1)], [b""]]


def test_files_that_are_something_else(tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match=r"no \.arrow files"):
        SOURCE.find(tmp_path)
    path = tmp_path / "x.arrow"
    write(path, [{"picture": b"", "caption": ["a"]}])
    with pytest.raises(AnnotationError, match=r"x\.arrow: columns .*expected image, caption, image_id; or"):
        read(tmp_path)
    write(path, [{"image": "text", "caption": ["a"], "image_id": "1"}])
    with pytest.raises(AnnotationError, match="expected the bytes of a picture"):
        read(tmp_path)
    write(tmp_path / "x_0.arrow", captions(0, 1))
    write(path, [{"image": b"", "sentences": [["a", "b"]], "labels": [1]}])
    with pytest.raises(AnnotationError, match="convert them one by one"):
        read(tmp_path)


def test_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "vg.arrow"
    write(path, captions(0, 40), batch=7)
    whole = path.read_bytes()
    draws = random.Random(0)
    faults_seen = 0
    for trial in range(150):
        data = bytearray(whole)
        if trial % 3 == 0:
            del data[draws.randrange(len(data)) :]
        else:
            for _ in range(draws.choice((1, 8, 64))):
                data[draws.randrange(len(data))] = draws.randrange(256)
        path.write_bytes(data)
        try:
            for row in read(tmp_path):
                assert all(text.encode("utf-8") for text in row.columns["captions"])
        except AnnotationError as error:
            faults_seen += 1
            message = str(error)
            assert "vg.arrow" in message
            assert len(message) < 1000
    assert faults_seen >= 50
