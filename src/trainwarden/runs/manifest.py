"""``run.json``: what a run directory says about its run, written once and whole."""

from __future__ import annotations

import json
import os
import secrets
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trainwarden.errors import ConfigurationError

FILE_NAME = "run.json"
SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class RunManifest:
    """The content of ``run.json``.

    Attributes:
        run_id: such as ``20261120-215800-3f9a``: UTC date and time of the first start and four random hex
            digits.
        created_at: the same moment in ISO-8601, UTC.
        command: the command line of the latest start, one string an argument.
        cwd: the working directory that command was started in.
        config: the whole configuration of a ``warden train`` run, ``None`` for a run of the user's own
            script.
        version: the trainwarden version of the first start.
    """

    run_id: str
    created_at: str
    command: Sequence[str]
    cwd: str
    config: Mapping[str, Any] | None
    version: str
    schema: int = field(default=SCHEMA)

    @classmethod
    def new(cls, command: Sequence[str], config: Mapping[str, Any] | None) -> RunManifest:
        """A manifest for a run that starts now, in this working directory."""
        now = datetime.now(UTC)
        return cls(
            run_id=f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(2)}",
            created_at=now.isoformat(timespec="seconds"),
            command=list(command),
            cwd=str(Path.cwd()),
            config=config,
            version=_version(),
        )

    @classmethod
    def read(cls, directory: Path) -> RunManifest | None:
        """The manifest of a run directory; ``None`` when it has none.

        Raises:
            ConfigurationError: there is a ``run.json`` that cannot be used: not written by trainwarden, by a
                newer one, or damaged. It is never overwritten, since it may be somebody's.
        """
        file = directory / FILE_NAME
        try:
            raw = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise _unusable(file, f"cannot be read: {error}") from error
        problem = _problem_with(raw)
        if problem is not None:
            raise _unusable(file, problem)
        known = ("run_id", "created_at", "command", "cwd", "config", "version", "schema")
        return cls(**{key: raw[key] for key in known})

    def write(self, directory: Path) -> None:
        """Write to ``directory``, durably: after a crash there is the old file or the new one, never a part.

        Raises:
            OSError: as the file system says.
        """
        text = json.dumps(self.__dict__, indent=2, ensure_ascii=False, default=str) + "\n"
        temporary = directory / f".{FILE_NAME}.{os.getpid()}.tmp"
        try:
            with temporary.open("w", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(directory / FILE_NAME)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_directory(directory)

    def resume_command(self, directory: Path) -> str:
        """The exact command that continues the run from the present directory, quoted for a POSIX shell."""
        if self.config is not None:
            return shlex.join(["warden", "resume", _short(directory)])
        command = shlex.join(self.command)
        return command if Path.cwd() == Path(self.cwd) else f"cd {shlex.quote(self.cwd)} && {command}"


def _problem_with(raw: object) -> str | None:
    if not isinstance(raw, dict) or "schema" not in raw or not isinstance(raw.get("run_id"), str):
        return "was not written by trainwarden"
    if not isinstance(raw["schema"], int) or raw["schema"] > SCHEMA:
        return f"has schema {raw['schema']!r}; this trainwarden reads up to {SCHEMA}"
    expected: dict[str, Any] = {
        "created_at": str,
        "command": list,
        "cwd": str,
        "config": (dict, type(None)),
        "version": str,
    }
    for key, kind in expected.items():
        if key not in raw or not isinstance(raw[key], kind):
            return f"is damaged: {key!r} is missing or of the wrong kind"
    if not all(isinstance(word, str) for word in raw["command"]):
        return "is damaged: 'command' holds something that is not text"
    return None


def _unusable(file: Path, problem: str) -> ConfigurationError:
    return ConfigurationError(
        place=str(file),
        problem=f"the file {problem}",
        suggestion="Choose another run directory, or move the file away: checkpoints beside it stay usable.",
    )


def _short(directory: Path) -> str:
    """Relative to the working directory when inside it, absolute otherwise."""
    absolute, here = directory.absolute(), Path.cwd()
    return str(absolute.relative_to(here)) if absolute.is_relative_to(here) else str(absolute)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version  # slow to import, rarely used

    try:
        return version("trainwarden")
    except PackageNotFoundError:
        return "unknown"


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
