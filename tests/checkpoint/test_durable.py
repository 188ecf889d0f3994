"""A file in the place of another: the old one or the new one, whatever happens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainwarden.checkpoint.durable import replace_file, unfinished_name


def test_a_file_takes_the_place_of_another_and_of_what_a_killed_process_left(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_bytes(b"old")
    (tmp_path / unfinished_name(path.name)).write_bytes(b"half of someth")
    record = replace_file(path, [b"ne", b"w"])
    assert path.read_bytes() == b"new"
    assert (record.size_bytes, record.sha256) == (3, hashlib.sha256(b"new").hexdigest())
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


def test_what_cannot_be_written_whole_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_bytes(b"old")

    def pieces() -> Iterator[bytes]:
        yield b"ne"
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="gone"):
        replace_file(path, pieces())
    assert path.read_bytes() == b"old"
