"""Remove checkpoints and left-overs of killed saves: files of ours by name, directories only when empty."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil

from . import layout
from .manifest import Manifest

_CLOCK_SLACK_S = 1.0


def remove_checkpoint(path: Path, parts: Iterable[str]) -> None:
    """Remove a checkpoint. What it does not list survives, and so does the directory then.

    When its manifest cannot be read, the files of `parts` are taken to be ours and no others. Can be killed
    and repeated at any point. Raises OSError.
    """
    if path.is_symlink() or not path.is_dir():
        return
    manifest, retired = path / layout.MANIFEST, path / layout.MANIFEST_RETIRED
    if manifest.exists():
        manifest.rename(retired)
    for name in _files_of(retired, parts):
        (path / name).unlink(missing_ok=True)
    retired.unlink(missing_ok=True)
    _remove_if_empty(path)


def remove_temporary(path: Path) -> None:
    """Remove what a save was writing, as far as its files have names that a save uses. Raises OSError."""
    if path.is_symlink() or not path.is_dir():
        return
    for file in list(path.iterdir()):
        if layout.is_part_file(file.name) or file.name in (layout.MANIFEST, layout.MANIFEST_BEING_WRITTEN):
            file.unlink()
    _remove_if_empty(path)


def sweep(directory: Path) -> None:
    """Remove what killed saves left in `directory`, not what a living process may still be writing."""
    for path in list(directory.iterdir()):
        pid = layout.writer_of(path.name)
        with suppress(OSError):  # what cannot be removed (another user's, say) is in nobody's way
            if pid is not None and not _lives(pid, since_s=path.lstat().st_mtime):
                remove_temporary(path)


def _files_of(retired: Path, parts: Iterable[str]) -> list[str]:
    try:
        return list(Manifest.parse(retired.read_bytes()).files)
    except (OSError, ValueError):
        return [name for part in parts for name in layout.part_files(part)]


def _remove_if_empty(path: Path) -> None:
    if next(path.iterdir(), None) is None:
        path.rmdir()


def _lives(pid: int, since_s: float) -> bool:
    """Whether process `pid` runs and did at `since_s`: in a container every attempt may get the same pid."""
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return process.create_time() <= since_s + _CLOCK_SLACK_S
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True
