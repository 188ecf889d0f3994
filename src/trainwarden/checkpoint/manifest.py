"""The manifest: what a checkpoint consists of, with a SHA-256 over each file and over the manifest itself."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from .layout import is_part_name, part_files

FORMAT_VERSION = 1
_SEAL = "manifest_sha256"
_UNSEALED = "0" * 64


@dataclass(frozen=True)
class FileRecord:
    """One file as it was written."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Everything a checkpoint must have to be whole. `meta` is the JSON that was saved beside the parts."""

    step: int
    parts: tuple[str, ...]
    files: dict[str, FileRecord]
    meta: dict[str, Any]
    created_at: str
    trainwarden_version: str
    torch_version: str
    format_version: int = FORMAT_VERSION

    @classmethod
    def describe(cls, step: int, files: dict[str, FileRecord], parts: tuple[str, ...], meta: Any) -> Manifest:
        """The manifest of a checkpoint that is written now, by this version."""
        return cls(
            step=step,
            parts=parts,
            files=files,
            meta=meta,
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            trainwarden_version=_own_version(),
            torch_version=str(torch.__version__),
        )

    def to_bytes(self) -> bytes:
        """The file. Its last entry is the SHA-256 of the file with that entry all zeros.

        Raises TypeError or ValueError when `meta` is not JSON.
        """
        text = json.dumps(asdict(self) | {_SEAL: _UNSEALED}, indent=2).encode()
        seal = hashlib.sha256(text).hexdigest()
        return _reseal(text, _UNSEALED, seal)

    @classmethod
    def parse(cls, content: bytes) -> Manifest:
        """The manifest in `content`. Raises ValueError with the reason when it is damaged or newer."""
        fields = read_json(content)
        seal = fields.pop(_SEAL, None) if isinstance(fields, dict) else None
        if not isinstance(seal, str) or len(seal) != len(_UNSEALED):
            raise ValueError("it is not a checkpoint manifest")
        if hashlib.sha256(_reseal(content, seal, _UNSEALED)).hexdigest() != seal:
            raise ValueError("its checksum differs")
        if fields.get("format_version") != FORMAT_VERSION:
            raise ValueError(f"it has format version {fields.get('format_version')}, not {FORMAT_VERSION}")
        return cls._of_fields(fields)

    @classmethod
    def _of_fields(cls, fields: dict[str, Any]) -> Manifest:
        try:
            files = {name: FileRecord(**record) for name, record in fields.pop("files").items()}
            manifest = cls(parts=tuple(fields.pop("parts")), files=files, **fields)
            complete = sorted(name for part in manifest.parts for name in part_files(part)) == sorted(files)
            if not complete or not all(is_part_name(part) for part in manifest.parts):
                raise ValueError("files and parts do not match")
            if type(manifest.step) is not int or not isinstance(manifest.meta, dict):
                raise ValueError("step or meta is of a wrong type")
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"its entries make no sense ({error})") from error
        return manifest


def read_json(content: bytes) -> Any:
    """The JSON value in `content`. Raises ValueError."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError("it is not readable JSON") from error


def _reseal(content: bytes, old: str, new: str) -> bytes:
    head, _, tail = content.rpartition(old.encode())  # the seal is the last entry, whatever `meta` holds
    return head + new.encode() + tail


def _own_version() -> str:
    try:
        return version("trainwarden")
    except PackageNotFoundError:  # run from a source tree
        return "unknown"
