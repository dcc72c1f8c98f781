"""Rows of the task data sets, in the columns of `data_tools.schemas`."""

from typing import Any

from tests.helpers.datasets import encode_image

Row = dict[str, Any]


def vqa_rows(count: int, num_answers: int, seed: int = 0, answered: bool = True) -> list[Row]:
    """Pictures with one to three questions; the label of a question follows from its words."""
    rows = []
    for i in range(count):
        numbers = range(i % 3 + 1)
        labels = [[(i + k) % num_answers, (i + k + 1) % num_answers] for k in numbers] if answered else []
        rows.append(
            {
                "image": encode_image(seed + i),
                "questions": [f"is it {(i + k) % num_answers} ?" for k in numbers],
                "question_ids": [(seed + i) * 10 + k for k in numbers],
                "answers": [[f"answer {label}" for label in both] for both in labels]
                or [[] for _ in numbers],
                "labels": labels or [[] for _ in numbers],
                "scores": [[1.0, 0.3125] for _ in labels] or [[] for _ in numbers],
                "image_id": str(seed + i),
                "width": 24,
                "height": 20,
            }
        )
    return rows


def nlvr2_rows(count: int, seed: int = 0) -> list[Row]:
    """Pairs of pictures with two statements each, one of them true."""
    return [
        {
            "image_0": encode_image(seed + 2 * i),
            "image_1": encode_image(seed + 2 * i + 1),
            "statements": ["the left one is red", "the right one is red"],
            "identifiers": [f"dev-{seed + i}-0-0", f"dev-{seed + i}-0-1"],
            "labels": [i % 2, 1 - i % 2],
            "image_id": f"dev-{seed + i}-0",
            "width_0": 24,
            "height_0": 20,
            "width_1": 24,
            "height_1": 20,
        }
        for i in range(count)
    ]


def entailment_rows(count: int, seed: int = 0) -> list[Row]:
    """Pictures with three hypotheses, one of each label."""
    return [
        {
            "image": encode_image(seed + i),
            "hypotheses": ["a red ball", "a blue ball", "someone likes it"],
            "premises": [f"premise {i}"] * 3,
            "labels": [2, 0, 1],
            "image_id": f"{seed + i}.jpg",
            "width": 24,
            "height": 20,
        }
        for i in range(count)
    ]
