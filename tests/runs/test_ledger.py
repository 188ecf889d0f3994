"""The ledger: every run a row, from many processes at once, and never the reason that a run fails."""

from __future__ import annotations

import json
import math
import os
import signal
import sqlite3
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.runs.processes import line_from, python
from trainwarden.errors import LedgerError, RunNotFoundError
from trainwarden.memory.overheads import RunMemory
from trainwarden.runs import Ledger, ProcessIdentity
from trainwarden.runs import ledger as module

STARTED = """
    import sys
    from trainwarden.runs import Ledger
    Ledger(sys.argv[1]).started(run_id="r-child", path=sys.argv[2], command=["python", "train.py"])
    print("started", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "home" / "ledger.sqlite")


def start(ledger: Ledger, run_id: str, path: str = "runs/a", **more: Any) -> None:
    ledger.started(run_id=run_id, path=path, command=["python", "train.py"], **more)


def test_a_ledger_nobody_wrote_is_empty_and_is_not_made_by_looking(ledger: Ledger) -> None:
    assert ledger.rows() == []
    assert not ledger.path.parent.exists()


def test_a_run_is_listed_from_its_start(ledger: Ledger, tmp_path: Path) -> None:
    start(ledger, "r-1", str(tmp_path / "a"), model="tiny")
    [row] = ledger.rows()
    assert (row.run_id, row.status, row.pid, row.model) == ("r-1", "running", os.getpid(), "tiny")
    assert row.path == str(tmp_path / "a")
    assert row.command_line == "python train.py"
    assert row.steps_completed is None
    assert row.ended_at is None


def test_a_relative_path_is_stored_whole(ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    start(ledger, "r-1", "runs/a")
    monkeypatch.chdir("/")
    assert ledger.rows()[0].path == str(tmp_path / "runs" / "a")


def test_an_ending_is_kept_whole(ledger: Ledger) -> None:
    start(ledger, "r-1")
    ledger.finished(
        "r-1",
        status="stopped",
        steps_completed=40,
        steps_skipped=2,
        shrinks=1,
        data_skipped=3,
        final_loss=0.1,
        exit_code=75,
        code="RUNTIME_TRAINING_ABORTED",
        checkpoint_path="/runs/a/checkpoints/step-00000040",
    )
    record = ledger.rows()[0].to_dict()
    assert record.pop("ended_at") >= record.pop("started_at")
    assert record == {
        "run_id": "r-1",
        "path": str(Path("runs/a").absolute()),
        "command": ["python", "train.py"],
        "status": "stopped",
        "pid": os.getpid(),
        "starts": 1,
        "steps_completed": 40,
        "steps_skipped": 2,
        "shrinks": 1,
        "data_skipped": 3,
        "final_loss": 0.1,
        "exit_code": 75,
        "code": "RUNTIME_TRAINING_ABORTED",
        "checkpoint_path": "/runs/a/checkpoints/step-00000040",
        "model": None,
    }


@settings(deadline=None)
@given(st.floats() | st.none())
def test_a_loss_comes_back_as_it_was_and_nan_is_nan(
    tmp_path_factory: pytest.TempPathFactory, loss: float | None
) -> None:
    ledger = Ledger(tmp_path_factory.mktemp("losses") / "ledger.sqlite")
    start(ledger, "r-1")
    ledger.finished("r-1", status="failed", final_loss=loss)
    read = ledger.rows()[0].final_loss
    if loss is not None and math.isnan(loss):
        assert read is not None
        assert math.isnan(read)
        assert ledger.rows()[0].to_dict()["final_loss"] == "nan"
    else:
        assert read == loss
        assert json.dumps(ledger.rows()[0].to_dict(), allow_nan=False)


def test_unknown_is_not_zero(ledger: Ledger) -> None:
    start(ledger, "r-1")
    ledger.finished("r-1", status="failed")
    row = ledger.rows()[0]
    assert (row.steps_completed, row.steps_skipped, row.shrinks, row.final_loss) == (None, None, None, None)


def test_a_resumed_run_stays_one_row(ledger: Ledger) -> None:
    start(ledger, "r-1", model="tiny")
    ledger.finished("r-1", status="stopped", steps_completed=4, exit_code=75, code="RUNTIME_TRAINING_ABORTED")
    first = ledger.rows()[0]
    start(ledger, "r-1", "moved/here")
    [row] = ledger.rows()
    assert (row.status, row.starts, row.model) == ("running", 2, "tiny")
    assert (row.exit_code, row.code, row.ended_at) == (None, None, None)
    assert row.started_at == first.started_at
    assert row.path.endswith("moved/here")


def test_runs_are_listed_newest_first(ledger: Ledger) -> None:
    for number in range(5):
        start(ledger, f"r-{number}")
    assert [row.run_id for row in ledger.rows()] == ["r-4", "r-3", "r-2", "r-1", "r-0"]
    assert [row.run_id for row in ledger.rows(limit=2)] == ["r-4", "r-3"]


def test_a_run_whose_process_was_killed_is_lost(ledger: Ledger, tmp_path: Path) -> None:
    with python(STARTED, ledger.path, tmp_path) as child:
        line_from(child)
        assert ledger.rows()[0].status == "running"
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        assert ledger.rows()[0].status == "lost"


def test_a_recycled_pid_does_not_make_a_dead_run_alive(ledger: Ledger) -> None:
    me = ProcessIdentity.current()
    start(ledger, "r-1", process=ProcessIdentity(pid=me.pid, start="earlier-boot:7", host=me.host))
    assert ledger.rows()[0].status == "lost"


def test_a_run_on_another_machine_is_unknown_from_here(ledger: Ledger) -> None:
    me = ProcessIdentity.current()
    start(ledger, "r-1", process=ProcessIdentity(pid=me.pid, start=me.start, host="another-machine"))
    assert ledger.rows()[0].status == "unknown"


def test_a_run_is_found_by_id_by_its_beginning_and_by_directory(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    start(ledger, "20261120-215800-3f9a", "runs/a")
    start(ledger, "20261121-080000-77aa", "runs/b")
    for reference in (
        "20261120-215800-3f9a",
        "20261120",
        "runs/a",
        str(tmp_path / "runs" / "a"),
        "./runs/a/",
    ):
        assert ledger.find(reference).run_id == "20261120-215800-3f9a"


def test_a_directory_that_was_used_twice_means_its_newest_run(ledger: Ledger) -> None:
    start(ledger, "r-1", "runs/a")
    start(ledger, "r-2", "runs/a")
    assert ledger.find("runs/a").run_id == "r-2"


def test_a_whole_id_that_begins_another_is_not_ambiguous(ledger: Ledger) -> None:
    start(ledger, "r-1")
    start(ledger, "r-10")
    assert ledger.find("r-1").run_id == "r-1"


def test_an_ambiguous_beginning_names_what_it_could_be(ledger: Ledger) -> None:
    for name in ("r-1a", "r-1b", "q-2"):
        start(ledger, name)
    with pytest.raises(RunNotFoundError) as caught:
        ledger.find("r-1")
    assert caught.value.details == {"run": "r-1", "known": ["r-1b", "r-1a"]}


@pytest.mark.parametrize("reference", ["nothing", "", "runs/none"])
def test_an_unknown_run_names_the_known_ones(ledger: Ledger, reference: str) -> None:
    start(ledger, "r-1")
    with pytest.raises(RunNotFoundError) as caught:
        ledger.find(reference)
    assert caught.value.details["known"] == ["r-1"]


def test_many_processes_write_at_once_and_nothing_is_lost(ledger: Ledger) -> None:
    """They also race to make the file."""
    code = """
        import sys
        from trainwarden.runs import Ledger, ledger as module
        module._BUSY_S = 300  # four writers and a slow disk: nobody is promised a turn within seconds
        ledger = Ledger(sys.argv[1])
        sys.stdin.readline()
        for n in range(10):
            run_id = f"{sys.argv[2]}-{n}"
            ledger.started(run_id=run_id, path="runs/" + run_id, command=["x"])
            ledger.finished(run_id, status="finished", steps_completed=n)
        print("done", flush=True)
    """
    with ExitStack() as stack:
        writers = [stack.enter_context(python(code, ledger.path, f"w{n}")) for n in range(4)]
        for writer in writers:
            assert writer.stdin is not None
            writer.stdin.write("go\n")
            writer.stdin.flush()
        for writer in writers:
            assert line_from(writer) == "done"
    rows = ledger.rows()
    assert {row.run_id for row in rows} == {f"w{w}-{n}" for w in range(4) for n in range(10)}
    assert all(row.steps_completed == int(row.run_id.split("-")[1]) for row in rows)


def test_kill_9_in_the_middle_of_writing_leaves_a_ledger_that_works(ledger: Ledger) -> None:
    code = """
        import itertools, sys
        from trainwarden.runs import Ledger
        ledger = Ledger(sys.argv[1])
        for n in itertools.count():
            ledger.started(run_id=f"r-{n}", path="a", command=["x"])
            print(n, flush=True)
    """
    with python(code, ledger.path) as writer:
        while int(line_from(writer)) < 20:
            pass
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
    names = {row.run_id for row in ledger.rows()}
    assert names >= {f"r-{n}" for n in range(21)}
    start(ledger, "after")
    assert ledger.find("after").status == "running"


def test_a_corrupt_file_is_a_ledger_error_for_who_reads(ledger: Ledger) -> None:
    ledger.path.parent.mkdir()
    ledger.path.write_bytes(b"not a database at all, but long enough to look at" * 100)
    with pytest.raises(LedgerError) as caught:
        ledger.rows()
    assert caught.value.details["path"] == str(ledger.path)
    assert "not a database" in caught.value.message


def test_a_corrupt_file_is_a_word_of_warning_for_a_run(ledger: Ledger) -> None:
    ledger.path.parent.mkdir()
    ledger.path.write_bytes(b"garbage" * 1000)
    problems: list[str] = []
    assert Ledger.open_or_none(problems.append, ledger.path) is None
    assert len(problems) == 1
    assert "not a database" in problems[0]
    assert ledger.path.read_bytes() == b"garbage" * 1000


def test_a_home_that_cannot_be_made_is_a_word_of_warning_for_a_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    problems: list[str] = []
    assert Ledger.open_or_none(problems.append, tmp_path / "file" / "ledger.sqlite") is None
    assert len(problems) == 1


def test_a_ledger_that_breaks_during_a_run_is_a_word_of_warning(ledger: Ledger) -> None:
    problems: list[str] = []
    opened = Ledger.open_or_none(problems.append, ledger.path)
    assert opened is not None
    start(opened, "r-1")
    assert problems == []
    ledger.path.write_bytes(b"garbage" * 1000)
    opened.finished("r-1", status="finished")
    assert len(problems) == 1


def test_a_ledger_that_somebody_keeps_locked_is_a_word_of_warning(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BUSY_S", 0.1)
    problems: list[str] = []
    opened = Ledger.open_or_none(problems.append, ledger.path)
    assert opened is not None
    other = sqlite3.connect(ledger.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    start(opened, "r-1")
    assert len(problems) == 1
    assert "locked" in problems[0]
    assert ledger.rows() == []  # reading needs no lock
    other.close()
    start(opened, "r-1")
    assert len(problems) == 1


def test_a_ledger_locked_even_for_readers_is_not_read_behind_the_back_of_its_writer(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BUSY_S", 0.1)
    start(ledger, "r-1")
    other = sqlite3.connect(ledger.path, isolation_level=None)
    other.execute("PRAGMA locking_mode = EXCLUSIVE")
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(LedgerError, match="locked"):
        ledger.rows()
    other.close()
    assert len(ledger.rows()) == 1


def test_the_end_of_a_run_that_never_started_is_an_error(ledger: Ledger) -> None:
    with pytest.raises(LedgerError) as caught:
        ledger.finished("r-9", status="finished")
    assert "r-9" in caught.value.message


def test_a_ledger_of_a_newer_trainwarden_is_refused_and_kept(ledger: Ledger) -> None:
    start(ledger, "r-1")
    with sqlite3.connect(ledger.path) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    for attempt in (ledger.rows, lambda: start(ledger, "r-2")):
        with pytest.raises(LedgerError, match="schema 99"):
            attempt()


def test_an_older_ledger_is_brought_to_the_present_schema(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    start(ledger, "r-1")
    newer = [*module.MIGRATIONS, ("ALTER TABLE runs ADD COLUMN note TEXT", "UPDATE runs SET note = 'moved'")]
    monkeypatch.setattr(module, "MIGRATIONS", newer)
    assert [row.run_id for row in ledger.rows()] == ["r-1"]
    with sqlite3.connect(ledger.path) as connection:
        assert connection.execute("SELECT note FROM runs").fetchall() == [("moved",)]
        assert connection.execute("PRAGMA user_version").fetchone() == (len(newer),)
    connection.close()


def test_a_migration_that_fails_changes_nothing(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    start(ledger, "r-1")
    broken = [*module.MIGRATIONS, ("ALTER TABLE runs ADD COLUMN note TEXT", "UPDATE nowhere SET x = 1")]
    monkeypatch.setattr(module, "MIGRATIONS", broken)
    with pytest.raises(LedgerError):
        start(ledger, "r-2")
    monkeypatch.undo()
    assert [row.run_id for row in ledger.rows()] == ["r-1"]


def test_a_ledger_in_a_directory_without_write_permission_can_be_read() -> None:
    with tempfile.TemporaryDirectory() as place:  # tmp_path is closed to everybody else
        ledger = Ledger(Path(place) / "ledger.sqlite")
        start(ledger, "r-1")
        Path(place).chmod(0o555)
        child = os.fork()
        if child == 0:
            try:
                if os.geteuid() == 0:  # who may write everywhere
                    os.setuid(65534)
                os._exit(0 if [row.run_id for row in ledger.rows()] == ["r-1"] else 1)
            finally:
                os._exit(2)
        _, status = os.waitpid(child, 0)
        Path(place).chmod(0o755)
    assert os.waitstatus_to_exitcode(status) == 0


def test_the_ledger_lives_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WARDEN_HOME", str(tmp_path / "w"))
    assert Ledger().path == tmp_path / "w" / "ledger.sqlite"
    monkeypatch.delenv("WARDEN_HOME")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "s"))
    assert Ledger().path == tmp_path / "s" / "trainwarden" / "ledger.sqlite"
    for nothing in ("", "relative"):
        monkeypatch.setenv("XDG_STATE_HOME", nothing)
        monkeypatch.setenv("HOME", str(tmp_path))
        assert Ledger().path == tmp_path / ".local" / "state" / "trainwarden" / "ledger.sqlite"


def test_a_finished_run_that_is_started_again_keeps_its_last_loss() -> None:
    ledger = Ledger()
    for loss in (0.25, None):
        ledger.started(run_id="r-1", path="runs/a", command=["python"])
        ledger.finished("r-1", status="finished", final_loss=loss)
    assert ledger.rows()[0].final_loss == 0.25


def test_predicted_and_real_peaks_are_kept_newest_first(ledger: Ledger) -> None:
    assert ledger.memory_of_runs() == []
    memories = [RunMemory(device="a card", predicted_bytes=10 + n, allocated_bytes=11 + n) for n in range(3)]
    for number, memory in enumerate(memories):
        start(ledger, f"r-{number}")
        ledger.note_memory(f"r-{number}", memory)
    assert ledger.memory_of_runs() == memories[::-1]
    assert ledger.memory_of_runs(1) == memories[-1:]


def test_a_continued_run_has_the_memory_of_its_latest_part(ledger: Ledger) -> None:
    start(ledger, "r-1")
    ledger.note_memory("r-1", RunMemory(device="a card", predicted_bytes=1, allocated_bytes=None))
    latest = RunMemory(device="a card", predicted_bytes=2, allocated_bytes=3, reserved_bytes=4, context_bytes=5)
    ledger.note_memory("r-1", latest)
    assert ledger.memory_of_runs() == [latest]


def test_the_memory_of_a_run_that_is_not_listed_is_a_problem(ledger: Ledger) -> None:
    start(ledger, "r-1")
    with pytest.raises(LedgerError, match="no run r-2"):
        ledger.note_memory("r-2", RunMemory(device="a card", predicted_bytes=1, allocated_bytes=1))


def test_a_ledger_from_before_memory_was_kept_gains_the_table(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as older:
        older.setattr(module, "MIGRATIONS", module.MIGRATIONS[:1])
        start(ledger, "r-1")
    ledger.note_memory("r-1", RunMemory(device="a card", predicted_bytes=1, allocated_bytes=1))
    assert len(ledger.memory_of_runs()) == 1
    assert [row.run_id for row in ledger.rows()] == ["r-1"]
