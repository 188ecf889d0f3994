"""The files are ordinary safetensors files, and only whole ones are read."""

from __future__ import annotations

import io
import json
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainwarden.checkpoint.tensorfile import (
    CHUNK_BYTES,
    DTYPE_CODES,
    file_bytes,
    read_header,
    read_tensors,
    serialise,
)

from .states import same_tensor


def content_of(tensors: dict[str, torch.Tensor]) -> bytes:
    return b"".join(bytes(piece) for piece in serialise(tensors))


def read(content: bytes) -> dict[str, torch.Tensor]:
    return read_tensors(io.BytesIO(content), len(content), seen=bytearray().extend)


def one_of_each() -> dict[str, torch.Tensor]:
    tensors = {code: torch.arange(6).to(dtype).reshape(2, 3) for dtype, code in DTYPE_CODES.items()}
    others = {
        "empty": torch.empty(3, 0),
        "scalar": torch.tensor(7),
        "view": torch.arange(6.0).reshape(2, 3)[:, ::2],
    }
    return tensors | others


def test_the_safetensors_library_reads_what_is_written(tmp_path: Path) -> None:
    tensors = one_of_each()
    (tmp_path / "a.safetensors").write_bytes(content_of(tensors))
    result = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert result.keys() == tensors.keys()
    assert all(same_tensor(result[name], tensors[name]) for name in tensors)


def test_what_the_safetensors_library_writes_is_read(tmp_path: Path) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in one_of_each().items()}
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    result = read((tmp_path / "a.safetensors").read_bytes())
    assert result.keys() == tensors.keys()
    assert all(same_tensor(result[name], tensors[name]) for name in tensors)


def test_the_size_is_known_before_anything_is_written() -> None:
    tensors = one_of_each()
    assert file_bytes(tensors) == len(content_of(tensors))


def test_every_tensor_is_aligned_to_its_type() -> None:
    content = content_of({"odd": torch.ones(3, dtype=torch.uint8), "wide": torch.ones(1, dtype=torch.float64)})
    entries = read_header(io.BytesIO(content), len(content), seen=bytearray().extend)
    start = len(content) - entries[-1].end
    assert all((start + entry.begin) % entry.dtype.itemsize == 0 for entry in entries)


def test_reading_sees_every_byte_in_order_even_of_tensors_larger_than_a_chunk() -> None:
    tensors = {"big": torch.arange(CHUNK_BYTES // 4 + 10, dtype=torch.int32), "small": torch.ones(3)}
    content, pieces = content_of(tensors), bytearray()
    result = read_tensors(io.BytesIO(content), len(content), seen=pieces.extend)
    assert pieces == content
    assert all(same_tensor(result[name], tensors[name]) for name in tensors)


def test_each_tensor_read_has_memory_of_its_own() -> None:
    result = read(content_of({"a": torch.zeros(4), "b": torch.zeros(4)}))
    result["a"] += 1
    assert result["b"].sum() == 0
    assert result["a"].untyped_storage().nbytes() == 16


def with_header(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: Any = "U8", shape: Any = (2,), offsets: Any = (0, 2)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "longer than the file"),
        (b"\x01\x00", "longer than the file"),
        (struct.pack("<Q", 2**63), "longer than the file"),
        (with_header(b"\xff\xff"), "unreadable"),
        (with_header([]), "unreadable"),
        (with_header(b"[" * 5000), "unreadable"),
        (with_header({"a": None}), "unreadable"),
        (with_header({"a": {}}), "unreadable"),
        (with_header({"a": entry(dtype="PICKLE")}, b"ab"), "unreadable"),
        (with_header({"a": entry(dtype=["U8"])}, b"ab"), "unreadable"),
        (with_header({"a": entry(shape=[3])}, b"ab"), "unreadable"),
        (with_header({"a": entry(shape=[-2, -1])}, b"ab"), "unreadable"),
        (with_header({"a": entry(shape=[2.0])}, b"ab"), "unreadable"),
        (with_header({"a": entry(shape=[True, 2])}, b"ab"), "unreadable"),
        (with_header({"a": entry(offsets=[2, 0])}, b"ab"), "unreadable"),
        (with_header({"a": entry(shape=[0, 2**62, 8], offsets=[0, 0])}), "unreadable"),
        (with_header({"a": entry(shape=[0, 2**70], offsets=[0, 0])}), "unreadable"),
        (with_header({"a": entry(offsets=[1, 3])}, b"abc"), "not where the header says"),
        (with_header({"a": entry(), "b": entry()}, b"ab"), "not where the header says"),
        (with_header({"a": entry()}, b"a"), "shorter or longer"),
        (with_header({"a": entry()}, b"abc"), "shorter or longer"),
    ],
)
def test_a_malformed_file_is_refused_with_the_reason(content: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read(content)


def test_a_file_that_ends_while_it_is_read_is_refused() -> None:
    content = content_of({"a": torch.zeros(4)})
    with pytest.raises(ValueError, match="ends early"):
        read_tensors(io.BytesIO(content[:-1]), len(content), seen=bytearray().extend)


@given(st.binary(max_size=200) | st.binary(max_size=60).map(with_header))
@settings(max_examples=200, deadline=None)
def test_any_bytes_at_all_are_read_or_refused(content: bytes) -> None:
    with suppress(ValueError):
        read(content)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_a_header_damaged_anywhere_is_read_or_refused(data: st.DataObject) -> None:
    content = bytearray(content_of({"a.b": torch.zeros(2, 3), "c": torch.ones(2, dtype=torch.uint8)}))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with suppress(ValueError):
        read(bytes(content))
