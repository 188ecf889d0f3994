"""``errors.jsonl``: what a run left out of its data, one JSON object a line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trainwarden.errors import redact_value

ERRORS_NAME = "errors.jsonl"


class ErrorLog:
    """Appends to a file that it opens only when there is something to write; all ranks of a host may share it.

    What is there already is not written again: a run that goes back to a checkpoint meets the same bad samples once
    more. A line is on the disk when `append` returns; what cannot be written is counted and never raised.

    Args:
        path: the file; made by the first line.
        key: the names of the fields that identify a record.

    Attributes:
        dropped: records that did not reach the file.
    """

    def __init__(self, path: str | Path, *, key: tuple[str, ...]) -> None:
        self.path = Path(path)
        self.dropped = 0
        self._key = key
        self._known: set[str] | None = None

    def append(self, record: Mapping[str, Any]) -> bool:
        """Write ``record`` (JSON-serialisable) with a time stamp, redacted; whether it was new."""
        identity = self._identity(record)
        if self._known is None:
            self._known = {self._identity(known) for known in read_errors(self.path)}
        if identity in self._known:
            return False
        self._known.add(identity)
        stamped = {"ts": datetime.now(UTC).isoformat(timespec="milliseconds"), **record}
        line = json.dumps(redact_value(stamped), ensure_ascii=False, allow_nan=False).encode() + b"\n"
        try:
            self._write(line)
        except OSError:
            self.dropped += 1
        return True

    def _identity(self, record: Mapping[str, Any]) -> str:
        return json.dumps([record.get(name) for name in self._key])

    def _write(self, line: bytes) -> None:
        fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(fd).st_size
            # A killed process may have left half a line behind. One write a line: other ranks append too.
            torn = size > 0 and os.pread(fd, 1, size - 1) != b"\n"
            os.write(fd, b"\n" + line if torn else line)
            os.fsync(fd)
        finally:
            os.close(fd)


def read_errors(path: str | Path) -> Iterator[dict[str, Any]]:
    """The records of an ``errors.jsonl``, oldest first. A file that is not there or cannot be read has none.

    Lines that hold no whole record, as a kill leaves them, are passed over.
    """
    with suppress(OSError), Path(path).open("rb") as stream:
        for line in stream:
            with suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict):
                    yield record
