"""Answers of VQA data sets: their normal form, the vocabulary, soft scores.

The normal form is that of the public VQA evaluation toolkit, whose odd corners decide which answers are in the
vocabulary: punctuation goes by rules that look at the whole answer, and the first 32 lone periods at most.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from data_tools.shard_format import MANIFEST_NAME, read_manifest
from data_tools.sources.base import AnnotationError

MIN_COUNT = 9
"""How often an answer must be the majority answer of a question to be in the vocabulary."""

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGITS_WITH_COMMA = re.compile(r"\d,\d")
_LONE_PERIOD = re.compile(r"\.(?!\d)")
_MAX_PERIODS = 32
_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0", **{word: str(number) for number, word in enumerate(_NUMBER_WORDS)}}
_SCORES = (0.0, 0.3, 0.6, 0.9, 1.0)
_ARTICLES = {"a", "an", "the"}
_PAIRS = """
'ow'sat='ow's'at 'ows'at='ow's'at aint=ain't arent=aren't cant=can't couldn'tve=couldn't've
couldnt=couldn't couldnt've=couldn't've couldve=could've didnt=didn't doesnt=doesn't dont=don't
hadn'tve=hadn't've hadnt=hadn't hadnt've=hadn't've hasnt=hasn't havent=haven't he'dve=he'd've
hed=he'd hed've=he'd've hes=he's howd=how'd howll=how'll hows=how's isnt=isn't it'dve=it'd've
itd=it'd itd've=it'd've itll=it'll maam=ma'am mightn'tve=mightn't've mightnt=mightn't
mightnt've=mightn't've mightve=might've mustnt=mustn't mustve=must've neednt=needn't notve=not've
oclock=o'clock oughtnt=oughtn't ow's'at='ow's'at shant=shan't she'dve=she'd've shed've=she'd've
shouldn'tve=shouldn't've shouldnt=shouldn't shouldnt've=shouldn't've shouldve=should've
somebody'd=somebodyd somebody'dve=somebody'd've somebodyd've=somebody'd've somebodyll=somebody'll
somebodys=somebody's someone'dve=someone'd've someoned=someone'd someoned've=someone'd've
someonell=someone'll someones=someone's something'dve=something'd've somethingd=something'd
somethingd've=something'd've somethingll=something'll thats=that's there'dve=there'd've
thered=there'd thered've=there'd've therere=there're theres=there's they'dve=they'd've theyd=they'd
theyd've=they'd've theyll=they'll theyre=they're theyve=they've twas='twas wasnt=wasn't
we'dve=we'd've wed've=we'd've werent=weren't weve=we've whatll=what'll whatre=what're whats=what's
whatve=what've whens=when's whered=where'd wheres=where's whereve=where've who'dve=who'd've
whod=who'd whod've=who'd've wholl=who'll whos=who's whove=who've whyll=why'll whyre=why're
whys=why's wont=won't wouldn'tve=wouldn't've wouldnt=wouldn't wouldnt've=wouldn't've
wouldve=would've y'all'dve=y'all'd've y'alld've=y'all'd've y'allll=y'all'll yall=y'all
yall'd've=y'all'd've yall'll=y'all'll you'dve=you'd've youd=you'd youd've=you'd've youll=you'll
youre=you're youve=you've
"""
_CONTRACTIONS = dict(pair.split("=") for pair in _PAIRS.split())


def normal_answer(answer: str) -> str:
    """The form in which answers are compared."""
    delete = _DIGITS_WITH_COMMA.search(answer) is not None
    text = answer
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if delete or beside_space else " ")
    text = _LONE_PERIOD.sub("", text, _MAX_PERIODS)
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    words = [_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES]
    return " ".join(words).replace(",", "")


def vocabulary(majority_answers: Iterable[str]) -> list[str]:
    """Answers in normal form that occur at least `MIN_COUNT` times, in the order of first appearance."""
    counts = Counter(map(normal_answer, majority_answers))
    return [answer for answer, count in counts.items() if count >= MIN_COUNT]


def soft_scores(answers: Iterable[str], labels: dict[str, int]) -> dict[str, float]:
    """Answer in normal form -> score, for those of people's answers that have a label, in order."""
    counts = Counter(map(normal_answer, answers))
    return {answer: _SCORES[min(count, 4)] for answer, count in counts.items() if answer in labels}


def read_vocabulary(path: Path) -> list[str]:
    """Reads a vocabulary: a JSON list, a JSON object answer -> label, or the shards of a VQA data set.

    Raises:
        AnnotationError: It is none of these, or the labels are not 0, 1, 2, ...
    """
    if path.is_dir():
        answers = read_manifest(path).options.get("answers")
        if not isinstance(answers, list):
            raise AnnotationError(f"{path / MANIFEST_NAME}: options.answers: missing; expected VQA shards")
        return answers
    try:
        tree = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AnnotationError(f"{path}: cannot be read as JSON: {error}") from error
    if isinstance(tree, dict):
        if sorted(tree.values(), key=str) != sorted(range(len(tree)), key=str):
            raise AnnotationError(f"{path}: expected answer -> label with the labels 0 to {len(tree) - 1}")
        tree = sorted(tree, key=lambda answer: tree[answer])
    if not isinstance(tree, list) or not all(isinstance(answer, str) for answer in tree):
        raise AnnotationError(f"{path}: expected a list of answers or an object answer -> label")
    return check_vocabulary(tree, str(path))


def check_vocabulary(answers: Sequence[str], where: str) -> list[str]:
    """The answers, each of which must be there once.

    Raises:
        AnnotationError: There is none, or one twice.
    """
    if not answers or len(set(answers)) != len(answers):
        twice = [answer for answer, count in Counter(answers).items() if count > 1]
        raise AnnotationError(f"{where}: {len(answers)} answers, twice: {twice[:3]}; expected each once")
    return list(answers)
