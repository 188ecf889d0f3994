"""``events.jsonl``: what happened in a run, one JSON object a line, written by a thread of its own."""

from __future__ import annotations

import atexit
import json
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trainwarden.errors import redact
from trainwarden.events import Event, to_dict

_Entry = tuple[float, Event]

_BACKLOG_LIMIT = 100_000
"""Entries that may wait for a disk that hangs; more are dropped and counted, so that memory stays bounded."""


class EventLog:
    """An observer that appends every event of level *info* and above to a file.

    The caller's thread only puts the event on a queue: files are opened, written and closed by a daemon
    thread. What cannot be written (a full disk) is counted and never raised: a log does not end a run.
    *Debug* events (one each step) are left out. In a forked child the log is silent, since its thread is not
    there.

    Attributes:
        dropped: events that did not reach the file.
    """

    def __init__(self, path: str | Path, *, run_id: str) -> None:
        self.path = Path(path)
        self.dropped = 0
        self._run_id = run_id
        self._queue: queue.SimpleQueue[_Entry | None] = queue.SimpleQueue()
        self._closed = False
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._write_all, name="warden-event-log", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def __call__(self, event: Event) -> None:
        """Take one event; returns at once."""
        if event.level == "debug":
            return
        if self._closed or self._queue.qsize() >= _BACKLOG_LIMIT or os.getpid() != self._pid:
            self.dropped += 1
            return
        self._queue.put((time.time(), event))

    def close(self, deadline_s: float = 5.0) -> None:
        """Write what is waiting, for at most ``deadline_s`` seconds; what is left then counts as dropped."""
        if self._closed or os.getpid() != self._pid:
            return
        self._closed = True
        atexit.unregister(self.close)
        self._queue.put(None)
        self._thread.join(deadline_s)
        if self._thread.is_alive():
            self.dropped += self._queue.qsize()

    def _write_all(self) -> None:
        file = _AppendFile(self.path)
        ended = False
        while not ended:
            entries = [self._queue.get()]
            while not self._queue.empty():
                entries.append(self._queue.get())
            ended = entries[-1] is None
            lines = [line for entry in entries if entry is not None and (line := self._line(*entry))]
            self.dropped += file.append(lines)
        file.close()

    def _line(self, at_s: float, event: Event) -> bytes | None:
        stamp = datetime.fromtimestamp(at_s, UTC).isoformat(timespec="milliseconds")
        record = {"ts": stamp, "run_id": self._run_id, **to_dict(event)}
        try:
            return json.dumps(_redacted(record), ensure_ascii=False, default=str).encode() + b"\n"
        except Exception:  # noqa: BLE001 - boundary: a log never ends a run, whatever a foreign event holds
            self.dropped += 1
            return None


class _AppendFile:
    """A file opened at its first line and appended to by whole lines; trouble is counted, not raised."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd: int | None = None
        self._torn = False

    def append(self, lines: list[bytes]) -> int:
        """Write ``lines``; returns how many of them did not get into the file whole."""
        for index, line in enumerate(lines):
            try:
                fd = self._opened()
                _write_whole(fd, b"\n" + line if self._torn else line)
                self._torn = False
            except OSError:
                # Part of the line may be there: the next one must not be glued to it.
                self._torn = True
                return len(lines) - index
        return 0

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)

    def _opened(self) -> int:
        if self._fd is None:
            self._fd = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            size = os.fstat(self._fd).st_size
            # A killed process may have left half a line behind.
            self._torn = size > 0 and os.pread(self._fd, 1, size - 1) != b"\n"
        return self._fd


def _write_whole(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


def _redacted(value: Any) -> Any:
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {key: _redacted(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_redacted(item) for item in value]
    return value


def read_events(path: str | Path, *, on_unreadable: Callable[[int], None] | None = None) -> Iterator[dict[str, Any]]:
    """The events in a log, oldest first; a log that does not exist has none.

    Args:
        path: an ``events.jsonl``, which may be growing.
        on_unreadable: called with the number (from 1) of each line that holds no whole event, as a kill
            leaves at the end of a log or, after a resume, in the middle of it. Such lines are passed over.

    Raises:
        OSError: the file is there and cannot be read.
    """
    try:
        stream = Path(path).open("rb")  # noqa: SIM115 - closed below; only its opening may find no file
    except FileNotFoundError:
        return
    with stream:
        for number, line in enumerate(stream, start=1):
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if isinstance(record, dict) and "event" in record:
                yield record
            elif line.strip() and on_unreadable is not None:
                on_unreadable(number)
