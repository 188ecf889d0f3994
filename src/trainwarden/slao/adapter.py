"""An adapter in memory: read from a directory as peft writes it, or from a live model."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from trainwarden.checkpoint.tensorfile import read_tensors, serialise
from trainwarden.errors import AdapterNotFoundError, SLAOMergeError
from trainwarden.train.publish import read_marker

from .checks import SETTINGS, layout_problems
from .peft_api import read_model

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
LINEAGE_FILE = "slao_lineage.json"

_PICKLE = "adapter_model.bin"
_SHOWN_PROBLEMS = 10


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter.

    Attributes:
        tensors: on the CPU, under peft's saved keys.
        config: peft's `LoraConfig` as JSON.
        source: how messages and records call it.
        started_from: the digest of the adapter that it says its training began with; None when it says nothing.
    """

    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]
    source: str
    started_from: str | None = None

    def digest(self) -> str:
        """SHA-256 over the tensors, wherever they are kept: saved or live, an adapter has one digest."""
        return digest_of(self.tensors)


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for piece in serialise({key: tensors[key] for key in sorted(tensors)}):
        digest.update(piece)
    return digest.hexdigest()


def refuse(adapter: str, problems: list[str], index: int | None = None) -> None:
    """Raises SLAOMergeError when there are problems: the first one in its message, more in its details."""
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        shown = problems[:_SHOWN_PROBLEMS]
        raise SLAOMergeError(adapter=adapter, run_index=index, problem=problems[0] + more, problems=shown)


def read_adapter(path: str | Path) -> Adapter:
    """The adapter in a directory as peft's `save_pretrained` writes it, read once and checked by itself.

    A directory that trainwarden published lists the SHA-256 of its files, and is held to it.

    Raises:
        AdapterNotFoundError: there is none.
        SLAOMergeError: it is torn, damaged, a pickle, no LoRA, or incomplete.
    """
    directory, name = Path(path), str(path)
    _require(directory)
    try:
        config = json.loads((directory / CONFIG_FILE).read_bytes())
        tensors = _read_weights(directory)
        started_from = _read_lineage(directory)
    except OSError as error:
        raise SLAOMergeError(adapter=name, problem=f"it cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise SLAOMergeError(adapter=name, problem=f"it is damaged: {error}") from error
    adapter = Adapter(tensors, config if isinstance(config, dict) else {}, name, started_from)
    check(adapter)
    return adapter


def adapter_of(model: Any, adapter_name: str = "default", *, source: str = "model") -> Adapter:
    """A live peft model's adapter, copied to the CPU and checked. Raises SLAOMergeError and PeftAPIError."""
    tensors, config = read_model(model, adapter_name)
    adapter = Adapter(tensors, config, source)
    check(adapter)
    return adapter


def check(adapter: Adapter) -> None:
    """Raises SLAOMergeError unless the adapter is a LoRA and whole in itself."""
    kind = adapter.config.get("peft_type")
    if kind != SETTINGS["peft_type"]:
        refuse(adapter.source, [f"its configuration says peft_type {kind}, and only LORA can be merged"])
    refuse(adapter.source, layout_problems(adapter.tensors, adapter.config))


def _require(directory: Path) -> None:
    problem = None
    if not directory.is_dir():
        problem = "it is a file" if directory.exists() else "there is no such directory"
    elif not (directory / CONFIG_FILE).is_file():
        inner = directory / "model"  # where a run keeps it
        problem = f"{CONFIG_FILE} is missing"
        problem += f"; there is one in {inner}" if (inner / CONFIG_FILE).is_file() else ""
    elif not (directory / WEIGHTS_FILE).is_file():
        if (directory / _PICKLE).exists():
            problem = f"{_PICKLE} is a pickle, which can run code; save it again with safe_serialization=True"
            raise SLAOMergeError(adapter=str(directory), problem=problem)
        problem = f"{WEIGHTS_FILE} is missing"
    if problem:
        raise AdapterNotFoundError(what="adapter", path=directory, problem=problem)


def _read_weights(directory: Path) -> dict[str, Tensor]:
    digest = hashlib.sha256()
    with (directory / WEIGHTS_FILE).open("rb") as file:
        tensors = read_tensors(file, os.fstat(file.fileno()).st_size, seen=digest.update)
    expected = (read_marker(directory) or {"files": {}})["files"].get(WEIGHTS_FILE)
    if expected is not None and expected != digest.hexdigest():
        problem = f"it is damaged: the SHA-256 of {WEIGHTS_FILE} is not the one it was published with"
        raise SLAOMergeError(adapter=str(directory), problem=problem)
    return tensors


def _read_lineage(directory: Path) -> str | None:
    path = directory / LINEAGE_FILE
    if not path.exists():
        return None
    content = json.loads(path.read_bytes())
    started_from = content.get("started_from") if isinstance(content, dict) else None
    if not isinstance(started_from, str):
        problem = f"it is damaged: {LINEAGE_FILE} does not say what the adapter was started from"
        raise SLAOMergeError(adapter=str(directory), problem=problem)
    return started_from
