"""Read a checkpoint back, trusting nothing: not that files are there, nor their bytes, nor their meaning."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from trainwarden.errors import CheckpointError, CheckpointNotFoundError

from .codec import Tree, decode
from .layout import MANIFEST, Slot, part_files
from .manifest import FileRecord, Manifest, read_json
from .tensorfile import CHUNK_BYTES, read_header, read_tensors


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint in memory: state trees by part, tensors on the CPU, and the JSON beside them."""

    path: Path
    step: int
    parts: dict[str, Tree]
    meta: dict[str, Any]


def verify_checkpoint(path: Path) -> Manifest:
    """Read all files of the checkpoint at `path` in chunks and compare them with its manifest.

    Raises CheckpointNotFoundError, or CheckpointError with the reason in one sentence.
    """
    manifest = _read_manifest(path)
    for part in manifest.parts:
        tensors, skeleton = part_files(part)
        with _read(path, tensors, manifest.files[tensors]) as (file, digest):
            read_header(file, manifest.files[tensors].size_bytes, seen=digest.update)
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
        _read_skeleton(path, skeleton, manifest.files[skeleton])
    return manifest


def load_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at `path`, read once: what was hashed is what it is made of.

    Raises as `verify_checkpoint`.
    """
    manifest = _read_manifest(path)
    parts = {}
    for part in manifest.parts:
        tensors_file, skeleton_file = part_files(part)
        skeleton = _read_skeleton(path, skeleton_file, manifest.files[skeleton_file])
        record = manifest.files[tensors_file]
        with _read(path, tensors_file, record) as (file, digest):
            tensors = read_tensors(file, record.size_bytes, seen=digest.update)
        parts[part] = decode(tensors, skeleton, path=path)
    return Checkpoint(path, manifest.step, parts, manifest.meta)


def _read_manifest(path: Path) -> Manifest:
    if not path.is_dir():
        raise CheckpointNotFoundError(path=path)
    with _reasons(path, MANIFEST):
        manifest = Manifest.parse((path / MANIFEST).read_bytes())
    slot = Slot.parse(path.name)
    if slot is not None and slot.step != manifest.step:
        raise _invalid(path, f"{MANIFEST}: it belongs to step {manifest.step}")
    # The cheap look at every file comes first: a missing one is found before gigabytes are read.
    for name, record in manifest.files.items():
        with _reasons(path, name):
            _check_size((path / name).stat().st_size, record)
    return manifest


def _read_skeleton(path: Path, name: str, record: FileRecord) -> Any:
    with _read(path, name, record) as (file, digest):
        content = file.read(record.size_bytes)
        digest.update(content)
    with _reasons(path, name):
        return read_json(content)


@contextmanager
def _read(path: Path, name: str, record: FileRecord) -> Iterator[tuple[BinaryIO, hashlib._Hash]]:
    """A file whose bytes the caller feeds to the digest; compared with the record at the end."""
    digest = hashlib.sha256()
    with _reasons(path, name), (path / name).open("rb") as file:
        _check_size(os.fstat(file.fileno()).st_size, record)
        yield file, digest
        if digest.hexdigest() != record.sha256:
            raise ValueError("its SHA-256 differs from the manifest's")


def _check_size(size_bytes: int, record: FileRecord) -> None:
    if size_bytes != record.size_bytes:
        raise ValueError(f"it has {size_bytes} bytes instead of {record.size_bytes}")


@contextmanager
def _reasons(path: Path, name: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise _invalid(path, f"{name} is missing") from error
    except OSError as error:
        raise _invalid(path, f"{name} cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise _invalid(path, f"{name}: {error}") from error


def _invalid(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(operation="load", path=path, problem=problem)
