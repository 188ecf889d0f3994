"""``warden watch``: live on a real terminal, which is given back; printed once anywhere else; never an exception."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.report.test_progress import line, metrics
from tests.waiting import ended_when_hung
from trainwarden import device
from trainwarden.cli.main import main
from trainwarden.runs import Ledger, RunDirectory
from trainwarden.testing import FakeDevice, FakeSource

Captured = pytest.CaptureFixture[str]
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory.open(tmp_path / "demo", command=["python", "train.py"])
    Ledger().started(run_id=directory.run_id, path=directory.path, command=["python", "train.py"])
    (directory.path / "events.jsonl").write_bytes(line(metrics(10)))
    return directory


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    source = FakeSource(FakeDevice(0), FakeDevice(1, temperature_c=device.Unknown("timeout")))
    monkeypatch.setattr(device, "snapshot", lambda: real_snapshot(source))


real_snapshot = device.snapshot


def test_off_a_terminal_one_plain_view_is_printed(run: RunDirectory, two_gpus: None, capsys: Captured) -> None:
    assert main(["watch", run.run_id[:-2]]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    for words in ("60 °C", "GPU 1: unknown: temperature (timeout)", f"run {run.run_id}  running", "step 10/40"):
        assert words in out


def test_without_a_run_devices_and_running_runs_are_shown(run: RunDirectory, two_gpus: None, capsys: Captured) -> None:
    assert main(["watch", "--once"]) == 0
    out = capsys.readouterr().out
    assert "Fake GPU" in out
    assert f"{run.run_id}  step 10/40" in out


def test_as_json_it_is_one_document(run: RunDirectory, two_gpus: None, capsys: Captured) -> None:
    assert main(["watch", str(run.path), "--output-format", "json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [one["index"] for one in document["devices"]] == [0, 1]
    assert document["run"]["run_id"] == run.run_id
    assert main(["watch", "--output-format", "json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["run"] is None
    assert [one["run_id"] for one in document["running"]] == [run.run_id]


def test_an_unknown_run_is_an_error_that_names_the_known_ones(run: RunDirectory, capsys: Captured) -> None:
    assert main(["watch", "nope"]) == 66
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "INPUT_RUN_NOT_FOUND" in captured.err


def test_without_a_driver_there_is_a_reason(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = FakeSource(reason="no NVIDIA driver here")
    monkeypatch.setattr(device, "snapshot", lambda: real_snapshot(nothing))
    assert main(["watch"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "no GPU: no NVIDIA driver here"


def test_a_driver_that_hangs_is_silence_not_a_hang(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    stuck = FakeDevice().hang()
    monkeypatch.setattr(device, "snapshot", lambda: real_snapshot(FakeSource(stuck), deadline_s=0.05))
    try:
        assert main(["watch"]) == 0
    finally:
        stuck.resume()
    assert capsys.readouterr().out.startswith("GPUs: unknown, no reading for ")


def test_its_help_and_the_list_of_commands_name_it(capsys: Captured) -> None:
    assert main(["--help"]) == 0
    assert "watch" in capsys.readouterr().out
    assert main(["watch", "--help"]) == 0
    assert "--once" in capsys.readouterr().out


ON_ITS_OWN_TERMINAL = """
import fcntl, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell inherits it ignored
from trainwarden.cli.main import main
sys.exit(main())
"""


class Screen:
    """A real terminal with ``warden`` on it, in a session of its own so that Ctrl-C reaches it."""

    def __init__(self, arguments: list[str], **environ: str) -> None:
        self._master, slave = pty.openpty()
        self.attributes = termios.tcgetattr(self._master)
        termios.tcsetwinsize(self._master, (40, 120))
        self.process = subprocess.Popen(
            [sys.executable, "-c", ON_ITS_OWN_TERMINAL, *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            env={**_environment(), "TERM": "xterm", "PYTHONIOENCODING": "utf-8", **environ},
        )
        os.close(slave)
        self.seen = ""
        self._raw = b""

    def until(self, words: str) -> None:
        """Read on until these words were drawn; fails with what was drawn when the process ends before."""
        with ended_when_hung(self.process.kill):
            while words not in ESCAPE.sub("", self.seen):
                assert self._read(), ESCAPE.sub("", self.seen)

    def press(self, key: bytes) -> None:
        os.write(self._master, key)

    def end(self) -> int:
        """Read on until the process has ended; its exit status."""
        with ended_when_hung(self.process.kill):
            while self._read():
                pass
            return self.process.wait()

    def restored(self) -> bool:
        """Whether the normal screen, the cursor and the terminal's modes are as they were."""
        normal = self.seen.rfind("\x1b[?1049l") > self.seen.rfind("\x1b[?1049h")
        cursor = self.seen.rfind("\x1b[?25h") > self.seen.rfind("\x1b[?25l")
        return normal and cursor and termios.tcgetattr(self._master) == self.attributes

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)

    def _read(self) -> bool:
        try:
            chunk = os.read(self._master, 65536)
        except OSError:  # how Linux reports that the other end was closed
            return False
        self._raw += chunk
        self.seen = self._raw.decode(errors="replace")
        return bool(chunk)


def _environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES")}


@contextmanager
def screen(arguments: list[str], **environ: str) -> Iterator[Screen]:
    shown = Screen(arguments, **environ)
    try:
        yield shown
    finally:
        shown.close()


@pytest.mark.parametrize(
    "end",
    [
        pytest.param(lambda shown: shown.press(b"\x03"), id="Ctrl-C"),
        pytest.param(lambda shown: shown.process.send_signal(signal.SIGTERM), id="SIGTERM"),
    ],
)
def test_a_live_view_that_is_ended_gives_the_terminal_back(run: RunDirectory, end: Callable[[Any], None]) -> None:
    with screen(["watch", run.run_id]) as shown:
        shown.until("Ctrl-C ends this view")
        end(shown)
        assert shown.end() == 0
        assert shown.restored()
    left = ESCAPE.sub("", shown.seen.rpartition("\x1b[?1049l")[2])
    assert f"run {run.run_id}  running" in left
    assert "Traceback" not in shown.seen


def test_a_live_view_follows_the_run_and_ends_with_it(run: RunDirectory) -> None:
    with screen(["watch", run.run_id]) as shown:
        shown.until("step 10/40")
        with (run.path / "events.jsonl").open("ab") as log:
            log.write(line(metrics(20)))
        shown.until("step 20/40")
        Ledger().finished(run.run_id, status="finished", steps_completed=40)
        assert shown.end() == 0
        assert shown.restored()
    assert "step 40/40" in shown.seen.rpartition("\x1b[?1049l")[2]


def test_once_on_a_terminal_draws_nothing_live() -> None:
    with screen(["watch", "--once"]) as shown:
        assert shown.end() == 0
    assert "\x1b[?1049h" not in shown.seen
    assert "no run is running" in shown.seen


def test_a_terminal_that_cannot_move_its_cursor_gets_one_view() -> None:
    with screen(["watch"], TERM="dumb") as shown:
        assert shown.end() == 0
    assert "\x1b" not in shown.seen
