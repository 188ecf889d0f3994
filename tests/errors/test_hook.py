"""A raw script that dies of one of our errors exits with its status: tried in real interpreters."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator

import pytest

from tests.waiting import LIMIT_S
from trainwarden.errors import install_excepthook, registry

GUARDED = "import sys\nfrom trainwarden.errors import *\nfrom trainwarden.errors import hook\n"
INSTALLED = GUARDED + "assert install_excepthook()\n"
OOM = "raise GPUMemoryError(phase='backward', micro_batch_size=1, resume_command='warden resume r')"
STOP = "raise TrainingAbortedError(reason='SIGINT', steps_completed=5, resume_command='go on')"


def run(script: str, *flags: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *flags, "-c", textwrap.dedent(script)]
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, input=stdin, check=False)


@pytest.fixture
def restored_hook() -> Iterator[None]:
    before = sys.excepthook
    yield
    sys.excepthook = before


def test_an_uncaught_error_prints_traceback_and_block_and_exits_with_its_status() -> None:
    result = run(INSTALLED + "import atexit\natexit.register(print, 'handler ran')\nprint('buffered', end='')\n" + OOM)
    assert result.returncode == 81
    traceback, _, block = result.stderr.partition("\nwarden: ")
    assert traceback.startswith("Traceback (most recent call last)")
    assert "[RUNTIME_GPU_OOM]" in traceback
    assert block.startswith("memory ran out in backward at micro-batch size 1\n")
    assert block.endswith("resume with   warden resume r\n")
    assert result.stdout == "bufferedhandler ran\n"  # flushed, and exit handlers ran


def test_a_clean_stop_needs_no_traceback() -> None:
    result = run(INSTALLED + STOP)
    assert result.returncode == 75
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("\nwarden: training stopped cleanly on SIGINT\n")
    assert result.stderr.endswith("go on\n")


def test_without_the_hook_the_status_would_be_1() -> None:
    assert run(GUARDED + OOM).returncode == 1


@pytest.mark.parametrize(
    ("script", "status"), [("1 / 0", 1), ("raise SystemExit(3)", 3), ("raise KeyboardInterrupt", -2)]
)
def test_what_is_not_ours_is_left_alone(script: str, status: int) -> None:
    with_hook, without = run(INSTALLED + script), run(GUARDED + "\n" + script)
    assert (with_hook.returncode, with_hook.stderr) == (without.returncode, without.stderr)
    assert with_hook.returncode == status


def test_the_hook_that_was_there_before_is_called_once() -> None:
    script = "sys.excepthook = lambda kind, error, trace: print('earlier hook:', error.code)\n"
    result = run(GUARDED + script + "install_excepthook()\ninstall_excepthook()\n" + OOM)
    assert (result.stdout, result.returncode) == ("earlier hook: RUNTIME_GPU_OOM\n", 81)
    assert result.stderr.count("warden: ") == 1


def test_installing_again_above_a_foreign_hook_speaks_once() -> None:
    script = """
    install_excepthook()
    ours = sys.excepthook
    def theirs(kind, error, trace):
        ours(kind, error, trace)
        print("theirs goes on")
    sys.excepthook = theirs
    install_excepthook()
    """
    result = run(GUARDED + textwrap.dedent(script) + OOM)
    assert (result.stdout, result.returncode) == ("theirs goes on\n", 81)
    assert result.stderr.count("Traceback") == 1
    assert result.stderr.count("warden: ") == 1


def test_a_foreign_hook_that_fails_does_not_hide_the_error() -> None:
    result = run(GUARDED + "sys.excepthook = lambda *_: 1 / 0\ninstall_excepthook()\n" + OOM)
    assert result.returncode == 81
    assert "GPUMemoryError: [RUNTIME_GPU_OOM]" in result.stderr
    assert "warden explain RUNTIME_GPU_OOM" in result.stderr


def test_a_foreign_hook_that_exits_does_not_change_the_status() -> None:
    result = run(GUARDED + "sys.excepthook = lambda *_: sys.exit(1)\ninstall_excepthook()\n" + OOM)
    assert result.returncode == 81
    assert "warden explain RUNTIME_GPU_OOM" in result.stderr


def test_a_block_that_cannot_be_made_does_not_hide_the_error() -> None:
    result = run(INSTALLED + "hook.failure_text = lambda error: 1 / 0\n" + OOM)
    assert result.returncode == 81
    assert "GPUMemoryError: [RUNTIME_GPU_OOM]" in result.stderr
    assert result.stderr.endswith("warden: [RUNTIME_GPU_OOM] warden explain RUNTIME_GPU_OOM\n")


@pytest.mark.parametrize("stderr", ["sys.stderr = None", "sys.stderr.close()"])
def test_the_status_tells_even_when_stderr_is_gone(stderr: str) -> None:
    assert run(INSTALLED + stderr + "\n" + OOM).returncode == 81


def test_an_interactive_session_goes_on() -> None:
    result = run("", "-i", stdin=INSTALLED + OOM + "\nprint('still here')\n")
    assert "still here" in result.stdout
    assert "warden explain RUNTIME_GPU_OOM" in result.stderr


@pytest.mark.usefixtures("restored_hook")
def test_installing_is_idempotent() -> None:
    assert install_excepthook()
    installed = sys.excepthook
    assert install_excepthook()
    assert sys.excepthook is installed


@pytest.mark.usefixtures("restored_hook")
def test_off_the_main_thread_nothing_is_done() -> None:
    before = sys.excepthook
    answers: list[bool] = []
    thread = threading.Thread(target=lambda: answers.append(install_excepthook()))
    thread.start()
    thread.join()
    assert answers == [False]
    assert sys.excepthook is before


def test_every_status_leaves_the_process_unchanged() -> None:
    # One interpreter for all: what a hook raises is what the process would exit with.
    script = """
    install_excepthook()
    for condition in registry().values():
        try:
            sys.excepthook(condition, condition(problem="x"), None)
        except SystemExit as ending:
            print(condition.code, ending.code)
    """
    result = run(GUARDED + textwrap.dedent(script))
    statuses = dict(line.split() for line in result.stdout.splitlines())
    assert statuses == {code: str(condition.exit_code) for code, condition in registry().items()}
