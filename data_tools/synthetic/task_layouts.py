"""The world in the raw layouts of task data sets: questions, statements, entailment."""

import json
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TextIO

from data_tools.synthetic.caption_layouts import flickr_id, flickr_split, vg_picture
from data_tools.synthetic.draw import Draw
from data_tools.synthetic.layout import HELD_OUT, Layout, Record, text_files, write_list
from data_tools.synthetic.questions import answer_as_people, ask, relate, state
from data_tools.synthetic.world import Scene

QUESTIONS_PER_IMAGE = 5
STATEMENTS_PER_PAIR = 2


class _Lists:
    """JSON lists that are written as their entries come, several files at a time."""

    def __init__(self, files: dict[str, TextIO], before: dict[str, str]) -> None:
        self._files = files
        self._fresh = set(files)
        for name, file in files.items():
            file.write(before[name])

    def add(self, name: str, record: Record) -> None:
        write_list(self._files[name], name in self._fresh, record)
        self._fresh.discard(name)

    def close(self, after: str) -> None:
        for file in self._files.values():
            file.write(f"\n{after}\n")


# VQAv2: of 20 pictures 16 train, 2 val, 2 test (whose answers are not published), one of these also test-dev.


def _vqa_set(index: int) -> str:
    place = index % HELD_OUT
    if place >= HELD_OUT - 2:
        return "test2015"
    return "val2014" if place >= HELD_OUT - 4 else "train2014"


def _vqa_picture(index: int) -> tuple[str, ...]:
    folder = _vqa_set(index)
    return (f"{folder}/COCO_{folder}_{index + 1:012d}.jpg",)


def _vqa_describe(index: int, scenes: Sequence[Scene], draw: Draw, image_size: int) -> Record:
    image_id = index + 1
    questions, annotations = [], []
    for number, question in enumerate(ask(scenes[0], draw, QUESTIONS_PER_IMAGE)):
        name = {"image_id": image_id, "question_id": image_id * 1000 + number}
        people = answer_as_people(question, draw)
        questions.append({**name, "question": question.text})
        annotations.append(
            {
                "question_type": " ".join(question.text.lower().split()[:2]),
                "multiple_choice_answer": question.answer,
                "answers": [
                    {"answer": answer, "answer_confidence": "yes", "answer_id": i + 1}
                    for i, answer in enumerate(people)
                ],
                "answer_type": _answer_type(question.answer),
                **name,
            }
        )
    return {"index": index, "questions": questions, "annotations": annotations}


def _answer_type(answer: str) -> str:
    if answer in ("yes", "no"):
        return "yes/no"
    return "number" if answer.isdecimal() else "other"


def _vqa_write(folder: Path, records: Iterable[Record]) -> None:
    sets = ("train2014", "val2014", "test2015", "test-dev2015")
    questions = {name: f"v2_OpenEnded_mscoco_{name}_questions.json" for name in sets}
    annotations = {name: f"v2_mscoco_{name}_annotations.json" for name in sets[:2]}
    with ExitStack() as stack:
        opened = stack.enter_context(text_files(folder, *questions.values(), *annotations.values()))
        asked = _Lists(
            dict(zip(questions, opened, strict=False)),
            {name: f'{{"data_subtype": "{name}", "questions": [' for name in questions},
        )
        answered = _Lists(
            dict(zip(annotations, opened[len(questions) :], strict=True)),
            {name: f'{{"data_subtype": "{name}", "annotations": [' for name in annotations},
        )
        for record in records:
            name = _vqa_set(record["index"])
            own = [name, "test-dev2015"] if record["index"] % HELD_OUT == HELD_OUT - 1 else [name]
            for entry in record["questions"]:
                for list_name in own:
                    asked.add(list_name, entry)
            for entry in record["annotations"] if name in annotations else []:
                answered.add(name, entry)
        asked.close("]}")
        answered.close("]}")


# Visual Genome questions, with the file that gives the splits.


def _vgqa_describe(index: int, scenes: Sequence[Scene], draw: Draw, image_size: int) -> Record:
    image_id = index + 1
    qas = [
        {
            "a_objects": [],
            "question": question.text,
            "image_id": image_id,
            "qa_id": image_id * 1000 + number,
            "answer": f"{question.answer.capitalize()}.",
            "q_objects": [],
        }
        for number, question in enumerate(ask(scenes[0], draw, QUESTIONS_PER_IMAGE))
    ]
    return {"qas": qas, "id": image_id}


def _vgqa_write(folder: Path, records: Iterable[Record]) -> None:
    (folder / "vgqa").mkdir(exist_ok=True)
    splits: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    with text_files(folder, "question_answers.json", "vgqa/ids.json") as (file, ids):
        asked = _Lists({"": file}, {"": "["})
        for index, record in enumerate(records):
            asked.add("", record)
            splits[flickr_split(index)].append(record["id"])
        asked.close("]")
        json.dump(splits, ids)


# NLVR2: two pictures a record, named .png and holding JPEG data as in the official set.


def _nlvr2_key(index: int) -> str:
    split = {HELD_OUT - 1: "test1", HELD_OUT - 2: "dev"}.get(index % HELD_OUT, "train")
    return f"{split}-{index}-0"


def _nlvr2_pictures(index: int) -> tuple[str, ...]:
    key = _nlvr2_key(index)
    split = key.split("-")[0]
    folder = f"images/train/{index % 100}" if split == "train" else f"images/{split}"
    return tuple(f"{folder}/{key}-img{number}.png" for number in (0, 1))


def _nlvr2_describe(index: int, scenes: Sequence[Scene], draw: Draw, image_size: int) -> Record:
    key = _nlvr2_key(index)
    found = []
    for number, (statement, true) in enumerate(state(scenes[0], scenes[1], draw, STATEMENTS_PER_PAIR)):
        record: Record = {"sentence": statement, "label": str(true), "identifier": f"{key}-{number}"}
        if key.startswith("train"):
            record["directory"] = index % 100
        found.append(record)
    return found


def _nlvr2_write(folder: Path, records: Iterable[Record]) -> None:
    (folder / "data").mkdir(exist_ok=True)
    names = ("train", "dev", "test1")
    with text_files(folder, *[f"data/{name}.json" for name in names]) as opened:
        files = dict(zip(names, opened, strict=True))
        for record in records:
            for entry in record:
                files[entry["identifier"].split("-")[0]].write(json.dumps(entry) + "\n")


# SNLI-VE on photos named as Flickr30k's.


def _snli_describe(index: int, scenes: Sequence[Scene], draw: Draw, image_size: int) -> Record:
    photo = flickr_id(index)
    return [
        {
            "Flickr30K_ID": photo,
            "gold_label": label,
            "captionID": f"{photo}.jpg#0",
            "pairID": f"{photo}.jpg#0r1{label[0]}",
            "sentence1": premise,
            "sentence2": hypothesis,
        }
        for premise, hypothesis, label in relate(scenes[0], draw)
    ]


def _snli_write(folder: Path, records: Iterable[Record]) -> None:
    names = {"train": "train", "val": "dev", "test": "test"}
    with text_files(folder, *[f"snli_ve_{name}.jsonl" for name in names.values()]) as opened:
        files = dict(zip(names, opened, strict=True))
        for index, record in enumerate(records):
            for entry in record:
                files[flickr_split(index)].write(json.dumps(entry) + "\n")


TASK_LAYOUTS: dict[str, Layout] = {
    "vqav2": Layout(_vqa_picture, _vqa_describe, _vqa_write),
    "vgqa": Layout(lambda index: (vg_picture(index),), _vgqa_describe, _vgqa_write),
    "nlvr2": Layout(_nlvr2_pictures, _nlvr2_describe, _nlvr2_write),
    "snli_ve": Layout(
        lambda index: (f"flickr30k-images/{flickr_id(index)}.jpg",), _snli_describe, _snli_write
    ),
}
