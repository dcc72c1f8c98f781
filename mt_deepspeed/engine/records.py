"""Lines of JSON that a run writes about itself."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


def append(file: Path, record: dict[str, Any]) -> None:
    """Appends one record; one that cannot be written, on a full disk say, is only a warning: training goes on."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record, allow_nan=True) + "\n")
    except OSError as error:
        log.warning("%s: a record is lost: %s", file, error)
