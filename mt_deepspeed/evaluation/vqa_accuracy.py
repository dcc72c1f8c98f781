"""The official accuracy of VQA (visualqa.org/evaluation) and the file its server takes.

An answer is compared with each nine of ten people's answers, and is right where three of the nine gave it. Answers
are brought to a normal form first, unless all people wrote the very same one.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Asked:
    """A question as its annotators answered it."""

    question_id: int
    answers: tuple[str, ...]
    """What each annotator wrote."""
    answer_type: str
    """`yes/no`, `number` or `other`."""


def answer_accuracy(answer: str, people: Sequence[str], normal: Callable[[str], str]) -> float:
    """Mean over all choices of all but one annotator of min(annotators who agree / 3, 1).

    Args:
        answer: The prediction.
        people: The annotators' answers, usually ten.
        normal: The normal form of an answer.
    """
    people, answer = [_clean(one) for one in people], _clean(answer)
    if len(set(people)) > 1:
        people, answer = [normal(one) for one in people], normal(answer)
    agree = people.count(answer)
    left_out_agrees = min(1.0, (agree - 1) / 3)
    left_out_differs = min(1.0, agree / 3)
    return (agree * left_out_agrees + (len(people) - agree) * left_out_differs) / len(people)


def vqa_accuracy(
    predictions: Mapping[int, str],
    asked: Iterable[Asked],
    vocabulary: Collection[str],
    normal: Callable[[str], str],
) -> dict[str, float]:
    """Accuracy over all questions and by answer type.

    Conversion leaves out questions none of whose answers is in the vocabulary; no prediction can be right there,
    so they count as wrong and need none.

    Args:
        predictions: question_id -> answer.
        asked: All questions of the split.
        vocabulary: The answers a prediction may be.
        normal: The normal form of an answer.

    Returns:
        `vqa_accuracy` and `vqa_accuracy/<answer type>`, from 0 to 1.

    Raises:
        ValueError: A question has no prediction or a prediction no question; nothing is scored in part.
    """
    known = set(vocabulary)
    points: dict[str, list[float]] = defaultdict(list)
    missing, seen = [], set()
    for one in asked:
        seen.add(one.question_id)
        if one.question_id in predictions:
            earned = answer_accuracy(predictions[one.question_id], one.answers, normal)
        elif known.isdisjoint(map(normal, one.answers)):
            earned = 0.0
        else:
            missing.append(one.question_id)
            continue
        points[one.answer_type].append(earned)
    refuse_partial(missing, sorted(predictions.keys() - seen))
    if not points:
        raise ValueError("the annotations hold no questions")
    every = [earned for earned_list in points.values() for earned in earned_list]
    found = {"vqa_accuracy": sum(every) / len(every)}
    for kind in sorted(points):
        found[f"vqa_accuracy/{kind}"] = sum(points[kind]) / len(points[kind])
    return found


def refuse_partial(missing: Sequence[int], unknown: Sequence[int]) -> None:
    """Refuses predictions that do not cover the questions exactly.

    Raises:
        ValueError: Names the first of them.
    """
    for ids, what in (
        (missing, "questions without a prediction"),
        (unknown, "predictions without a question"),
    ):
        if ids:
            shown = ", ".join(map(str, ids[:3]))
            raise ValueError(
                f"{len(ids)} {what} (question_id {shown}, ...): evaluate the split that they belong to"
            )


def write_submission(predictions: Mapping[int, str], path: Path) -> None:
    """Writes the file the evaluation server takes: a JSON list, each question once, in order of the ids."""
    rows = [{"question_id": number, "answer": predictions[number]} for number in sorted(predictions)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows) + "\n", "utf-8")


def _clean(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()
