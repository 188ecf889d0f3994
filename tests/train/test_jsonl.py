"""Reading rows: every way a file can be wrong ends in a typed error that names file and line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainwarden.errors import (
    DatasetError,
    DatasetFormatError,
    DatasetNotFoundError,
    DatasetParseError,
    DatasetValidationError,
    WardenError,
)
from trainwarden.train import jsonl
from trainwarden.train.jsonl import read_jsonl, read_sequence
from trainwarden.train.rows import Chat, Text

GOOD = b'{"text": "one"}'


def written(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "content",
    [
        b'{"text": "one"}\n{"text": "two"}\n',
        b'{"text": "one"}\n{"text": "two"}',
        b'\xef\xbb\xbf{"text": "one"}\r\n{"text": "two"}\r\n',
        b'\n\n{"text": "one"}\n   \n\t\n{"text": "two"}\n\n',
    ],
    ids=["plain", "no last newline", "byte-order mark and CRLF", "blank lines"],
)
def test_the_same_rows_are_read_however_lines_end(tmp_path: Path, content: bytes) -> None:
    assert read_jsonl(written(tmp_path, content)) == [Text("one"), Text("two")]


def test_formats_may_be_mixed_row_by_row(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD + b'\n{"question": "q", "answer": "a"}\n')
    assert [type(row) for row in read_jsonl(path)] == [Text, Chat]


def test_a_line_separator_inside_a_string_is_text_and_no_line_end(tmp_path: Path) -> None:
    path = written(tmp_path, json.dumps({"text": "one\u2028two\x85three"}, ensure_ascii=False).encode())
    assert read_jsonl(path) == [Text("one\u2028two\x85three")]


def test_the_limit_stops_before_a_later_bad_line(tmp_path: Path) -> None:
    assert read_jsonl(written(tmp_path, GOOD + b"\nnonsense"), limit=1) == [Text("one")]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"nonsense", "Expecting value at column 1"),
        (b'{"text": "one"', "at column"),
        (b"{", "one whole JSON object a line"),
        (b'{"text": "caf\xe9"}', "not UTF-8 at byte 13"),
        (b'{"text": ' + b"9" * 5000 + b"}", "too many digits"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"text": "one"} {"text": "two"}', "Extra data"),
    ],
    ids=["no json", "cut off", "pretty-printed", "latin-1", "huge number", "deep", "two in a line"],
)
def test_a_line_that_is_no_json_is_named_with_its_number(tmp_path: Path, line: bytes, words: str) -> None:
    path = written(tmp_path, GOOD + b"\n\n" + line + b"\n" + GOOD)
    with pytest.raises(DatasetParseError) as caught:
        read_jsonl(path)
    assert caught.value.details["line"] == 3
    assert caught.value.details["path"] == str(path)
    assert words in str(caught.value)
    assert caught.value.exit_code == 65


def test_utf_16_is_recognised(tmp_path: Path) -> None:
    with pytest.raises(DatasetParseError, match="UTF-16"):
        read_jsonl(written(tmp_path, '{"text": "one"}'.encode("utf-16")))


def test_a_line_longer_than_any_row_is_refused_without_reading_it_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 2**20)
    path = tmp_path / "huge.jsonl"
    with path.open("wb") as stream:
        stream.write(GOOD + b"\n")
        stream.truncate(2**34)  # a sparse file: 16 GiB of zero bytes in one line
    with pytest.raises(DatasetParseError, match="longer than 1 MiB") as caught:
        read_jsonl(path)
    assert caught.value.details["line"] == 2


def test_an_unusable_value_is_named_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(DatasetValidationError, match="`output` is empty") as caught:
        read_jsonl(written(tmp_path, GOOD + b'\n{"instruction": "x", "output": ""}'))
    assert caught.value.details["line"] == 2


def test_an_unknown_shape_lists_its_keys_and_what_is_supported(tmp_path: Path) -> None:
    with pytest.raises(DatasetFormatError) as caught:
        read_jsonl(written(tmp_path, GOOD + b'\n{"foo": 1, "bar": 2}'))
    assert caught.value.details["line"] == 2
    assert caught.value.details["keys"] == ["bar", "foo"]
    assert any("instruction" in supported for supported in caught.value.details["supported"])


def test_a_missing_file_is_its_own_error(tmp_path: Path) -> None:
    with pytest.raises(DatasetNotFoundError) as caught:
        read_jsonl(tmp_path / "nowhere.jsonl")
    assert caught.value.exit_code == 66


@pytest.mark.parametrize("name", ["file/below/a/file", "nul\0byte"])
def test_a_path_that_cannot_exist_is_a_missing_file(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_bytes(GOOD)
    with pytest.raises(DatasetNotFoundError):
        read_jsonl(f"{tmp_path}/{name}")


def test_a_directory_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="is a directory"):
        read_jsonl(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo") or os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_says_why(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD)
    path.chmod(0)
    with pytest.raises(DatasetError, match="Permission denied"):
        read_jsonl(path)


def test_a_read_error_in_the_middle_is_typed() -> None:
    with pytest.raises(DatasetError, match="cannot be read"):
        read_jsonl("/proc/self/mem")  # opens, and fails to read at address 0


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf\n"])
def test_a_file_without_rows_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(DatasetError, match="holds no rows"):
        read_jsonl(written(tmp_path, content))


def test_rows_in_memory_are_read_by_index() -> None:
    assert read_sequence([{"text": "one"}, {"text": "two"}], limit=1) == [Text("one")]


class Table:
    """Like a ``datasets.Dataset``: a length, an index, and None for what a row has not."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> dict[str, Any]:
        return [{"text": "one", "prompt": None}, {"text": None, "prompt": "p", "completion": "c"}][index]


def test_a_table_like_data_set_is_read() -> None:
    assert [type(row) for row in read_sequence(Table())] == [Text, Chat]  # type: ignore[arg-type]


def test_a_bad_row_in_memory_is_named_by_its_number() -> None:
    with pytest.raises(DatasetValidationError) as caught:
        read_sequence([{"text": "one"}, {"text": ""}])
    assert caught.value.details["line"] == 2


def test_no_rows_in_memory_are_refused() -> None:
    with pytest.raises(DatasetError):
        read_sequence([])


@given(content=st.binary(max_size=400) | st.lists(st.sampled_from([GOOD, b"\n", b"{", b"\xff"])).map(b"".join))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_arbitrary_bytes_give_rows_or_a_typed_error(tmp_path: Path, content: bytes) -> None:
    try:
        rows = read_jsonl(written(tmp_path, content))
    except WardenError as error:
        json.dumps(error.to_dict())
    else:
        assert rows
