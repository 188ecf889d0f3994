"""``errors.jsonl``: each record once, whole, and without secrets."""

from __future__ import annotations

import json
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainwarden.runs.error_log import ErrorLog, read_errors

KEY = ("epoch", "index")


def log(path: Path) -> ErrorLog:
    return ErrorLog(path, key=KEY)


def test_a_file_is_made_by_the_first_record(tmp_path: Path) -> None:
    path = tmp_path / "errors.jsonl"
    errors = log(path)
    assert not path.exists()
    assert list(read_errors(path)) == []
    assert errors.append({"epoch": 0, "index": 3, "cause": "ValueError"})
    (line,) = path.read_text().splitlines()
    record = json.loads(line)
    assert record.pop("ts").endswith("+00:00")
    assert record == {"epoch": 0, "index": 3, "cause": "ValueError"}


def test_what_is_there_already_is_not_written_again(tmp_path: Path) -> None:
    path = tmp_path / "errors.jsonl"
    assert log(path).append({"epoch": 0, "index": 3, "step": 7})
    again = log(path)  # the resumed run
    assert not again.append({"epoch": 0, "index": 3, "step": 5})
    assert again.append({"epoch": 1, "index": 3, "step": 9})
    assert not again.append({"epoch": 1, "index": 3, "step": 9})
    assert [(record["epoch"], record["index"]) for record in read_errors(path)] == [(0, 3), (1, 3)]


def test_several_processes_may_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "errors.jsonl"
    logs = [ErrorLog(path, key=("rank", "index")) for _ in range(2)]
    for index in range(20):
        for rank in (0, 1):
            assert logs[rank].append({"rank": rank, "index": index})
    assert len(list(read_errors(path))) == 40


@pytest.mark.parametrize("torn", [b'{"epoch": 0, "ind', b'{"epoch": 0, "index": 1}', b"\x00\x00\x00", b"[1]"])
def test_half_a_line_left_by_a_kill_costs_no_other(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "errors.jsonl"
    path.write_bytes(b'{"epoch": 0, "index": 0}\n' + torn)
    assert log(path).append({"epoch": 0, "index": 2})
    indices = [record["index"] for record in read_errors(path)]
    assert [index for index in indices if index != 1] == [0, 2]
    assert path.read_bytes().startswith(b'{"epoch": 0, "index": 0}\n' + torn + b"\n")


def test_secrets_and_homes_do_not_reach_the_file(tmp_path: Path) -> None:
    path = tmp_path / "errors.jsonl"
    token = "hf_" + "a1" * 16
    log(path).append({"epoch": 0, "index": f"/home/somebody/data/{token}", "cause": f"token={token}"})
    text = path.read_text()
    assert token not in text
    assert "somebody" not in text


def test_a_file_that_cannot_be_written_is_counted_and_never_raised(tmp_path: Path) -> None:
    (tmp_path / "errors.jsonl").mkdir()
    errors = log(tmp_path / "errors.jsonl")
    assert errors.append({"epoch": 0, "index": 3})
    assert errors.dropped == 1
    assert not errors.append({"epoch": 0, "index": 3})
    assert errors.dropped == 1


def open_files() -> int:
    return psutil.Process().num_fds()


def test_no_file_stays_open(tmp_path: Path) -> None:
    before = open_files()
    errors = log(tmp_path / "errors.jsonl")
    for index in range(5):
        errors.append({"epoch": 0, "index": index})
    assert open_files() == before


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5) | st.text(max_size=3)), max_size=12))
def test_every_pair_is_there_once_and_in_order(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[int, int | str]]
) -> None:
    path = tmp_path_factory.mktemp("log") / "errors.jsonl"
    errors = log(path)
    for epoch, index in pairs:
        errors.append({"epoch": epoch, "index": index})
    assert [(record["epoch"], record["index"]) for record in read_errors(path)] == list(dict.fromkeys(pairs))
