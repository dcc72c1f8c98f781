"""Batches of the fine-tuning tasks: labels, second images, false texts, and what is wrong with the data."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mt_deepspeed.config import RunConfig
from mt_deepspeed.data.corpus import Corpus
from mt_deepspeed.data.images import decode_image
from mt_deepspeed.data.pipeline import (
    TrainStream,
    eval_batches,
    eval_sample_ids,
)
from mt_deepspeed.data.retrieval_items import RetrievalItems
from mt_deepspeed.data.shards import ShardReadError
from mt_deepspeed.data.task_batches import SCHEMA_OF_TASK
from mt_deepspeed.data.transforms import ImageTransform
from tests.helpers.datasets import make_rows, write_dataset
from tests.helpers.task_datasets import entailment_rows, nlvr2_rows, vqa_rows
from tests.helpers.task_runs import ANSWERS, NUM_ANSWERS, task_config, training_batches, write_task_root


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_task_root(tmp_path_factory.mktemp("tasks"))


def corpus(config: RunConfig) -> Corpus:
    return Corpus(config.data.train, config.data.root, "data.train", SCHEMA_OF_TASK[config.task])


def test_answers_stand_where_their_labels_say(root: Path) -> None:
    config = task_config(root, "vqa")
    data = corpus(config)
    for batch in training_batches(config):
        assert batch["answer_scores"].shape == (3, NUM_ANSWERS)
        for row, index in enumerate(batch["sample_ids"].tolist()):
            note = data.annotations(index)
            wanted = torch.zeros(NUM_ANSWERS)
            wanted[note["labels"]] = torch.tensor(note["scores"])
            assert torch.equal(batch["answer_scores"][row], wanted)
            assert batch["question_ids"][row] == note["question_ids"]
    test = task_config(root, "vqa", data={"eval": [{"path": "vqa", "splits": ["test"]}]})
    batches = list(eval_batches(test, 0, 1))
    assert all(not batch["answer_scores"].any() for batch in batches)
    assert sum(len(batch["question_ids"]) for batch in batches) == len(eval_sample_ids(test))


def test_labels_and_data_set_numbers(root: Path) -> None:
    config = task_config(root, "snli_ve")
    data = corpus(config)
    for batch in training_batches(config):
        assert batch["labels"].tolist() == [
            data.annotations(i)["labels"] for i in batch["sample_ids"].tolist()
        ]
    sets = torch.cat([batch["dataset_ids"] for batch in eval_batches(config, 0, 1)])
    assert sets.tolist() == [0] * 9 + [1] * 6


def test_second_images_follow_the_first(root: Path) -> None:
    config = task_config(root, "nlvr2", data={"train_transform": "albef"})
    transform = ImageTransform("albef", 16, train=False)
    wanted = {
        (pair["image_id"], statement): label
        for pair in nlvr2_rows(10)
        for statement, label in zip(pair["statements"], pair["labels"], strict=True)
    }
    data = corpus(config)
    for batch in training_batches(config):
        assert batch["pixels"].shape == (6, 3, 16, 16)
        for row, index in enumerate(batch["sample_ids"].tolist()):
            sample = data.sample(index)
            assert batch["labels"][row] == wanted[f"dev-{sample.row}-0", sample.caption]
            for number in (0, 1):
                raw = decode_image(data.image(0, sample.row, number).data)
                assert torch.equal(
                    batch["pixels"][row + 3 * number], transform(raw, np.random.default_rng(0))
                )


def test_texts_of_one_image_share_its_number(root: Path) -> None:
    config = task_config(root, "retrieval")
    data = corpus(config)
    for batch in training_batches(config):
        assert batch["image_ids"].tolist() == [data.sample(i).row for i in batch["sample_ids"].tolist()]


def test_retrieval_meets_every_image_and_text_once(root: Path) -> None:
    items = RetrievalItems(task_config(root, "retrieval"), 0, 1)
    rows = make_rows(5, seed=50)
    owners = [row for row, one in enumerate(rows) for _ in one["captions"]]
    assert items.image_of_text.tolist() == owners
    assert (items.num_images, items.num_texts) == (5, len(owners))
    pixels = torch.cat(list(items.pixels([[3, 1], [0, 2, 4]])))
    transform = ImageTransform("albef", 16, train=False)
    for row, image in enumerate([3, 1, 0, 2, 4]):
        raw = decode_image(np.frombuffer(rows[image]["image"], dtype=np.uint8))
        assert torch.equal(pixels[row], transform(raw, np.random.default_rng(0)))


def test_a_split_named_twice_is_refused(root: Path) -> None:
    twice = [{"path": "captions", "splits": ["val"]}, {"path": "captions", "splits": ["train", "val"]}]
    config = task_config(root, "retrieval", data={"eval": twice})
    with pytest.raises(ValueError, match="split 'val' of captions is named 2 times"):
        RetrievalItems(config, 0, 1)


def test_false_texts_belong_to_other_images(root: Path) -> None:
    config = task_config(root, "retrieval", retrieval={"objective": "false_texts"})
    data = corpus(config)
    owners: dict[tuple[int, ...], int] = {}
    stream = TrainStream(config, 0, 1)
    for index in range(data.num_pairs):
        sample = data.sample(index)
        ids = stream._maker.maker.tokenizer.encode(sample.caption).ids  # type: ignore[attr-defined]
        owners[tuple(ids.tolist())] = sample.row
    for batch in training_batches(config):
        assert batch["choice_ids"].shape[:2] == (3, 3)
        assert batch["itm_labels"].shape == (3,)
        for row, image in enumerate(batch["image_ids"].tolist()):
            masks = batch["choice_mask"][row].bool()
            found = [
                owners[tuple(ids[mask].tolist())]
                for ids, mask in zip(batch["choice_ids"][row], masks, strict=True)
            ]
            assert found[0] == image
            assert image not in found[1:]


def broken(
    tmp_path: Path, root: Path, task: str, rows: dict[str, list[dict[str, Any]]], **changes: Any
) -> RunConfig:
    options = changes.pop("options", {"answers": ANSWERS})
    write_dataset(tmp_path / "broken", rows, task=SCHEMA_OF_TASK[task], options=options)
    splits = [{"path": str(tmp_path / "broken"), "splits": [name]} for name in rows]
    return task_config(root, task, data={"train": splits}, **changes)


def test_unknown_labels_are_named(tmp_path: Path, root: Path) -> None:
    questions = vqa_rows(6, NUM_ANSWERS)
    questions[2]["labels"][1][0] = NUM_ANSWERS
    config = broken(tmp_path, root, "vqa", {"train": questions})
    with pytest.raises(
        ShardReadError, match=r"train-00000\.arrow: row 2: .*question 21: found label 6, .* 0 to 5"
    ):
        training_batches(config)


def test_an_unknown_class_is_named(tmp_path: Path, root: Path) -> None:
    sentences = entailment_rows(4)
    sentences[3]["labels"][0] = 3
    with pytest.raises(ShardReadError, match=r"row 3: .*found label 3, expected 0 to 2"):
        training_batches(broken(tmp_path, root, "snli_ve", {"train": sentences}))


def test_data_without_answers_is_refused_before_training(tmp_path: Path, root: Path) -> None:
    test = vqa_rows(6, NUM_ANSWERS, answered=False)
    with pytest.raises(ValueError, match=r"data\.train: .*a question has no answers"):
        TrainStream(broken(tmp_path, root, "vqa", {"test": test}), 0, 1)


def test_one_question_without_answers_is_named(tmp_path: Path, root: Path) -> None:
    rows = vqa_rows(100, NUM_ANSWERS)
    rows[1]["labels"][0], rows[1]["answers"][0], rows[1]["scores"][0] = [], [], []
    config = broken(tmp_path, root, "vqa", {"train": rows})
    with pytest.raises(ValueError, match=r"row 1: .*question 10: found no answer|a question has no answers"):
        training_batches(config, steps=40)


def test_other_answer_vocabularies_are_refused(tmp_path: Path, root: Path) -> None:
    rows = {"train": vqa_rows(6, NUM_ANSWERS)}
    with pytest.raises(ValueError, match=r"6 answers, classifier\.num_answers is 7"):
        TrainStream(task_config(root, "vqa", classifier={"num_answers": 7}), 0, 1)
    config = broken(tmp_path, root, "vqa", rows, options={"answers": ANSWERS[::-1]})
    mixed = task_config(root, "vqa", data={"train": [{"path": "vqa"}, {"path": str(tmp_path / "broken")}]})
    assert config.data.train[0].path == str(tmp_path / "broken")
    with pytest.raises(ValueError, match=r"answer 0 is 'answer 5', but 'answer 0' in .*vqa"):
        TrainStream(mixed, 0, 1)
    broken(tmp_path / "none", root, "vqa", rows, options={})
    nameless = task_config(root, "vqa", data={"train": [{"path": str(tmp_path / "none" / "broken")}]})
    with pytest.raises(ValueError, match="names no answers"):
        TrainStream(nameless, 0, 1)


def test_false_texts_need_two_images_with_texts(tmp_path: Path, root: Path) -> None:
    rows = [{**row, "captions": row["captions"] if i == 3 else []} for i, row in enumerate(make_rows(8))]
    rows[3]["captions"] = ["one", "two", "three", "four", "five", "six"]
    config = broken(
        tmp_path, root, "retrieval", {"train": rows}, options={}, retrieval={"objective": "false_texts"}
    )
    with pytest.raises(ValueError, match=r"data\.train: .*broken: false texts are drawn from other images"):
        TrainStream(config, 0, 1)


def test_data_of_another_task_or_none_is_refused(tmp_path: Path, root: Path) -> None:
    wrong = task_config(root, "vqa", data={"train": [{"path": "nlvr2"}]})
    with pytest.raises(ValueError, match="task 'nlvr2', expected 'vqa'"):
        TrainStream(wrong, 0, 1)
    empty = broken(tmp_path, root, "snli_ve", {"train": []})
    with pytest.raises(ValueError, match=r"splits \['train'\] hold no texts"):
        TrainStream(empty, 0, 1)
    with pytest.raises(ValueError, match="fewer than train"):
        TrainStream(task_config(root, "vqa", train={"global_batch_size": 600}), 0, 1)


def test_an_image_that_fails_is_named(tmp_path: Path, root: Path) -> None:
    rows = nlvr2_rows(3)
    rows[1]["image_1"] = rows[1]["image_1"][:40]
    config = broken(tmp_path, root, "nlvr2", {"train": rows})
    with pytest.raises(ShardReadError, match=r"train-00000\.arrow: row 1: image 'dev-1-0': cannot decode"):
        training_batches(config)
