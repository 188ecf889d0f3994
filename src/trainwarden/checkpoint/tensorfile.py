"""Safetensors files, written as a stream and read in one pass.

The layout is that of https://github.com/huggingface/safetensors: a length, a JSON header, the data; any
safetensors library reads these files. The library's own writer is not used because it first copies every
CUDA tensor to the host, hides the error number of a failed write, and leaves the file unsynced; its reader
maps the file, so that what was hashed need not be what is loaded.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

CHUNK_BYTES = 1 << 22
"""Read and hashed at a time."""
_MAX_HEADER_BYTES = 100_000_000  # the library's own limit
_MAX_TENSOR_BYTES = 2**63 - 1

DTYPE_CODES: dict[torch.dtype, str] = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.complex64: "C64",
}
_DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}


class Entry(NamedTuple):
    """Where one tensor lies in a file; positions in bytes from the start of the data."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def file_bytes(tensors: Mapping[str, Tensor]) -> int:
    """The size of the file that `serialise` would make."""
    return len(_header(tensors)) + sum(tensor.nbytes for tensor in tensors.values())


def serialise(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The file, piece by piece: one tensor at a time is moved to the CPU and made contiguous, no more."""
    yield _header(tensors)
    for name in _storage_order(tensors):
        flat = tensors[name].detach().to("cpu").contiguous().reshape(-1)
        if flat.numel():
            yield _bytes_of(flat)


def read_header(file: BinaryIO, size_bytes: int, *, seen: Callable[[bytes], object]) -> list[Entry]:
    """The entries of the file, in the order of their data, with the file left at the first byte of data.

    `seen` is called with every byte read. Raises ValueError when the header does not describe exactly
    `size_bytes`.
    """
    prefix = file.read(8)
    seen(prefix)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size_bytes
    if length > min(_MAX_HEADER_BYTES, size_bytes - 8):
        raise ValueError("the header is longer than the file")
    text = file.read(length)
    seen(text)
    try:
        described = json.loads(text)
        entries = [_entry(name, about) for name, about in described.items() if name != "__metadata__"]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError("the header is unreadable") from error
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    position = 0
    for entry in entries:
        if entry.begin != position:
            raise ValueError(f"the data of {entry.name!r} is not where the header says")
        position = entry.end
    if 8 + length + position != size_bytes:
        raise ValueError("the file is shorter or longer than its header says")
    return entries


def read_tensors(file: BinaryIO, size_bytes: int, *, seen: Callable[[bytes | memoryview], object]) -> dict[str, Tensor]:
    """All tensors, each in CPU memory of its own; `seen` is called on exactly the bytes they are made of.

    Raises ValueError when the file is malformed or ends early.
    """
    tensors = {}
    for entry in read_header(file, size_bytes, seen=seen):
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        if entry.end > entry.begin:
            target = _bytes_of(tensor.reshape(-1))
            for start in range(0, len(target), CHUNK_BYTES):
                piece = target[start : start + CHUNK_BYTES]
                _fill(file, piece)
                seen(piece)
        tensors[entry.name] = tensor
    return tensors


def _fill(file: BinaryIO, target: memoryview) -> None:
    filled = 0
    while filled < len(target):
        count = file.readinto(target[filled:])  # type: ignore[attr-defined]  # BinaryIO hides it
        if not count:
            raise ValueError("the file ends early")
        filled += count


def _bytes_of(flat: Tensor) -> memoryview:
    return flat.view(torch.uint8).numpy().data


def _storage_order(tensors: Mapping[str, Tensor]) -> list[str]:
    # Wide types first keeps every tensor aligned, which readers that map the file rely on.
    return sorted(tensors, key=lambda name: -tensors[name].element_size())


def _header(tensors: Mapping[str, Tensor]) -> bytes:
    described: dict[str, Any] = {}
    position = 0
    for name in _storage_order(tensors):
        tensor = tensors[name]
        end = position + tensor.nbytes
        described[name] = {
            "dtype": DTYPE_CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _entry(name: str, about: Any) -> Entry:
    begin, end = about["data_offsets"]
    dtype, shape = _DTYPES[about["dtype"]], tuple(about["shape"])
    numbers: Iterable[object] = (begin, end, *shape)
    if not all(type(number) is int and 0 <= number <= _MAX_TENSOR_BYTES for number in numbers):
        raise ValueError("sizes must be whole numbers")
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError("shape and size differ")
    # An empty tensor takes no data, whatever its other dimensions claim; torch still multiplies them.
    if math.prod(max(extent, 1) for extent in shape) * dtype.itemsize > _MAX_TENSOR_BYTES:
        raise ValueError("dimensions too large")
    return Entry(name, dtype, shape, begin, end)
