"""The official VQA accuracy: leave-one-out over annotators, normal forms, nothing scored in part."""

import json
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.sources.answers import normal_answer
from mt_deepspeed.evaluation.vqa_accuracy import Asked, answer_accuracy, vqa_accuracy, write_submission


def by_definition(answer: str, people: Sequence[str]) -> float:
    """Mean over all nine of ten people."""
    choices = list(combinations(people, len(people) - 1))
    return sum(min(1.0, choice.count(answer) / 3) for choice in choices) / len(choices)


@given(st.lists(st.sampled_from(["red", "blue", "green"]), min_size=10, max_size=10))
def test_equals_the_definition(people: list[str]) -> None:
    for answer in ("red", "blue", "yellow"):
        found = answer_accuracy(answer, people, normal_answer)
        assert found == pytest.approx(by_definition(answer, people))
    assert 0 <= answer_accuracy("red", people, normal_answer) <= 1


def test_known_values() -> None:
    def score(agree: int) -> float:
        return answer_accuracy("red", ["red"] * agree + ["blue"] * (10 - agree), normal_answer)

    assert [round(score(agree), 9) for agree in (0, 1, 2, 3, 4, 10)] == [0, 0.3, 0.6, 0.9, 1, 1]


def test_answers_are_compared_in_normal_form_unless_all_agree() -> None:
    mixed = ["A dog."] * 6 + ["Two dogs"] * 3 + ["dont know"]
    assert answer_accuracy("dog", mixed, normal_answer) == 1
    assert answer_accuracy("2 dogs", mixed, normal_answer) == pytest.approx(0.9)
    assert answer_accuracy("don't know", mixed, normal_answer) == pytest.approx(0.3)
    assert answer_accuracy("two", ["two"] * 10, normal_answer) == 1
    assert (
        answer_accuracy("2", ["two"] * 10, normal_answer) == 0
    )  # as in the official code: nothing is changed
    assert answer_accuracy("red\tone ", ["red one"] * 10, normal_answer) == 1


def asked() -> list[Asked]:
    return [
        Asked(7, ("yes",) * 10, "yes/no"),
        Asked(3, ("2",) * 7 + ("3",) * 3, "number"),
        Asked(5, ("a red kite",) * 10, "other"),
    ]


def test_by_answer_type_and_with_a_question_outside_the_vocabulary() -> None:
    found = vqa_accuracy({7: "yes", 3: "3"}, asked(), ["yes", "2", "3"], normal_answer)
    assert found == {
        "vqa_accuracy": pytest.approx((1 + 0.9 + 0) / 3),
        "vqa_accuracy/number": pytest.approx(0.9),
        "vqa_accuracy/other": 0,
        "vqa_accuracy/yes/no": 1,
    }


def test_partial_predictions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"1 questions without a prediction \(question_id 3"):
        vqa_accuracy({7: "yes"}, asked(), ["yes", "2", "3"], normal_answer)
    with pytest.raises(ValueError, match=r"1 questions without a prediction \(question_id 5"):
        vqa_accuracy({7: "yes", 3: "3"}, asked(), ["yes", "2", "red kite"], normal_answer)
    with pytest.raises(ValueError, match=r"1 predictions without a question \(question_id 4"):
        vqa_accuracy({7: "yes", 3: "3", 4: "no"}, asked(), ["yes", "2", "3"], normal_answer)
    with pytest.raises(ValueError, match="no questions"):
        vqa_accuracy({}, [], ["yes"], normal_answer)


def test_the_submission_file(tmp_path: Path) -> None:
    write_submission({12: "yes", 3: "2 dogs"}, tmp_path / "new" / "test.json")
    rows = json.loads((tmp_path / "new" / "test.json").read_text("utf-8"))
    assert rows == [{"question_id": 3, "answer": "2 dogs"}, {"question_id": 12, "answer": "yes"}]
