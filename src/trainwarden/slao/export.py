"""The merged adapter as plain peft loads it, kept in step with the newest snapshot, and the mark that says whose it is.

DIR/trainwarden.json              ours, and which snapshot the next two files are; written last
DIR/adapter_config.json
DIR/adapter_model.safetensors
DIR/snapshots/step-00000003/…
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trainwarden.checkpoint.durable import fsync_directory, refuse_if_full, replace_file, save_errors, unfinished_name
from trainwarden.checkpoint.tensorfile import file_bytes, serialise
from trainwarden.errors import InvalidSettingError
from trainwarden.train.publish import MARKER, read_marker

from .adapter import CONFIG_FILE, WEIGHTS_FILE
from .records import Snapshot

_KIND = "slao"
_SLACK_BYTES = 1 << 20


def is_ours(directory: Path) -> bool:
    """Whether merging wrote that directory."""
    return (read_marker(directory) or {}).get("kind") == _KIND


def require_ours(directory: Path) -> None:
    """Refuses a directory with anything in it that merging did not write. Raises InvalidSettingError."""
    if not directory.exists() or is_ours(directory):
        return
    if not directory.is_dir() or any(item.name != unfinished_name(MARKER) for item in directory.iterdir()):
        expected = "a new directory, or one that an earlier merge wrote"
        suggestion = "Choose another directory; nothing in this one was touched."
        raise InvalidSettingError(setting="output", value=str(directory), expected=expected, suggestion=suggestion)


def claim(directory: Path) -> None:
    """Make the directory ours before anything else is written to it. Raises OSError and InvalidSettingError."""
    require_ours(directory)
    if is_ours(directory):
        return
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    for path in made or [directory]:
        fsync_directory(path.parent)
    _write_marker(directory, {"kind": _KIND, "files": {}})


def exported_sequence(directory: Path) -> int | None:
    """The snapshot that the exported files are; None when they are incomplete."""
    marker = read_marker(directory) or {}
    files = marker.get("files") or {}
    complete = bool(files) and all((directory / name).is_file() for name in files)
    return int(marker["snapshot"]) if complete and "snapshot" in marker else None


def export(directory: Path, snapshot: Snapshot) -> None:
    """Bring the exported files to ``snapshot``. Can be killed and repeated at any point.

    At every moment the two files fit together, or the weights are missing: a configuration with another scaling
    never stands beside weights that it does not belong to.

    Raises DiskFullError and CheckpointError.
    """
    tensors = snapshot.exported()
    config = (json.dumps(snapshot.config, indent=2, sort_keys=True) + "\n").encode()
    needed_bytes = file_bytes(tensors) + len(config) + _SLACK_BYTES
    with save_errors(directory / WEIGHTS_FILE, needed_bytes):
        refuse_if_full(directory, needed_bytes)
        files = {}
        if _content(directory / CONFIG_FILE) != config:
            (directory / WEIGHTS_FILE).unlink(missing_ok=True)
            fsync_directory(directory)
        files[CONFIG_FILE] = replace_file(directory / CONFIG_FILE, [config])
        files[WEIGHTS_FILE] = replace_file(directory / WEIGHTS_FILE, serialise(tensors))
        fsync_directory(directory)
        listed = {name: record.sha256 for name, record in files.items()}
        sizes = {name: asdict(record)["size_bytes"] for name, record in files.items()}
        _write_marker(
            directory,
            {"kind": _KIND, "snapshot": snapshot.sequence, "index": snapshot.index, "files": listed, "bytes": sizes},
        )


def _write_marker(directory: Path, content: Mapping[str, Any]) -> None:
    replace_file(directory / MARKER, [(json.dumps(content, indent=2) + "\n").encode()])
    fsync_directory(directory)


def _content(path: Path) -> bytes | None:
    with suppress(OSError):
        return path.read_bytes()
    return None
