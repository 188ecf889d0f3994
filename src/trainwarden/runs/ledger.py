"""The ledger: one row a run, over all runs of this user, in a small SQLite file."""

from __future__ import annotations

import json
import os
import shlex
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from trainwarden.errors import LedgerError, RunNotFoundError
from trainwarden.memory.overheads import RunMemory
from trainwarden.runs.process import ProcessIdentity
from trainwarden.runs.schema import MIGRATIONS

Status = Literal["running", "finished", "stopped", "failed", "lost", "unknown"]
FILE_NAME = "ledger.sqlite"
_BUSY_S = 5.0


def default_path() -> Path:
    """In ``$WARDEN_HOME``, else in the user's state directory (``$XDG_STATE_HOME``, ``~/.local/state``)."""
    home = os.environ.get("WARDEN_HOME")
    if home:
        return Path(home) / FILE_NAME
    state = os.environ.get("XDG_STATE_HOME")
    # A relative XDG path is to be ignored, says its specification.
    base = Path(state) if state and Path(state).is_absolute() else Path.home() / ".local" / "state"
    return base / "trainwarden" / FILE_NAME


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One run as the ledger knows it. ``None`` is *unknown*; a ``final_loss`` that was NaN is NaN.

    ``status`` is the truth of now, not of the last write: a run whose process is gone without a word is
    ``lost``, and one that claims to run on another machine is ``unknown`` from here.
    """

    run_id: str
    path: str
    command: tuple[str, ...]
    status: Status
    started_at: str
    ended_at: str | None = None
    pid: int | None = None
    starts: int = 1
    steps_completed: int | None = None
    steps_skipped: int | None = None
    shrinks: int | None = None
    data_skipped: int | None = None
    final_loss: float | None = None
    exit_code: int | None = None
    code: str | None = None
    checkpoint_path: str | None = None
    model: str | None = None

    @property
    def command_line(self) -> str:
        """The command as it would be typed in a shell."""
        return shlex.join(self.command)

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable; a NaN or infinite loss is the string ``"nan"``, ``"inf"``."""
        record = asdict(self)
        record["command"] = list(self.command)
        if self.final_loss is not None and _as_text(self.final_loss) in ("nan", "inf", "-inf"):
            record["final_loss"] = _as_text(self.final_loss)
        return record


class Ledger:
    """The ledger file. Opens a connection for each call: safe from any thread and after a fork.

    Args:
        path: the file; by default ``default_path()``. It and its directory are made by the first write.
        on_problem: told in one sentence about trouble with a write, which then is not raised: a run never
            fails for its ledger. Without it trouble is a ``LedgerError``. Reads always raise.
    """

    def __init__(self, path: str | Path | None = None, *, on_problem: Callable[[str], None] | None = None) -> None:
        self.path = default_path() if path is None else Path(path)
        self._on_problem = on_problem

    @classmethod
    def open_or_none(cls, on_problem: Callable[[str], None], path: str | Path | None = None) -> Ledger | None:
        """The ledger ready for writing, or ``None`` after telling ``on_problem`` why there is none.

        Later trouble with it goes to ``on_problem`` too.
        """
        try:
            ledger = cls(path, on_problem=on_problem)
            with ledger._writing():
                pass
        except LedgerError as error:
            on_problem(_without_ledger(error))
            return None
        except (OSError, RuntimeError) as error:  # RuntimeError: Path.home() of a user without one
            on_problem(f"this run will not be listed by `warden runs ls`: {error}")
            return None
        return ledger

    def started(
        self,
        *,
        run_id: str,
        path: str | Path,
        command: Sequence[str],
        model: str | None = None,
        process: ProcessIdentity | None = None,
    ) -> None:
        """A run begins, or begins again: its earlier row then is continued (``starts`` counts).

        Args:
            process: who runs it; the calling process by default.
        """
        process = process or ProcessIdentity.current()
        self._write(
            """
            INSERT INTO runs (run_id, path, command, status, pid, process_start, host, started_at, model)
            VALUES (:run_id, :path, :command, 'running', :pid, :start, :host, :now, :model)
            ON CONFLICT (run_id) DO UPDATE SET
                path = excluded.path, command = excluded.command, status = 'running', pid = excluded.pid,
                process_start = excluded.process_start, host = excluded.host, ended_at = NULL,
                exit_code = NULL, code = NULL, model = coalesce(excluded.model, model), starts = starts + 1
            """,
            {
                "run_id": run_id,
                "path": _absolute(path),
                "command": json.dumps(list(command)),
                "now": _now(),
                "model": model,
                **asdict(process),
            },
        )

    def finished(
        self,
        run_id: str,
        *,
        status: Literal["finished", "stopped", "failed"],
        steps_completed: int | None = None,
        steps_skipped: int | None = None,
        shrinks: int | None = None,
        data_skipped: int | None = None,
        final_loss: float | None = None,
        exit_code: int | None = None,
        code: str | None = None,
        checkpoint_path: str | Path | None = None,
    ) -> None:
        """A run ended, and how. ``None`` stays unknown; NaN stays NaN.

        ``data_skipped``: samples and whole batches left out on all ranks because they could not be loaded.

        A start that found nothing left to do saw no loss: the one known from before stays.
        """
        self._write(
            """
            UPDATE runs SET status = :status, ended_at = :now, steps_completed = :steps_completed,
                steps_skipped = :steps_skipped, shrinks = :shrinks, data_skipped = :data_skipped,
                final_loss = coalesce(:final_loss, final_loss),
                exit_code = :exit_code, code = :code, checkpoint_path = :checkpoint_path
            WHERE run_id = :run_id
            """,
            {
                "run_id": run_id,
                "status": status,
                "now": _now(),
                "steps_completed": steps_completed,
                "steps_skipped": steps_skipped,
                "shrinks": shrinks,
                "data_skipped": data_skipped,
                "final_loss": None if final_loss is None else _as_text(final_loss),
                "exit_code": exit_code,
                "code": code,
                "checkpoint_path": None if checkpoint_path is None else _absolute(checkpoint_path),
            },
        )

    def note_memory(self, run_id: str, memory: RunMemory) -> None:
        """A run's predicted and real peaks; of a run that was continued, those of its latest part."""
        self._write(
            """
            INSERT INTO run_memory (
                run_id, recorded_at, device, predicted_bytes, allocated_bytes, reserved_bytes, context_bytes
            )
            SELECT :run_id, :now, :device, :predicted_bytes, :allocated_bytes, :reserved_bytes, :context_bytes
            FROM runs WHERE run_id = :run_id
            ON CONFLICT (run_id) DO UPDATE SET
                recorded_at = excluded.recorded_at, device = excluded.device,
                predicted_bytes = excluded.predicted_bytes, allocated_bytes = excluded.allocated_bytes,
                reserved_bytes = excluded.reserved_bytes, context_bytes = excluded.context_bytes
            """,
            {"run_id": run_id, "now": _now(), **asdict(memory)},
        )

    def memory_of_runs(self, limit: int | None = None) -> list[RunMemory]:
        """What `note_memory` was told, newest first; none when nothing was ever written.

        Raises:
            LedgerError: as for ``rows``.
        """
        if not self.path.exists():
            return []
        with self._reading() as connection:
            query = "SELECT * FROM run_memory ORDER BY recorded_at DESC, rowid DESC LIMIT ?"
            rows = connection.execute(query, (-1 if limit is None else limit,)).fetchall()
        return [RunMemory(**{key: row[key] for key in RunMemory.__dataclass_fields__}) for row in rows]

    def rows(self, limit: int | None = None) -> list[RunRecord]:
        """All runs, or the newest ``limit``, newest first; none when nothing was ever written.

        Raises:
            LedgerError: the file is damaged, unreadable or of a newer trainwarden.
        """
        if not self.path.exists():
            return []
        with self._reading() as connection:
            query = "SELECT * FROM runs ORDER BY started_at DESC, rowid DESC LIMIT ?"
            return [_record(row) for row in connection.execute(query, (-1 if limit is None else limit,))]

    def find(self, reference: str) -> RunRecord:
        """The run with this id, the beginning of it, or this run directory.

        Raises:
            RunNotFoundError: no run, or more than one, is meant; it names the runs that could be.
            LedgerError: as for ``rows``.
        """
        records = self.rows()
        places = {_absolute(reference), os.path.realpath(reference)} if reference else set()
        for matches in (
            [r for r in records if r.run_id == reference],
            [r for r in records if reference and r.run_id.startswith(reference)],
            [r for r in records if r.path in places][:1],  # the newest, where a directory was used again
        ):
            if len(matches) == 1:
                return matches[0]
            if matches:
                raise RunNotFoundError(
                    run=reference,
                    known=[r.run_id for r in matches],
                    suggestion="More than one run begins like this; give more of the id.",
                )
        raise RunNotFoundError(run=reference, known=[r.run_id for r in records[:10]])

    def _write(self, statement: str, values: dict[str, Any]) -> None:
        try:
            with self._writing() as connection:
                changed = connection.execute(statement, values).rowcount
            if not changed:
                raise LedgerError(path=str(self.path), problem=f"it has no run {values['run_id']}")
        except LedgerError as error:
            if self._on_problem is None:
                raise
            self._on_problem(_without_ledger(error))

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """One write transaction on a file that is of the present schema."""
        with self._as_ledger_error():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(self.path, timeout=_BUSY_S, isolation_level=None)
            try:
                _use_wal(connection)
                connection.execute("BEGIN IMMEDIATE")
                try:
                    self._migrate(connection)
                    yield connection
                except BaseException:
                    connection.rollback()
                    raise
                connection.commit()
            finally:
                connection.close()

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._as_ledger_error():
            connection = _connect_for_reading(self.path)
            connection.row_factory = sqlite3.Row
            try:
                if self._version(connection) < len(MIGRATIONS):
                    connection.close()
                    with self._writing():
                        pass
                    connection = _connect_for_reading(self.path)
                    connection.row_factory = sqlite3.Row
                yield connection
            finally:
                connection.close()

    def _migrate(self, connection: sqlite3.Connection) -> None:
        version = self._version(connection)
        for number, statements in enumerate(MIGRATIONS[version:], start=version + 1):
            for statement in statements:
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {number}")

    def _version(self, connection: sqlite3.Connection) -> int:
        version = int(connection.execute("PRAGMA user_version").fetchone()[0])
        if version > len(MIGRATIONS):
            raise LedgerError(
                path=str(self.path),
                problem=f"it has schema {version}; this trainwarden knows up to {len(MIGRATIONS)}",
            )
        return version

    @contextmanager
    def _as_ledger_error(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise LedgerError(path=str(self.path), problem=str(error)) from error


def _use_wal(connection: sqlite3.Connection) -> None:
    """Readers then never wait for a writer. Changing the mode ignores the busy timeout, hence the loop."""
    deadline_s = time.monotonic() + _BUSY_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline_s:
                raise
            time.sleep(0.01)


def _connect_for_reading(path: Path) -> sqlite3.Connection:
    location = path.absolute().as_uri()
    connection = sqlite3.connect(f"{location}?mode=ro", uri=True, timeout=_BUSY_S)
    try:
        connection.execute("PRAGMA user_version").fetchone()
    except sqlite3.OperationalError as error:
        connection.close()
        if error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise  # what somebody is writing must not be read as if nobody did
        # In a directory that cannot be written SQLite cannot make the files that WAL needs even for reading.
        connection = sqlite3.connect(f"{location}?immutable=1", uri=True, timeout=_BUSY_S)
    return connection


def _record(row: sqlite3.Row) -> RunRecord:
    values = {key: row[key] for key in row.keys() if key in RunRecord.__dataclass_fields__}  # noqa: SIM118
    values["command"] = tuple(json.loads(row["command"]))
    values["final_loss"] = None if row["final_loss"] is None else float(row["final_loss"])
    if row["status"] == "running":
        alive = ProcessIdentity(row["pid"], row["process_start"], row["host"]).is_alive()
        values["status"] = {True: "running", False: "lost", None: "unknown"}[alive]
    return RunRecord(**values)


def _as_text(number: float) -> str:
    # SQLite stores NaN as NULL, which would read as "unknown".
    return repr(float(number))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _without_ledger(error: LedgerError) -> str:
    return f"the ledger could not be written, the run goes on without it: {error.details['problem']}"


def _absolute(path: str | Path) -> str:
    """Without ``..``, and with the symbolic links by which the user knows the place."""
    return os.path.abspath(path)  # noqa: PTH100 - resolve() would follow the links
