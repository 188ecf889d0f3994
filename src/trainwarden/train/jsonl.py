"""Reading rows from a JSONL file or from a sequence in memory, with errors that name the place."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from trainwarden.errors import (
    DatasetError,
    DatasetFormatError,
    DatasetNotFoundError,
    DatasetParseError,
    DatasetValidationError,
)
from trainwarden.train.rows import SUPPORTED_FORMATS, Row, RowError, RowFormatError, normalise

# One row above this is a file that is no JSONL (or one row that no model has the context for).
MAX_LINE_BYTES = 64 * 2**20

IN_MEMORY = "rows given in memory"


def read_jsonl(path: Path | str, *, limit: int | None = None) -> list[Row]:
    """All rows of a UTF-8 JSONL file, in file order, the first ``limit`` only if given.

    A byte-order mark, CRLF endings and blank lines are accepted. The first unusable line ends the reading:
    `DatasetParseError` (not UTF-8, not JSON), `DatasetValidationError` (unusable value) or
    `DatasetFormatError` (unknown shape), each with the 1-based line number; `DatasetNotFoundError` when there
    is no such file and `DatasetError` when it cannot be read or holds no row.
    """
    path = Path(path)
    rows: list[Row] = []
    with _opened(path) as stream:
        for number, line in _lines(stream, path):
            if limit is not None and len(rows) >= limit:
                break
            rows.append(_row(_decoded(line, path, number), str(path), number))
    if not rows:
        raise DatasetError(problem=f"{path} holds no rows")
    return rows


def read_sequence(rows: Sequence[Any], *, limit: int | None = None) -> list[Row]:
    """The rows of a list of mappings or of any data set with ``len`` and integer indexing.

    Errors are those of `read_jsonl`; the "line" is the row's number, counted from 1.
    """
    count = len(rows) if limit is None else min(limit, len(rows))
    if count == 0:
        raise DatasetError(problem=f"the {IN_MEMORY} are none at all")
    return [_row(rows[index], IN_MEMORY, index + 1) for index in range(count)]


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:  # ValueError: a NUL byte in the path
        raise DatasetNotFoundError(path=str(path)) from error
    except IsADirectoryError as error:
        raise DatasetError(problem=f"{path} is a directory, not a JSONL file") from error
    except OSError as error:
        raise DatasetError(problem=f"{path} cannot be read: {error.strerror or error}") from error


def _lines(stream: BinaryIO, path: Path) -> Iterator[tuple[int, bytes]]:
    """The non-blank lines with their 1-based numbers, without line ends and byte-order mark."""
    number = 0
    while line := _next_line(stream, path):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            _parse_failed(path, number, f"the line is longer than {MAX_LINE_BYTES // 2**20} MiB")
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if line := line.strip():
            yield number, line


def _next_line(stream: BinaryIO, path: Path) -> bytes:
    try:
        return stream.readline(MAX_LINE_BYTES + 1)
    except OSError as error:
        raise DatasetError(problem=f"{path} cannot be read: {error.strerror or error}") from error


def _decoded(line: bytes, path: Path, number: int) -> Any:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        hint = "; it looks like UTF-16" if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else ""
        _parse_failed(path, number, f"not UTF-8 at byte {error.start}{hint}", error)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        hint = "; a JSONL file holds one whole JSON object a line" if text in ("[", "{") else ""
        _parse_failed(path, number, f"{error.msg} at column {error.colno}{hint}", error)
    except ValueError as error:  # an integer of more digits than Python converts
        _parse_failed(path, number, "a number in it has too many digits", error)
    except RecursionError as error:
        _parse_failed(path, number, "it is nested too deeply", error)


def _row(raw: Any, path: str, number: int) -> Row:
    try:
        return normalise(raw)
    except RowFormatError as error:
        keys = [key[:80] for key in error.keys[:20]]
        raise DatasetFormatError(path=path, line=number, keys=keys, supported=list(SUPPORTED_FORMATS)) from None
    except RowError as error:
        raise DatasetValidationError(path=path, line=number, problem=str(error)) from None


def _parse_failed(path: Path, number: int, problem: str, cause: Exception | None = None) -> NoReturn:
    raise DatasetParseError(path=str(path), line=number, problem=problem) from cause
