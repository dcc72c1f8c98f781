"""What worker processes do: source rows become shard files, from reading the pictures to the durable file.

Between the processes go paths, texts and counts, no pictures: so each further core adds its full share.
"""

import pickle
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from data_tools.checking import Checked, PictureReader
from data_tools.dropped import HARMLESS, MAX_LISTED, DroppedRow
from data_tools.job import ConversionError
from data_tools.journal import Stretch
from data_tools.resize import Resize
from data_tools.shard_file import OpenShard
from data_tools.shard_format import TEXT_COLUMNS
from data_tools.sources.base import Row


@dataclass(frozen=True)
class Piece:
    """Source rows of a split, one after another, that fill shards of their own.

    Attributes:
        split: The split.
        start: Number of the first row among the source rows of the split.
        rows: The rows, pickled: many pieces wait, and objects would take several times as much.
        spool: A file of theirs to be removed with them; None if there is none.
    """

    split: str
    start: int
    rows: bytes
    spool: Path | None = None


@dataclass
class Made:
    """What became of a piece.

    Attributes:
        stretches: One for each shard, whose `file` is a temporary name still, and one for rows without.
        changed: Why pictures were encoded anew -> how many.
    """

    stretches: list[Stretch] = field(default_factory=list)
    changed: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Maker:
    """Makes shards of pieces; can be sent to other processes.

    Attributes:
        out: Folder for the shards.
        task: Key of `SCHEMAS`.
        raw: Raw folder, for the details of rows left out.
        resize: How pictures are made smaller; None: they are not.
        strict: Whether the first refused picture stops everything.
        run: Part of the temporary names that no other run uses.
    """

    out: Path
    task: str
    raw: Path
    resize: Resize | None
    strict: bool
    run: str

    def __call__(self, piece: Piece) -> Made:
        """Writes the shards of a piece.

        Raises:
            ConversionError: If strict, at the first refused picture.
            OSError: A fault of the machine, such as a full disk.
        """
        made = Made()
        listed: Counter[str] = Counter()
        shard = self._open(piece, made, piece.start)
        with PictureReader() as reader:
            for number, row in enumerate(pickle.loads(piece.rows), piece.start):
                checked = reader.check(row, TEXT_COLUMNS[self.task], self.resize)
                if self.strict:
                    _refuse(row, checked)
                if not shard.takes(row, checked):
                    made.stretches.append(shard.close())
                    shard = self._open(piece, made, number)
                shard.add(row, checked)
                made.changed.update(picture.change for picture in checked.pictures if picture.change)
                if checked.reason and listed[checked.reason] < MAX_LISTED:
                    listed[checked.reason] += 1
                    shard.note(self._entry(number, row, checked))
        made.stretches.append(shard.close())
        if piece.spool is not None:
            piece.spool.unlink()
        return made

    def _open(self, piece: Piece, made: Made, start: int) -> OpenShard:
        name = f".{piece.split}-{piece.start:012d}-{len(made.stretches)}.{self.run}.tmp"
        return OpenShard(self.out / name, self.task, piece.split, start)

    def _entry(self, number: int, row: Row, checked: Checked) -> DroppedRow:
        detail = checked.detail or row.where
        return DroppedRow.of(row.split, number, row.image_id, checked.reason, detail, self.raw)


def _refuse(row: Row, checked: Checked) -> None:
    if checked.reason and checked.reason not in HARMLESS:
        raise ConversionError(f"{row.where}: image {row.image_id!r}: {checked.reason}: {checked.detail}")
