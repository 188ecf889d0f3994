"""What the files and directories of a run's checkpoints are called, and which of them are whose.

    checkpoints/step-00000040/{model.safetensors, model.json, …, manifest.json}
    checkpoints/step-00000040.2/        step 40 again, after the first was found damaged
    checkpoints/.step-00000040.tmp-4711/     being written by process 4711, or left over from its death

A name is used once: a checkpoint is never replaced, only followed by another, so that no moment exists in
which a step's only copy is gone.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

MANIFEST = "manifest.json"
MANIFEST_BEING_WRITTEN = "manifest.json.tmp"
MANIFEST_RETIRED = "manifest.json.retired"
"""A checkpoint whose removal has begun: no reader takes it for one, and it still says what is ours."""

_STEP = re.compile(r"step-(\d{8,})(?:\.([1-9]\d*))?")
_TEMPORARY = re.compile(r"\.(step-\d{8,}(?:\.[1-9]\d*)?)\.tmp-(\d+)")
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_SUFFIXES = (".safetensors", ".json")


@dataclass(frozen=True, order=True)
class Slot:
    """The place of one checkpoint: the second one of the same step has revision 2, and so on."""

    step: int
    revision: int = 1

    @property
    def name(self) -> str:
        return f"step-{self.step:08d}" + (f".{self.revision}" if self.revision > 1 else "")

    @classmethod
    def parse(cls, name: str) -> Slot | None:
        """The slot of that directory name, or None for the name of anything else."""
        match = _STEP.fullmatch(name)
        if match is None:
            return None
        slot = cls(int(match[1]), int(match[2] or 1))
        return slot if slot.name == name else None


def temporary_name(slot: Slot) -> str:
    """The directory that this process writes `slot` in."""
    return f".{slot.name}.tmp-{os.getpid()}"


def writer_of(name: str) -> int | None:
    """The process that a temporary directory of that name belongs to; None for any other name."""
    match = _TEMPORARY.fullmatch(name)
    return int(match[2]) if match else None


def slots_in(directory: Path) -> list[Slot]:
    """Every taken name, newest first; an absent directory has none. Raises OSError."""
    if not directory.exists():
        return []
    found = (Slot.parse(path.name) for path in directory.iterdir())
    return sorted((slot for slot in found if slot is not None), reverse=True)


def next_slot(step: int, taken: list[Slot]) -> Slot:
    """The name for a new checkpoint of `step`."""
    return Slot(step, 1 + max((slot.revision for slot in taken if slot.step == step), default=0))


def part_files(part: str) -> tuple[str, str]:
    """The names of a part's tensors and of its skeleton."""
    tensors, skeleton = (f"{part}{suffix}" for suffix in _SUFFIXES)
    return tensors, skeleton


def is_part_name(part: str) -> bool:
    """Whether a part may be called that: a plain file name that no other file of a checkpoint has."""
    return _PART.fullmatch(part) is not None and part_files(part)[1] != MANIFEST


def is_part_file(name: str) -> bool:
    """Whether a file of that name can belong to a part."""
    stem, dot, suffix = name.rpartition(".")
    return dot + suffix in _SUFFIXES and is_part_name(stem)


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is a directory that holds a checkpoint, if perhaps a damaged one.

    One that is being removed is none, and neither is one where only files of the user's are left. Raises
    OSError.
    """
    if not path.is_dir():
        return False
    names = {file.name for file in path.iterdir()}
    return MANIFEST in names or (MANIFEST_RETIRED not in names and any(is_part_file(name) for name in names))
