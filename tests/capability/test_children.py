"""Processes that raise, abort, hang, exit or chatter: each becomes a verdict, and none reaches the parent."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.waiting import LIMIT_S, until
from trainwarden.capability import Status, children
from trainwarden.capability.children import Errand, run

TASK = "import_torchao"


@pytest.fixture
def torchao(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory in front of the import path, for a torchao of the test's own."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "torchao").mkdir()
    (tmp_path / "torchao" / "float8.py").write_text("")
    return tmp_path / "torchao" / "__init__.py"


def tried(source: str, path: Path, *, deadline_s: float = LIMIT_S) -> tuple[Status, str]:
    path.write_text(textwrap.dedent(source))
    [report] = run([Errand([TASK])], deadline_s=deadline_s)
    verdict = report.verdicts[TASK]
    return verdict.status, verdict.reason


def test_a_package_that_imports_is_supported_with_its_version(torchao: Path) -> None:
    assert tried("__version__ = '0.18.0'", torchao) == (Status.SUPPORTED, "torchao 0.18.0 imports")


def test_a_package_whose_import_raises_is_unsupported_with_what_it_raised(torchao: Path) -> None:
    status, reason = tried("raise ImportError(\"cannot import name 'ScalingType'\\nsecond line\")", torchao)
    assert status is Status.UNSUPPORTED
    assert reason == "trying it failed: ImportError: cannot import name 'ScalingType'"


def test_a_package_whose_import_aborts_the_process_is_unsupported_with_the_signal(torchao: Path) -> None:
    source = "import os, sys; print('undefined symbol: _ZN3c10', file=sys.stderr, flush=True); os.abort()"
    status, reason = tried(source, torchao)
    assert status is Status.UNSUPPORTED
    assert reason == "trying it ended the process with SIGABRT: undefined symbol: _ZN3c10"


def test_a_package_that_exits_the_process_is_unsupported_with_the_status(torchao: Path) -> None:
    assert tried("import os; os._exit(7)", torchao)[1] == "trying it ended the process with exit status 7"
    assert tried("raise SystemExit(0)", torchao)[1] == "trying it ended the process with exit status 0"


def test_a_package_that_hangs_is_unknown_at_the_deadline(torchao: Path) -> None:
    status, reason = tried("import time; time.sleep(3600)", torchao, deadline_s=0.2)
    assert status is Status.UNKNOWN
    assert "within 0.2 s" in reason  # "no answer", or "not tried" where the process had not yet come so far


def deadline_once(happened: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the deadline pass when ``happened``, however long a busy machine takes until then."""
    wait = children._wait

    def wait_until_then(process: subprocess.Popen[bytes], deadline_s: float) -> int | None:
        until(happened)
        return wait(process, 0.0)

    monkeypatch.setattr(children, "_wait", wait_until_then)


def test_a_package_that_hangs_while_it_is_tried_gave_no_answer(
    torchao: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = tmp_path / "begun"
    deadline_once(begun.exists, monkeypatch)
    source = f"import pathlib, time; pathlib.Path({str(begun)!r}).touch(); time.sleep(3600)"
    assert tried(source, torchao, deadline_s=3) == (Status.UNKNOWN, "no answer within 3 s")


def test_what_a_hanging_package_has_started_is_ended_with_it(
    torchao: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    note = tmp_path / "pid"
    deadline_once(lambda: note.exists() and note.read_text().endswith("\n"), monkeypatch)
    source = f"""
        import pathlib, subprocess, sys, time
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
        pathlib.Path({str(note)!r}).write_text(f"{{child.pid}}\\n")
        time.sleep(3600)
    """
    assert tried(source, torchao)[0] is Status.UNKNOWN
    with pytest.raises(psutil.NoSuchProcess):
        _wait_for_end(psutil.Process(int(note.read_text())))


def _wait_for_end(process: psutil.Process) -> None:
    if process.status() == psutil.STATUS_ZOMBIE:  # dead; its new parent has not collected it yet
        raise psutil.NoSuchProcess(process.pid)
    process.wait(LIMIT_S)
    raise psutil.NoSuchProcess(process.pid)


def test_chatter_on_stdout_is_no_answer_and_does_not_spoil_one(
    torchao: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = 'print(\'{"task": "import_torchao", "verdict": null}\' * 20000)'
    assert tried(source, torchao)[0] is Status.SUPPORTED
    assert capfd.readouterr() == ("", "")


def test_the_end_of_what_was_printed_is_kept(torchao: Path) -> None:
    torchao.write_text("print('Skipping import of cpp extensions due to incompatible torch version')")
    [report] = run([Errand([TASK])], deadline_s=LIMIT_S)
    assert "Skipping import of cpp extensions" in report.printed


def test_a_task_after_the_fatal_one_is_unknown_and_names_it(torchao: Path) -> None:
    torchao.write_text("import os; os.abort()")
    [report] = run([Errand([TASK, "mlx"])], deadline_s=LIMIT_S)
    assert report.verdicts[TASK].status is Status.UNSUPPORTED
    assert report.verdicts["mlx"].status is Status.UNKNOWN
    assert report.verdicts["mlx"].reason == f"not tried: the process ended before it, in {TASK}"


def test_a_process_that_cannot_even_begin_leaves_every_task_unknown() -> None:
    [report] = run([Errand([TASK], {"PYTHONHASHSEED": "no number"})], deadline_s=LIMIT_S)
    assert report.verdicts[TASK].status is Status.UNKNOWN
    assert report.verdicts[TASK].reason.startswith("not tried: the process ended at once with exit status 1")


def test_without_an_interpreter_everything_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    for executable, said in [("", "does not know its Python interpreter"), ("/nowhere/python", "No such file")]:
        monkeypatch.setattr(sys, "executable", executable)
        [report] = run([Errand([TASK])], deadline_s=LIMIT_S)
        assert report.verdicts[TASK].status is Status.UNKNOWN
        assert said in report.verdicts[TASK].reason


def test_errands_run_at_the_same_time_and_answer_in_their_order(torchao: Path, tmp_path: Path) -> None:
    # Each waits for the other: one after the other they would never end.
    torchao.write_text(
        textwrap.dedent(f"""
            import os, pathlib, time
            here, other = os.environ["HERE"], os.environ["OTHER"]
            pathlib.Path({str(tmp_path)!r}, here).touch()
            while not pathlib.Path({str(tmp_path)!r}, other).exists():
                time.sleep(0.01)
            __version__ = here
        """)
    )
    names = [("a", "b"), ("b", "a")]
    reports = run([Errand([TASK], {"HERE": here, "OTHER": other}) for here, other in names], deadline_s=LIMIT_S)
    assert [report.verdicts[TASK].evidence["version"] for report in reports] == ["a", "b"]


def test_no_errand_starts_no_process() -> None:
    assert run([], deadline_s=LIMIT_S) == []


def test_the_environment_of_this_process_is_left_alone(torchao: Path) -> None:
    before = dict(os.environ)
    torchao.write_text("")
    run([Errand([TASK], {"HERE": "child"})], deadline_s=LIMIT_S)
    assert dict(os.environ) == before
