"""CIFAR's binary records and GLUE's tables: every row, and one clear error for what is broken."""

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_tools.cli import main
from data_tools.shard_format import read_manifest
from data_tools.sources import SOURCES, AnnotationError, Request, Row
from data_tools.sources.base import text_fault
from data_tools.sources.cifar import _png
from data_tools.sources.glue import TASKS
from tests.helpers.conversion import faults, stored
from tests.helpers.probe_files import (
    GLUE_HEADERS,
    cifar_record,
    glue_line,
    glue_samples,
    write_cifar10,
    write_cifar100,
    write_glue,
)


def rows(name: str, raw: Path) -> list[Row]:
    source = SOURCES[name]
    request = Request(raw, source.find(raw))
    answers = source.answers(request) if source.answers is not None else []
    return list(source.rows(Request(raw, request.annotations, answers=answers)))


def pixels(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        assert image.mode == "RGB"
        return np.asarray(image)


def test_cifar10_keeps_every_pixel(tmp_path: Path) -> None:
    folder = write_cifar10(tmp_path)
    found = rows("cifar10", tmp_path)
    assert [row.split for row in found] == ["train"] * 15 + ["test"] * 4
    for number, row in enumerate(found[:15]):
        name = f"data_batch_{number // 3 + 1}.bin"
        record = (folder / name).read_bytes()[number % 3 * 3073 :][:3073]
        assert row.image_id == f"{name}:{number % 3}"
        assert row.columns == {"classes": [f"class {record[0]}"], "labels": [record[0]]}
        planes = np.frombuffer(record[1:], np.uint8).reshape(3, 32, 32)
        assert np.array_equal(pixels(stored(row)[0]), planes.transpose(1, 2, 0))
    assert SOURCES["cifar10"].find(folder) == SOURCES["cifar10"].find(tmp_path)  # the folder itself will do


@given(st.binary(min_size=3072, max_size=3072))
def test_any_pixels_survive_as_png(data: bytes) -> None:
    shown = pixels(_png(data))
    assert shown.transpose(2, 0, 1).tobytes() == data


def test_cifar100_takes_the_fine_label(tmp_path: Path) -> None:
    write_cifar100(tmp_path)
    found = rows("cifar100", tmp_path)
    assert [(row.split, row.columns["labels"]) for row in found[:3]] == [
        ("train", [3]),
        ("train", [99]),
        ("train", [0]),
    ]
    assert found[4].columns["classes"] == ["fine 99"]
    assert {row.split for row in found[3:]} == {"test"}


def test_broken_cifar_files(tmp_path: Path) -> None:
    folder = write_cifar10(tmp_path)
    batch, names = folder / "data_batch_2.bin", folder / "batches.meta.txt"
    draws = np.random.default_rng(0)
    good = cifar_record(9, draws)
    for content, message in (
        (good + good[:-1], r"data_batch_2\.bin: record 1: cut short: 3072 bytes, expected 3073"),
        (good + cifar_record(10, draws), r"data_batch_2\.bin: record 1: label: found 10, expected 0 to 9"),
        (b"", r"data_batch_2\.bin: empty, expected records of 3073 bytes"),
    ):
        batch.write_bytes(content)
        with pytest.raises(AnnotationError, match=message):
            rows("cifar10", tmp_path)
    batch.unlink()
    with pytest.raises(
        AnnotationError, match=r"data_batch_2\.bin: not there; expected batches\.meta\.txt and"
    ):
        rows("cifar10", tmp_path)
    batch.write_bytes(good)
    names.write_text("cat\ndog\n")
    with pytest.raises(AnnotationError, match=r"batches\.meta\.txt: 2 names, expected 10"):
        rows("cifar10", tmp_path)
    names.write_text("cat\n" * 10)
    with pytest.raises(AnnotationError, match="10 answers, twice"):
        rows("cifar10", tmp_path)


def test_every_glue_task_in_one_folder(tmp_path: Path) -> None:
    write_glue(tmp_path)
    found = rows("glue", tmp_path)
    splits = dict.fromkeys(row.split for row in found)
    wanted = [f"{name}-{one}" for name, task in TASKS.items() for one in task.sets]
    assert list(splits) == wanted
    for task in GLUE_HEADERS:
        name = next(name for name, one in TASKS.items() if one.folder == task)
        own = [row for row in found if row.split == f"{name}-train"]
        for row, (first, second, label) in zip(own, glue_samples(task, 7, seed=0), strict=True):
            classes = TASKS[name].classes
            number = float(classes.index(label)) if classes else float(label)
            pair = "" if task in ("CoLA", "SST-2") else second
            assert row.columns == {
                "sentences": [first],
                "second_sentences": [pair],
                "labels": [number],
            }, task
            assert row.images == ()
    assert found[0].image_id == "CoLA/train.tsv:1"  # no header
    assert next(row for row in found if row.split == "rte-dev").image_id == "RTE/dev.tsv:2"


def test_microsofts_mrpc_is_cut_as_glue_does(tmp_path: Path) -> None:
    folder = tmp_path / "MRPC"
    folder.mkdir()
    lines = [GLUE_HEADERS["MRPC"]] + [glue_line("MRPC", n, f"one {n}", f"two {n}", "1") for n in range(5)]
    (folder / "msr_paraphrase_train.txt").write_text("\ufeff" + "\r\n".join(lines) + "\r\n", "utf-8")
    (folder / "msr_paraphrase_test.txt").write_text("not looked at")
    assert [row.split for row in rows("glue", tmp_path)] == ["mrpc-train"] * 5
    (folder / "dev_ids.tsv").write_text("101\t201\n104\t204\n")
    found = [(row.split, row.columns["sentences"][0]) for row in rows("glue", tmp_path)]
    assert found == [
        ("mrpc-train", "one 0"),
        ("mrpc-train", "one 2"),
        ("mrpc-train", "one 3"),
        ("mrpc-dev", "one 1"),
        ("mrpc-dev", "one 4"),
    ]


@pytest.mark.parametrize(
    ("task", "line", "message"),
    [
        ("SST-2", "no label", r"line 3: 1 fields, expected 2: sentence, label"),
        ("SST-2", "fine\t2", r"line 3: field 'label': found '2', expected one of 0, 1"),
        ("RTE", "0\ta\tb\tneutral", r"found 'neutral', expected one of entailment, not_entailment"),
        ("MNLI", "0\t1\t2\tgenre\ta\tb\t-\t-", r"field 'gold_label': found '-'"),
        (
            "STS-B",
            "0\tg\tf\t1\t0\ta\tb\tx\ty\tnan",
            r"field 'score': found 'nan', expected a number from 0 to 5",
        ),
        ("STS-B", "0\tg\tf\t1\t0\ta\tb\tx\ty\t5.01", r"found '5.01'"),
        ("CoLA", "gj04\t1\tall right", r"line 3: 3 fields, expected 4: source, label, star, sentence"),
        ("QQP", "0\t1\t2\ta\tb\t1\textra", r"line 3: 7 fields, expected 6"),
    ],
)
def test_broken_lines(task: str, line: str, message: str, tmp_path: Path) -> None:
    folder = write_glue(tmp_path, (task,))
    sets = folder / task / "train.tsv"
    lines = sets.read_text("utf-8").splitlines()
    sets.write_text("\n".join([*lines[:2], line, *lines[2:]]), "utf-8")
    with pytest.raises(AnnotationError, match=rf"{task}/train\.tsv: .*{message}"):
        rows("glue", tmp_path)


def test_lines_and_sentences_that_are_left_out(tmp_path: Path) -> None:
    folder = write_glue(tmp_path, ("QQP",))
    sets = folder / "QQP" / "train.tsv"
    broken = [
        "7\t1\t2\tWhat is a",
        "line break?\tWhat?\t0",
        "8\t1\t2\t \tWhat?\t0",
        "9\t1\t2\ta\x01b\tWhat?\t1",
    ]
    sets.write_text("\n".join([sets.read_text("utf-8").rstrip(), *broken]), "utf-8")
    found = [row for row in rows("glue", tmp_path) if row.split == "qqp-train"]
    assert [row.dropped for row in found[7:]] == [
        {"cut_line": 1},
        {"cut_line": 1},
        {"empty_text": 1},
        {"bad_text": 1},
    ]
    assert all(row.columns["labels"] == [] for row in found[7:])


def test_foreign_headers_and_folders(tmp_path: Path) -> None:
    folder = write_glue(tmp_path, ("RTE",))
    (folder / "RTE" / "dev.tsv").write_text("premise\thypothesis\tlabel\n")
    with pytest.raises(
        AnnotationError, match=r"dev\.tsv: line 1: columns .*; expected label, sentence1, sentence2"
    ):
        rows("glue", tmp_path)
    (tmp_path / "WNLI").mkdir()
    (tmp_path / "WNLI" / "train.tsv").write_text("")
    with pytest.raises(AnnotationError, match="folder 'WNLI': expected one of CoLA"):
        list(SOURCES["glue"].rows(Request(tmp_path, [tmp_path / "WNLI" / "train.tsv"])))
    with pytest.raises(AnnotationError, match=r"test\.tsv: expected train\.tsv, dev\.tsv"):
        list(SOURCES["glue"].rows(Request(tmp_path, [folder / "RTE" / "test.tsv"])))


@given(
    st.lists(
        st.tuples(
            st.text(st.characters(exclude_characters="\n\t\r", exclude_categories=["Cs"])),
            st.sampled_from("01"),
        )
    )
)
def test_any_sentence_comes_through(
    tmp_path_factory: pytest.TempPathFactory, samples: list[tuple[str, str]]
) -> None:
    folder = tmp_path_factory.mktemp("glue") / "SST-2"
    folder.mkdir()
    lines = ["sentence\tlabel", *(f"{text}\t{label}" for text, label in samples)]
    (folder / "train.tsv").write_bytes("\n".join(lines).encode())
    found = rows("glue", folder.parent)
    assert len(found) == len(samples)
    for row, (text, label) in zip(found, samples, strict=True):
        fault = text_fault(text.strip())
        if fault:
            assert row.dropped == {fault: 1}
            assert row.columns["sentences"] == []
        else:
            assert row.columns["sentences"] == [text.strip()]
            assert row.columns["labels"] == [float(label)]


def test_from_raw_files_to_shards_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_cifar10(tmp_path / "raw")
    write_glue(tmp_path / "raw", ("SST-2", "STS-B"))
    for name in ("cifar10", "glue"):
        command = ["convert", name, "--raw", str(tmp_path / "raw"), "--out", str(tmp_path / name)]
        assert main([*command, "--workers", "1", "--policy", "error"]) == 0
        assert faults(tmp_path / name) == []
        assert main(["stats", str(tmp_path / name)]) == 0
        assert main(["peek", str(tmp_path / name), "--png", str(tmp_path / f"{name}.png")]) == 0
        with Image.open(tmp_path / f"{name}.png") as sheet:
            assert min(sheet.size) > 100
    output = capsys.readouterr().out
    assert "cifar10: train: 15 images, 15 texts" in output
    assert "glue: sst2-train: 7 rows, 7 texts" in output
    assert "train data_batch_1.bin:0 (32x32, " in output
    assert "class 0 -- label 0" in output
    assert "sst2-dev SST-2/dev.tsv:2\n    the " in output
    counted = [line.split()[:5] for line in output.splitlines()]
    assert ["stsb-dev", "5", "1500", "5", "1500"] in counted
    assert read_manifest(tmp_path / "cifar10").options["answers"] == [f"class {i}" for i in range(10)]
