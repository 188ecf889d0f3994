"""Folders that a run publishes beside its checkpoints: the model, the tokenizer.

Each holds a marker that lists the files trainwarden wrote, with their SHA-256. Only files on that list are
ever replaced or removed, so whatever a user adds to such a folder stays.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trainwarden.checkpoint.durable import fsync_directory, refuse_if_full, save_errors
from trainwarden.errors import CheckpointError, InvalidSettingError

MARKER = "trainwarden.json"

_READ_BYTES = 1 << 22


def read_marker(folder: Path) -> dict[str, Any] | None:
    """What the marker of a published folder says; None when there is no readable one."""
    try:
        marker = json.loads((folder / MARKER).read_bytes())
    except (OSError, ValueError):
        return None
    return marker if isinstance(marker, dict) and isinstance(marker.get("files"), dict) else None


def require_ours(folder: Path) -> None:
    """Refuses a folder to be published to that already holds something else. Call before any work is done.

    Raises `InvalidSettingError`.
    """
    if not folder.exists() or read_marker(folder) is not None:
        return
    if not folder.is_dir() or any(folder.iterdir()):
        raise InvalidSettingError(
            setting="output_dir",
            value=str(folder.parent),
            expected=f"a directory without a `{folder.name}` that trainwarden did not write",
        )


def publish(folder: Path, write: Callable[[Path], None], *, facts: Mapping[str, Any], needed_bytes: int = 0) -> Path:
    """Has ``write`` fill a new folder beside ``folder`` and moves it there once it is complete on disk.

    A folder published before is brought up to date file by file, and its marker last. ``facts`` are kept in
    the marker. Raises `DiskFullError`, `CheckpointError` when the files cannot be written, and
    `InvalidSettingError` when the folder is not ours.
    """
    require_ours(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    with save_errors(folder, needed_bytes):
        folder.parent.mkdir(parents=True, exist_ok=True)
        refuse_if_full(folder.parent, needed_bytes)
        _discard_partial(partial)
        partial.mkdir()
        _write_marker(partial, {"files": {}})
        write(partial)
        _write_marker(partial, {**facts, "files": _sealed(partial)})
        if folder.exists():
            _bring_up_to_date(folder, partial)
        else:
            partial.rename(folder)
        fsync_directory(folder.parent)
    return folder


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _sealed(folder: Path) -> dict[str, str]:
    """Name and SHA-256 of each file, after the disk has it."""
    sealed = {}
    for name in _files(folder):
        if name == MARKER:
            continue
        digest = hashlib.sha256()
        with (folder / name).open("rb+") as stream:
            while block := stream.read(_READ_BYTES):
                digest.update(block)
            os.fsync(stream.fileno())
        sealed[name] = digest.hexdigest()
    return sealed


def _write_marker(folder: Path, content: Mapping[str, Any]) -> None:
    with (folder / MARKER).open("w", encoding="utf-8") as stream:
        json.dump(content, stream, indent=2)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())


def _bring_up_to_date(folder: Path, partial: Path) -> None:
    old = set((read_marker(folder) or {"files": {}})["files"])
    new = set(_files(partial)) - {MARKER}
    for name in [*sorted(new), MARKER]:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        (partial / name).replace(target)
    for name in old - new:
        (folder / name).unlink(missing_ok=True)
    _remove_empty_folders(partial)


def _discard_partial(partial: Path) -> None:
    """Removes what a killed run left; the marker it began with shows that it is ours."""
    if not partial.exists():
        return
    if read_marker(partial) is None:
        problem = "it is in the way and was not written by trainwarden"
        raise CheckpointError(operation="save", path=partial, problem=problem)
    for name in _files(partial):
        (partial / name).unlink()
    _remove_empty_folders(partial)


def _remove_empty_folders(folder: Path) -> None:
    for path in sorted((p for p in folder.rglob("*") if p.is_dir()), reverse=True):
        path.rmdir()
    folder.rmdir()
