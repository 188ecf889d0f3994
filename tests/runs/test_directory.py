"""A run directory: created once, found again, held by one process, and never cleaned up."""

from __future__ import annotations

import gc
import json
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.runs.processes import line_from, python
from trainwarden.errors import ConfigurationError, DiskFullError, InvalidSettingError, RunLockedError
from trainwarden.runs import RunDirectory, RunManifest

HOLDER = """
    import sys, time
    from trainwarden.runs import RunDirectory
    directory = RunDirectory.open(sys.argv[1], command=["python", "train.py"])
    print(directory.run_id, flush=True)
    sys.stdin.read()
"""


def run_json(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((path / "run.json").read_text())
    return loaded


def test_a_new_directory_gets_an_id_and_says_what_started_it(tmp_path: Path) -> None:
    with RunDirectory.open(tmp_path / "deep" / "run", command=["python", "train.py", "--x"]) as directory:
        saved = run_json(directory.path)
        assert not directory.reopened
    assert re.fullmatch(r"\d{8}-\d{6}-[0-9a-f]{4}", directory.run_id)
    assert saved["run_id"] == directory.run_id
    assert saved["command"] == ["python", "train.py", "--x"]
    assert saved["config"] is None
    assert saved["created_at"].endswith("+00:00")
    assert saved["version"]


def test_a_directory_opened_again_keeps_its_id_and_its_configuration(tmp_path: Path) -> None:
    with RunDirectory.open(tmp_path, command=["warden", "train", "a.yaml"], config={"seed": 1}) as first:
        pass
    with RunDirectory.open(tmp_path, command=["warden", "resume", "."]) as second:
        assert second.reopened
    assert second.run_id == first.run_id
    assert second.manifest.created_at == first.manifest.created_at
    assert second.manifest.config == {"seed": 1}


def test_a_start_that_is_refused_leaves_the_run_as_it_was(tmp_path: Path) -> None:
    with RunDirectory.open(tmp_path, command=["warden", "train", "a.yaml"], config={"seed": 1}):
        before = (tmp_path / "run.json").read_bytes()
    with RunDirectory.open(tmp_path, command=["warden", "train", "b.yaml"], config={"seed": 2}):
        pass  # found out that it does not fit
    assert (tmp_path / "run.json").read_bytes() == before


def test_a_start_that_is_accepted_becomes_the_one_to_resume(tmp_path: Path) -> None:
    with RunDirectory.open(tmp_path, command=["python", "train.py"]) as first:
        first.record_start()
    with RunDirectory.open(tmp_path, command=["python", "train.py", "--more"]) as second:
        assert second.resume_command == "python train.py"
        second.record_start()
        assert second.resume_command == "python train.py --more"
    saved = run_json(tmp_path)
    assert saved["command"] == ["python", "train.py", "--more"]
    assert saved["run_id"] == first.run_id


def test_the_parts_lie_where_the_layout_says(tmp_path: Path) -> None:
    with RunDirectory.open(tmp_path, command=["x"]) as directory:
        assert directory.checkpoints == tmp_path / "checkpoints"
        assert directory.events == tmp_path / "events.jsonl"
    assert sorted(p.name for p in tmp_path.iterdir()) == [".warden.lock", "run.json"]


def test_the_command_is_by_default_the_one_this_process_was_started_with(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("from trainwarden.runs import RunDirectory\nprint(RunDirectory.open('run').resume_command)\n")
    answer = subprocess.run(
        [sys.executable, "-X", "utf8", "train.py", "--name", "two words"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stdout.strip() == f"{sys.executable} -X utf8 train.py --name 'two words'"


def test_a_run_with_a_configuration_is_resumed_by_warden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with RunDirectory.open("runs/my run", command=["warden", "train", "c.yaml"], config={}) as directory:
        assert directory.resume_command == "warden resume 'runs/my run'"
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
    with RunDirectory.open(tmp_path / "run", command=["x"], config={}) as directory:
        assert directory.resume_command == f"warden resume {tmp_path / 'run'}"


def test_a_run_of_ones_own_script_is_resumed_by_the_same_command_in_the_same_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "my work"
    work.mkdir()
    monkeypatch.chdir(work)
    with RunDirectory.open("run", command=["python", "train.py", "--x"]) as directory:
        assert directory.resume_command == "python train.py --x"
        monkeypatch.chdir(tmp_path)
        assert directory.resume_command == f"cd '{work}' && python train.py --x"


@settings(deadline=None)
@given(st.lists(st.text(min_size=1).filter(lambda word: "\x00" not in word), min_size=1))
def test_a_resume_command_says_what_was_typed_whatever_was_typed(command: list[str]) -> None:
    manifest = RunManifest.new(command, None)
    assert shlex.split(manifest.resume_command(Path("run"))) == command


def test_unrelated_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "mine.pt").write_text("weights")
    with RunDirectory.open(tmp_path, command=["x"]):
        pass
    with RunDirectory.open(tmp_path, command=["y"]):
        pass
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    assert (tmp_path / "checkpoints" / "mine.pt").read_text() == "weights"
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "cannot be read"),
        ('{"run_id": "2026', "cannot be read"),
        ("[1, 2]", "not written by trainwarden"),
        ('{"pace": "5:12", "kilometres": 42}', "not written by trainwarden"),
        ('{"schema": 99, "run_id": "r"}', "has schema 99"),
        ('{"schema": 1, "run_id": "r", "created_at": "now"}', "'command' is missing"),
    ],
)
def test_a_run_json_that_cannot_be_used_is_refused_and_kept(tmp_path: Path, content: str, complaint: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ConfigurationError) as caught:
        RunDirectory.open(tmp_path, command=["x"])
    assert complaint in caught.value.message
    assert caught.value.details["place"] == str(tmp_path / "run.json")
    assert (tmp_path / "run.json").read_text() == content
    (tmp_path / "run.json").rename(tmp_path / "aside.json")
    RunDirectory.open(tmp_path, command=["x"]).close()  # the refusal did not keep the lock


def test_a_path_that_is_a_file_is_an_invalid_setting(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InvalidSettingError) as caught:
        RunDirectory.open(tmp_path / "file", command=["x"])
    assert caught.value.details["value"] == str(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_file_that_cannot_be_written_whole_leaves_none(tmp_path: Path) -> None:
    code = """
        import resource, signal, sys
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (40, 40))
        from trainwarden.errors import WardenError
        from trainwarden.runs import RunDirectory
        try:
            RunDirectory.open(sys.argv[1], command=["x"])
        except WardenError as error:
            print(error.code, flush=True)
    """
    with python(code, tmp_path) as process:
        assert line_from(process) == "CONFIG_INVALID_SETTING"
    assert not (tmp_path / "run.json").exists()
    assert not list(tmp_path.glob(".run.json*"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "run"
    directory.mkdir()
    # The name under which run.json is first written leads to the device that is always full.
    (directory / f".run.json.{os.getpid()}.tmp").symlink_to("/dev/full")
    with pytest.raises(DiskFullError) as caught:
        RunDirectory.open(directory, command=["x"])
    assert caught.value.details["free_bytes"] > 0
    assert not (directory / "run.json").exists()


def test_a_second_process_is_refused_with_the_pid_of_the_first(tmp_path: Path) -> None:
    with python(HOLDER, tmp_path) as holder:
        run_id = line_from(holder)
        with pytest.raises(RunLockedError) as caught:
            RunDirectory.open(tmp_path, command=["x"])
        assert caught.value.details == {"path": str(tmp_path), "pid": holder.pid}
    assert run_json(tmp_path)["run_id"] == run_id
    assert run_json(tmp_path)["command"] == ["python", "train.py"]


def test_the_same_process_cannot_open_a_directory_twice(tmp_path: Path) -> None:
    with RunDirectory.open(tmp_path, command=["x"]), pytest.raises(RunLockedError) as caught:
        RunDirectory.open(tmp_path, command=["x"])
    assert caught.value.details["pid"] == os.getpid()
    RunDirectory.open(tmp_path, command=["x"]).close()


def test_kill_9_frees_the_directory(tmp_path: Path) -> None:
    with python(HOLDER, tmp_path) as holder:
        run_id = line_from(holder)
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
        with RunDirectory.open(tmp_path, command=["x"]) as directory:
            assert directory.run_id == run_id


def test_of_many_processes_at_once_exactly_one_gets_the_directory(tmp_path: Path) -> None:
    code = """
        import sys
        from trainwarden.errors import RunLockedError
        from trainwarden.runs import RunDirectory
        sys.stdin.readline()
        try:
            directory = RunDirectory.open(sys.argv[1], command=["x"])
        except RunLockedError:
            print("refused", flush=True)
        else:
            print(directory.run_id, flush=True)
        sys.stdin.readline()
    """
    with ExitStack() as stack:
        contenders = [stack.enter_context(python(code, tmp_path)) for _ in range(6)]
        for contender in contenders:
            assert contender.stdin is not None
            contender.stdin.write("go\n")
            contender.stdin.flush()
        answers = [line_from(contender) for contender in contenders]
    assert answers.count("refused") == 5
    assert run_json(tmp_path)["run_id"] in answers


def test_a_forked_worker_that_outlives_a_killed_parent_does_not_keep_the_lock(tmp_path: Path) -> None:
    code = """
        import os, sys, time
        from trainwarden.runs import RunDirectory
        directory = RunDirectory.open(sys.argv[1], command=["x"])
        if os.fork() == 0:
            directory.close()
            print(os.getpid(), flush=True)  # from the worker itself: now it has given up its share of the lock
            time.sleep(3600)
        sys.stdin.read()
    """
    with python(code, tmp_path) as parent:
        worker = int(line_from(parent))
        try:
            with pytest.raises(RunLockedError):  # what the worker does takes nothing from the parent
                RunDirectory.open(tmp_path, command=["x"])
            os.kill(parent.pid, signal.SIGKILL)
            parent.wait()
            os.kill(worker, 0)
            RunDirectory.open(tmp_path, command=["x"]).close()
        finally:
            os.kill(worker, signal.SIGKILL)


def test_a_directory_that_was_forgotten_is_free_again(tmp_path: Path) -> None:
    RunDirectory.open(tmp_path, command=["x"])
    gc.collect()
    RunDirectory.open(tmp_path, command=["x"]).close()


def test_closing_twice_is_harmless_and_closes_no_file_of_others(tmp_path: Path) -> None:
    directory = RunDirectory.open(tmp_path, command=["x"])
    directory.close()
    with (tmp_path / "other").open("w") as other:
        directory.close()
        other.write("still open")


def test_no_file_descriptor_is_left_after_a_refusal(tmp_path: Path) -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    with RunDirectory.open(tmp_path, command=["x"]):
        before = len(list(Path("/proc/self/fd").iterdir()))
        for _ in range(20):
            with pytest.raises(RunLockedError):
                RunDirectory.open(tmp_path, command=["x"])
        assert len(list(Path("/proc/self/fd").iterdir())) <= before < soft


def test_a_console_script_is_called_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "warden"
    script.write_text(
        "from trainwarden.runs import RunDirectory\nprint(list(RunDirectory.open('run').manifest.command))\n"
    )
    answer = subprocess.run(
        [sys.executable, str(script), "train", "c.yaml"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "['warden', 'train', 'c.yaml']"


def test_kill_9_in_the_middle_of_a_write_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    code = """
        import itertools, sys
        from pathlib import Path
        from trainwarden.runs import RunManifest
        for n in itertools.count():
            RunManifest.new(["train", str(n), "x" * 50_000], {"n": n}).write(Path(sys.argv[1]))
            print(n, flush=True)
    """
    for _ in range(3):
        with python(code, tmp_path) as writer:
            while int(line_from(writer)) < 10:
                pass
            os.kill(writer.pid, signal.SIGKILL)
            writer.wait()
        manifest = RunManifest.read(tmp_path)
        assert manifest is not None
        assert manifest.config == {"n": int(manifest.command[1])}
        assert int(manifest.command[1]) >= 10
