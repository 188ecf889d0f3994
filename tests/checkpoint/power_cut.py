"""A disk that remembers what was synced: the states in which a power cut may leave it."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class _File:
    content: bytes = b""
    synced: bytes = b""


@dataclass
class _Directory:
    entries: dict[str, _File | _Directory] = field(default_factory=dict)
    synced: dict[str, _File | _Directory] = field(default_factory=dict)


class Disk:
    """Follows the operations under `root` (see `faults.operations`), which are really made as well."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.tree = _read(root)
        self._open: dict[int, _File | _Directory] = {}

    def follow(self, name: str, real: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        result = real(*arguments)
        if name == "open":
            self._open[result] = self._opened(Path(arguments[0]))
        elif name == "write":
            file = self._open[arguments[0]]
            assert isinstance(file, _File)
            file.content += bytes(arguments[1][:result])
        elif name == "fsync":
            node = self._open[arguments[0]]
            if isinstance(node, _File):
                node.synced = node.content
            else:
                node.synced = dict(node.entries)
        elif name == "mkdir":
            self._parent(arguments[0]).entries[Path(arguments[0]).name] = _Directory()
        elif name == "rename":
            moved = self._parent(arguments[0]).entries.pop(Path(arguments[0]).name)
            self._parent(arguments[1]).entries[Path(arguments[1]).name] = moved
        else:
            del self._parent(arguments[0]).entries[Path(arguments[0]).name]
        return result

    def after_power_cut(self, target: Path, survives: Callable[[], bool]) -> None:
        """Write to `target` what the disk may hold now; `survives` decides for each thing not synced."""
        _write(self.tree, target, survives)

    def _parent(self, path: os.PathLike[str] | str) -> _Directory:
        node: _File | _Directory = self.tree
        for name in Path(path).relative_to(self.root).parts[:-1]:
            assert isinstance(node, _Directory)
            node = node.entries[name]
        assert isinstance(node, _Directory)
        return node

    def _opened(self, path: Path) -> _File | _Directory:
        if path == self.root:
            return self.tree
        if self.root not in path.parents:
            return _Directory()  # the parents of what is watched
        return self._parent(path).entries.setdefault(path.name, _File())


def lost() -> bool:
    """Nothing that was not synced survives."""
    return False


def kept() -> bool:
    """Everything survives, as after a kill."""
    return True


def at_random(seed: int) -> Callable[[], bool]:
    """Some of it survives, in any order."""
    generator = random.Random(seed)
    return lambda: generator.random() < 0.5


def _read(path: Path) -> _Directory:
    entries = {
        item.name: _read(item) if item.is_dir() else _File(item.read_bytes(), item.read_bytes())
        for item in path.iterdir()
    }
    return _Directory(dict(entries), dict(entries))


def _write(directory: _Directory, target: Path, survives: Callable[[], bool]) -> None:
    target.mkdir(exist_ok=True)
    for name in sorted({*directory.entries, *directory.synced}):
        now, synced = directory.entries.get(name), directory.synced.get(name)
        node = now if now is not synced and survives() else synced
        if isinstance(node, _Directory):
            _write(node, target / name, survives)
        elif node is not None:
            content = node.content if node.content == node.synced or survives() else node.synced
            (target / name).write_bytes(content)
