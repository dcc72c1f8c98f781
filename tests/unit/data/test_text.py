"""Tokenizer and masking: RoBERTa's layout, transformers' ids, whole words, keyed randomness."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mt_deepspeed.data.keyed import Purpose, keyed_generator
from mt_deepspeed.data.text import IGNORED, CaptionTokenizer, EncodedText, load_tokenizer, train_tokenizer

VOCABULARY = 400
CAPTIONS = [
    f"{count} {size} {colour} {shape}{end}"
    for count in ("one", "two", "three")
    for size in ("small", "large", "enormous")
    for colour in ("red", "blue", "ultramarine")
    for shape in ("cube", "ball's shadow", "tetrahedron")
    for end in (".", "", " seen from above")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(CAPTIONS, folder, VOCABULARY)
    return folder


@pytest.fixture(scope="module")
def load(folder: Path) -> Callable[..., CaptionTokenizer]:
    return lambda max_text_len=50, special_in_text=False: load_tokenizer(
        str(folder), ".", max_text_len, special_in_text
    )


def test_layout_and_size(folder: Path, load: Callable[..., CaptionTokenizer]) -> None:
    vocabulary = json.loads((folder / "vocab.json").read_text("utf-8"))
    assert [vocabulary[token] for token in ("<s>", "<pad>", "</s>", "<unk>")] == [0, 1, 2, 3]
    assert vocabulary["<mask>"] == VOCABULARY - 1
    assert sorted(vocabulary.values()) == list(range(VOCABULARY))
    tokenizer = load()
    assert (tokenizer.vocab_size, tokenizer.mask_id, tokenizer.pad_id) == (VOCABULARY, VOCABULARY - 1, 1)
    assert len(tokenizer.encode("two large red cube").ids) < 10


def test_training_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    train_tokenizer(iter(CAPTIONS), tmp_path, VOCABULARY)
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_too_small_a_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 261"):
        train_tokenizer(CAPTIONS, tmp_path, 260)
    train_tokenizer(CAPTIONS, tmp_path, 261)
    assert load_tokenizer(str(tmp_path), ".", 50).vocab_size == 261


@settings(max_examples=100)
@given(text=st.text(max_size=40) | st.lists(st.sampled_from(CAPTIONS)).map(" ".join))
def test_ids_are_those_of_transformers(
    folder: Path, load: Callable[..., CaptionTokenizer], text: str
) -> None:
    tokenizer = load(64)
    assert (
        tokenizer.encode(text).ids.tolist()
        == reference(folder)(text, truncation=True, max_length=64)["input_ids"]
    )


def reference(folder: Path):  # type: ignore[no-untyped-def]
    from transformers import RobertaTokenizer

    if folder not in _REFERENCES:
        _REFERENCES[folder] = RobertaTokenizer.from_pretrained(folder)
    return _REFERENCES[folder]


_REFERENCES: dict[Path, object] = {}


def test_special_tokens_in_captions_are_plain_text(load: Callable[..., CaptionTokenizer]) -> None:
    text = "a <mask> of </s> red"
    plain = load()
    assert plain.mask_id not in plain.encode(text).ids
    assert plain.decode(plain.encode(text).ids) == text
    special = load(special_in_text=True)
    ids = special.encode(text).ids.tolist()
    assert [ids.count(special.mask_id), ids.count(special.eos_id)] == [1, 2]
    assert special.decode(ids[:3]) == "a<mask>"


def test_saved_and_pickled_tokenizers_are_equal(
    load: Callable[..., CaptionTokenizer], tmp_path: Path
) -> None:
    tokenizer = load(7)
    tokenizer.save(tmp_path / "out")
    for copy in (load_tokenizer("out", tmp_path, 7), pickle.loads(pickle.dumps(tokenizer))):
        for caption in CAPTIONS[:9]:
            assert copy.encode(caption).ids.tolist() == tokenizer.encode(caption).ids.tolist()
            assert len(copy.encode(caption).ids) <= 7


def test_whole_tokenizer_file(load: Callable[..., CaptionTokenizer], tmp_path: Path) -> None:
    load()._backend.save(str(tmp_path / "tokenizer.json"))
    copy = load_tokenizer(str(tmp_path), ".", 50)
    assert copy.encode(CAPTIONS[4]).ids.tolist() == load().encode(CAPTIONS[4]).ids.tolist()


def test_faults_name_the_folder(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ValueError, match=r"vocab\.json and merges\.txt"):
        load_tokenizer(str(tmp_path), ".", 50)
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "vocab.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        load_tokenizer(str(tmp_path), ".", 50)
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1}')
    with pytest.raises(ValueError, match="RoBERTa's layout"):
        load_tokenizer(str(tmp_path), ".", 50)


def test_words_follow_the_pre_tokenizer(load: Callable[..., CaptionTokenizer]) -> None:
    tokenizer = load()
    text = tokenizer.encode("A tetrahedron, ultramarine.")
    parts = [tokenizer.decode(text.ids[text.words == word]) for word in range(text.words.max() + 1)]
    assert parts == ["A", " tetrahedron", ",", " ultramarine", "."]
    assert text.words[0] == text.words[-1] == -1


@settings(max_examples=60)
@given(
    caption=st.sampled_from(CAPTIONS),
    seed=st.integers(0, 2**32),
    probability=st.floats(0.0, 1.0),
    whole_words=st.booleans(),
)
def test_masking(
    load: Callable[..., CaptionTokenizer], caption: str, seed: int, probability: float, whole_words: bool
) -> None:
    tokenizer = load()
    text = tokenizer.encode(caption)
    ids, labels = tokenizer.mask(text, keyed_generator(seed, 3, Purpose.MASK), probability, whole_words)
    chosen = labels != IGNORED
    assert chosen.any()
    assert not chosen[text.words < 0].any()
    assert np.array_equal(labels[chosen], text.ids[chosen])
    assert np.array_equal(ids[~chosen], text.ids[~chosen])
    assert not set(ids[chosen]) & {0, 1, 2, 3}
    if whole_words:
        for word in range(text.words.max() + 1):
            assert len(set(chosen[text.words == word])) == 1
    again = tokenizer.mask(text, keyed_generator(seed, 3, Purpose.MASK), probability, whole_words)
    assert np.array_equal(ids, again[0])
    assert np.array_equal(labels, again[1])


@pytest.mark.parametrize("whole_words", [True, False])
def test_shares_of_masking(load: Callable[..., CaptionTokenizer], whole_words: bool) -> None:
    tokenizer = load(500)
    text = tokenizer.encode(" ".join(CAPTIONS))
    counts = np.zeros(4)
    for seed in range(100):
        ids, labels = tokenizer.mask(text, keyed_generator(seed, 0, Purpose.MASK), 0.15, whole_words)
        chosen = labels != IGNORED
        same, masked = ids[chosen] == labels[chosen], ids[chosen] == tokenizer.mask_id
        counts += [chosen.sum(), masked.sum(), same.sum(), len(text.ids) - 2]
    assert counts[0] / counts[3] == pytest.approx(0.15, abs=0.01)
    assert counts[1] / counts[0] == pytest.approx(0.8, abs=0.02)
    assert counts[2] / counts[0] == pytest.approx(0.1, abs=0.02)


def test_fillers_are_never_drawn(load: Callable[..., CaptionTokenizer]) -> None:
    tokenizer = load()
    texts = [tokenizer._backend.id_to_token(int(i)) for i in tokenizer._plain_ids]
    fillers = [text for text in tokenizer._backend.get_vocab() if text.startswith("<unused")]
    assert fillers
    assert not set(texts) & {*fillers, "<s>", "<pad>", "</s>", "<unk>", "<mask>"}


def test_a_text_without_words_has_no_labels(load: Callable[..., CaptionTokenizer]) -> None:
    empty = EncodedText(np.array([0, 2]), np.array([-1, -1]))
    ids, labels = load().mask(empty, keyed_generator(0, 0, Purpose.MASK), 0.15, True)
    assert ids.tolist() == [0, 2]
    assert labels.tolist() == [IGNORED, IGNORED]
