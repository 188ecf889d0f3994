"""The event log: every event a line, never in the way of the run, readable after any ending."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.runs.processes import line_from, python
from tests.waiting import until
from trainwarden.events import MetricsLogged, Notice, RunStarted, StepCompleted
from trainwarden.runs import EventLog, read_events
from trainwarden.runs import event_log as module


def metrics(step: int, loss: float = 1.5) -> MetricsLogged:
    return MetricsLogged(
        step=step,
        max_steps=10,
        loss=loss,
        grad_norm=None,
        learning_rate=1e-4,
        tokens_per_s=10.0,
        memory_bytes=None,
        temperature_c=None,
        steps_skipped=0,
        shrinks=0,
    )


def written(path: Path, *events: Any) -> list[dict[str, Any]]:
    log = EventLog(path, run_id="r-1")
    for event in events:
        log(event)
    log.close()
    assert log.dropped == 0
    return list(read_events(path))


def test_an_event_is_a_line_with_its_time_and_its_run(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    [record] = written(path, Notice(step=3, text="a choice"))
    stamp = datetime.fromisoformat(record.pop("ts"))
    assert stamp.utcoffset() == timedelta(0)
    assert abs(datetime.now(UTC) - stamp) < timedelta(minutes=1)
    assert record == {"run_id": "r-1", "event": "notice", "level": "notice", "step": 3, "text": "a choice"}


def test_events_keep_their_order(tmp_path: Path) -> None:
    records = written(tmp_path / "e", *(Notice(step=n, text="") for n in range(500)))
    assert [record["step"] for record in records] == list(range(500))


def test_a_nan_loss_stands_in_the_log_as_nan_and_the_line_is_strict_json(tmp_path: Path) -> None:
    written(tmp_path / "e", metrics(1, loss=math.nan))

    def refuse(word: str) -> None:
        raise AssertionError(word)

    record = json.loads((tmp_path / "e").read_text(), parse_constant=refuse)
    assert record["loss"] == "nan"
    assert record["grad_norm"] is None


def test_debug_events_are_left_out(tmp_path: Path) -> None:
    assert written(tmp_path / "e", StepCompleted(step=1, epoch=0, step_s=0.1)) == []


def test_strings_are_redacted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "redact", lambda text: text.replace("hf_secret", "[redacted]"))
    [record] = written(tmp_path / "e", Notice(step=0, text="token hf_secret was used"))
    assert record["text"] == "token [redacted] was used"


def test_a_redaction_that_fails_drops_the_event_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(text: str) -> str:
        raise RuntimeError(text)

    monkeypatch.setattr(module, "redact", broken)
    log = EventLog(tmp_path / "e", run_id="r")
    log(Notice(step=0, text="x"))
    log.close()
    assert log.dropped == 1


def test_the_calling_thread_touches_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = set()

    def spying(path: Any, *arguments: Any) -> int:
        threads.add(threading.current_thread().name)
        return real(path, *arguments)

    real = os.open
    monkeypatch.setattr(module.os, "open", spying)
    written(tmp_path / "e", Notice(step=0, text="x"))
    assert threads == {"warden-event-log"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_counted_and_not_raised() -> None:
    log = EventLog("/dev/full", run_id="r")
    for number in range(7):
        log(Notice(step=number, text="x"))
    log.close()
    assert log.dropped == 7


def test_a_directory_that_is_gone_is_counted_and_not_raised(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "gone" / "events.jsonl", run_id="r")
    log(Notice(step=0, text="x"))
    log.close()
    assert log.dropped == 1


def test_a_disk_that_was_full_for_a_while_costs_only_the_events_of_that_while(tmp_path: Path) -> None:
    """RLIMIT_FSIZE makes a write fall short in the middle of a line, as a full disk does."""
    code = """
        import resource, signal, sys
        from trainwarden.events import Notice
        from trainwarden.runs.event_log import _AppendFile
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        file = _AppendFile(__import__("pathlib").Path(sys.argv[1]))
        line = b'{"event": "notice", "n": %d}\\n'
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        lost = file.append([line % 1])
        resource.setrlimit(resource.RLIMIT_FSIZE, (40, hard))
        lost += file.append([line % 2, line % 3])
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        lost += file.append([line % 4])
        print(lost, flush=True)
    """
    with python(code, tmp_path / "e") as process:
        assert line_from(process) == "2"
    unreadable: list[int] = []
    records = list(read_events(tmp_path / "e", on_unreadable=unreadable.append))
    assert [record["n"] for record in records] == [1, 4]
    assert unreadable == [2]


def test_close_waits_no_longer_than_its_deadline_for_a_disk_that_hangs(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)  # takes what fits into its buffer; then a write waits for a reader who does not come
    log = EventLog(pipe, run_id="r")
    for number in range(2000):
        log(Notice(step=number, text="x" * 200))
    log.close(deadline_s=0.2)
    assert log._thread.is_alive()
    with pipe.open("rb", buffering=0) as reader:
        while log._thread.is_alive():
            reader.read(1 << 16)


def test_events_after_the_end_are_counted(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "e", run_id="r")
    log.close()
    log.close()
    log(Notice(step=0, text="late"))
    assert log.dropped == 1


def test_a_script_that_forgets_to_close_loses_nothing(tmp_path: Path) -> None:
    code = """
        import sys
        from trainwarden.events import Notice
        from trainwarden.runs import EventLog
        log = EventLog(sys.argv[1], run_id="r")
        for n in range(1000):
            log(Notice(step=n, text="x"))
        print("done", flush=True)
    """
    with python(code, tmp_path / "e") as process:
        line_from(process)
        process.wait()
    assert len(list(read_events(tmp_path / "e"))) == 1000


def test_a_forked_child_neither_writes_nor_hangs(tmp_path: Path) -> None:
    code = """
        import os, sys
        from trainwarden.events import Notice
        from trainwarden.runs import EventLog
        log = EventLog(sys.argv[1], run_id="r")
        log(Notice(step=1, text="parent"))
        child = os.fork()
        if child == 0:
            log(Notice(step=2, text="child"))
            log.close()
            sys.exit(log.dropped)
        _, status = os.waitpid(child, 0)
        log(Notice(step=3, text="parent"))
        log.close()
        print(os.waitstatus_to_exitcode(status), flush=True)
    """
    with python(code, tmp_path / "e") as process:
        assert line_from(process) == "1"
    assert [record["step"] for record in read_events(tmp_path / "e")] == [1, 3]


def test_a_log_that_was_killed_mid_line_is_readable_and_continued(tmp_path: Path) -> None:
    path = tmp_path / "e"
    written(path, Notice(step=1, text="whole"))
    with path.open("ab") as stream:
        stream.write(b'{"ts": "2026-11-20T21:58:00", "eve')
    assert [record["step"] for record in read_events(path)] == [1]
    records = written(path, Notice(step=2, text="after the resume"))
    assert [record["step"] for record in records] == [1, 2]


def test_kill_9_of_a_busy_writer_leaves_whole_lines(tmp_path: Path) -> None:
    code = """
        import itertools, sys
        from trainwarden.events import Notice
        from trainwarden.runs import EventLog
        log = EventLog(sys.argv[1], run_id="r")
        print("writing", flush=True)
        for n in itertools.count():
            log(Notice(step=n, text="x" * 300))
    """
    path = tmp_path / "e"
    with python(code, path) as process:
        line_from(process)
        until(lambda: process.poll() is not None or (path.exists() and path.stat().st_size > 100_000))
        assert process.poll() is None
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    unreadable: list[int] = []
    steps = [record["step"] for record in read_events(path, on_unreadable=unreadable.append)]
    assert steps == list(range(len(steps)))
    assert len(steps) > 100
    assert unreadable in ([], [len(steps) + 1])
    assert written(path, Notice(step=7, text="next"))[-1]["step"] == 7


def test_a_log_that_does_not_exist_has_no_events(tmp_path: Path) -> None:
    assert list(read_events(tmp_path / "none")) == []


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_can_be_read_as_a_log(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(data)
    assert all(isinstance(record, dict) for record in read_events(path))


@settings(deadline=None)
@given(steps=st.lists(st.integers(0, 10**9), min_size=1, max_size=20), cut=st.integers(1, 200))
def test_a_cut_loses_only_the_events_behind_it(
    tmp_path_factory: pytest.TempPathFactory, steps: list[int], cut: int
) -> None:
    whole = io.BytesIO()
    for step in steps:
        whole.write(json.dumps({"event": "notice", "step": step}).encode() + b"\n")
    data = whole.getvalue()[:-cut]
    path = tmp_path_factory.getbasetemp() / "cut.jsonl"
    path.write_bytes(data)
    read = [record["step"] for record in read_events(path)]
    assert read == steps[: len(read)]
    assert len(read) >= data.count(b"\n")


def test_a_start_names_the_run_directory(tmp_path: Path) -> None:
    [record] = written(tmp_path / "e", RunStarted(step=0, run_id="r-1", run_dir="runs/demo"))
    assert record["event"] == "run_started"
    assert record["run_dir"] == "runs/demo"
