"""Captions to token ids: RoBERTa's byte-level BPE, training one, and masking whole words.

Layout of the vocabulary (RoBERTa, arXiv 1907.11692): `<s>` 0, `<pad>` 1, `</s>` 2, `<unk>` 3, `<mask>` last;
a text becomes `<s> ... </s>` and is neither lower-cased nor cleaned.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

FIRST_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")
MASK_TOKEN = "<mask>"
IGNORED = -100
"""Label of positions without a loss."""

_FILLER = re.compile(r"<unused\d+>|madeupword\d+")
_Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class EncodedText:
    """One text of L tokens.

    Attributes:
        ids: [L] token ids, `<s>` and `</s>` included.
        words: [L] number of the word a token belongs to, from 0; -1 for special tokens. A word is what the
            pre-tokenizer cuts out: letters, digits, or punctuation, with the space before it.
    """

    ids: _Int64
    words: _Int64


class CaptionTokenizer:
    """A byte-level BPE tokenizer in RoBERTa's layout.

    Args:
        backend: The tokenizer proper; this object keeps it and sets its truncation.
        max_text_len: Tokens kept, `<s>` and `</s>` included.
        special_in_text: Read `<mask>` and the like in a text as special tokens. Off, they are plain text,
            which is right for captions from the web.

    Raises:
        ValueError: Special tokens are missing or not where RoBERTa has them.
    """

    def __init__(self, backend: Tokenizer, max_text_len: int, special_in_text: bool = False) -> None:
        first = tuple(backend.id_to_token(i) for i in range(len(FIRST_TOKENS)))
        mask_id = backend.token_to_id(MASK_TOKEN)
        if first != FIRST_TOKENS or mask_id is None:
            raise ValueError(
                f"tokenizer: its first tokens are {first} and the id of {MASK_TOKEN} is {mask_id}; expected "
                f"RoBERTa's layout, which starts {FIRST_TOKENS} and has a {MASK_TOKEN}"
            )
        self.bos_id, self.pad_id, self.eos_id, self.unk_id = range(len(FIRST_TOKENS))
        self.mask_id = int(mask_id)
        self.vocab_size = int(backend.get_vocab_size())
        self.max_text_len = max_text_len
        backend.no_padding()
        backend.enable_truncation(max_text_len)
        backend.encode_special_tokens = not special_in_text
        self._backend = backend
        special = {*FIRST_TOKENS, MASK_TOKEN}
        vocabulary = backend.get_vocab().items()
        plain = sorted(i for text, i in vocabulary if text not in special and not _FILLER.fullmatch(text))
        self._plain_ids = np.array(plain, dtype=np.int64)

    @property
    def vocabulary(self) -> dict[str, int]:
        """Token -> id."""
        vocabulary: dict[str, int] = self._backend.get_vocab()
        return vocabulary

    def encode(self, text: str, second: str | None = None) -> EncodedText:
        """Token ids and word numbers of one text, cut to `max_text_len` tokens.

        Two texts become `<s> text </s></s> second </s>`; what is too long is cut from the longer one.
        """
        encoding = self._backend.encode(text, second)
        words = [-1 if word is None else word for word in encoding.word_ids]
        return EncodedText(np.array(encoding.ids, dtype=np.int64), np.array(words, dtype=np.int64))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; special tokens stay visible, except padding."""
        kept = [int(i) for i in ids if i not in (self.bos_id, self.pad_id, self.eos_id)]
        return str(self._backend.decode(kept, skip_special_tokens=False))

    def mask(
        self, text: EncodedText, generator: np.random.Generator, probability: float, whole_words: bool
    ) -> tuple[_Int64, _Int64]:
        """Masks a text for MLM (BERT, arXiv 1810.04805): 80 % `<mask>`, 10 % another token, 10 % as it was.

        Args:
            text: L tokens.
            generator: The only source of randomness.
            probability: Chance of each word, or token, to be chosen; at least one always is.
            whole_words: All tokens of a word are chosen together.

        Returns:
            Masked ids [L] and labels [L]: the true id where chosen, `IGNORED` elsewhere.
        """
        ids, labels = text.ids.copy(), np.full_like(text.ids, IGNORED)
        places = np.flatnonzero(text.words >= 0)
        if not len(places):
            return ids, labels
        units = text.words[places] if whole_words else np.arange(len(places))
        unit_ids, unit_of_place = np.unique(units, return_inverse=True)
        chosen = generator.random(len(unit_ids)) < probability
        if not chosen.any():
            chosen[generator.integers(len(unit_ids))] = True
        places = places[chosen[unit_of_place]]
        labels[places] = ids[places]
        action = generator.random(len(places))
        ids[places[action < 0.8]] = self.mask_id
        replaced = places[(action >= 0.8) & (action < 0.9)]
        ids[replaced] = generator.choice(self._plain_ids, len(replaced))
        return ids, labels

    def save(self, folder: Path) -> None:
        """Writes `vocab.json` and `merges.txt`, which `load_tokenizer` and transformers read."""
        folder.mkdir(parents=True, exist_ok=True)
        self._backend.model.save(str(folder))


def load_tokenizer(
    source: str, root: Path | str, max_text_len: int, special_in_text: bool = False
) -> CaptionTokenizer:
    """Loads a tokenizer from a folder or from the Hugging Face hub.

    Args:
        source: Folder with `vocab.json` and `merges.txt`, or `tokenizer.json`; otherwise a hub name.
        root: Folder that relative folders start from.
        max_text_len: See `CaptionTokenizer`.
        special_in_text: See `CaptionTokenizer`.

    Raises:
        ValueError: No such folder or hub name, files missing or damaged, or not RoBERTa's layout.
    """
    folder = Path(root).expanduser() / Path(source).expanduser()
    backend = _from_folder(folder) if folder.is_dir() else _from_hub(source, folder)
    try:
        return CaptionTokenizer(backend, max_text_len, special_in_text)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def train_tokenizer(captions: Iterable[str], folder: Path | str, vocab_size: int) -> None:
    """Trains a byte-level BPE on captions and writes `vocab.json` and `merges.txt`.

    The same captions give the same bytes. Captions with too little variety for `vocab_size` tokens leave a
    rest that is filled with `<unused0>`, `<unused1>`, ..., so the model's size does not hang on the data.

    Args:
        captions: The texts.
        folder: Where the files go; made if it is not there.
        vocab_size: Entries of the vocabulary, at least 261 (256 bytes and 5 special tokens).

    Raises:
        ValueError: `vocab_size` is too small.
    """
    smallest = len(FIRST_TOKENS) + len(pre_tokenizers.ByteLevel.alphabet()) + 1
    if vocab_size < smallest:
        raise ValueError(f"vocab_size {vocab_size}: a byte-level vocabulary needs at least {smallest}")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        min_frequency=2,
        special_tokens=list(FIRST_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(captions, trainer)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    backend.model.save(str(folder))
    vocabulary = json.loads((folder / "vocab.json").read_text("utf-8"))
    fillers = [f"<unused{i}>" for i in range(vocab_size - 1 - len(vocabulary))]
    for token in [*fillers, MASK_TOKEN]:
        vocabulary[token] = len(vocabulary)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), "utf-8")


def _from_folder(folder: Path) -> Tokenizer:
    vocabulary, merges, whole = (folder / name for name in ("vocab.json", "merges.txt", "tokenizer.json"))
    if not whole.is_file() and not (vocabulary.is_file() and merges.is_file()):
        raise ValueError(f"{folder}: expected vocab.json and merges.txt, or tokenizer.json")
    try:
        if not vocabulary.is_file():
            return Tokenizer.from_file(str(whole))
        backend = Tokenizer(models.BPE.from_file(str(vocabulary), str(merges)))
    except Exception as error:  # the library raises bare exceptions
        raise ValueError(f"{folder}: the tokenizer's files cannot be read: {error}") from error
    backend.add_special_tokens(
        [
            *FIRST_TOKENS,
            AddedToken(MASK_TOKEN, lstrip=True),
        ]  # as RoBERTa: `<mask>` swallows the space before it
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.RobertaProcessing(
        ("</s>", FIRST_TOKENS.index("</s>")), ("<s>", FIRST_TOKENS.index("<s>")), add_prefix_space=False
    )
    return backend


def _from_hub(name: str, folder: Path) -> Tokenizer:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name).backend_tokenizer
    except (OSError, ValueError) as error:
        raise ValueError(
            f"tokenizer {name}: there is no folder {folder}, and the Hugging Face hub gives none: {error}"
        ) from error
