"""Scripts in processes of their own that need not import torch first.

An `Interpreter` is one Python that has imported it; each script runs in a fork of it, as `warm_server` describes. All
that these tests look at is that of a fresh interpreter: exit status, death by a signal, hooks and exit handlers,
signal handlers, session, streams, environment and working directory. `cold` starts a real fresh one: each file has a
test that does.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, NamedTuple

from tests.waiting import LIMIT_S, ended_when_hung

ROOT = Path(__file__).resolve().parents[2]


class Ending(NamedTuple):
    status: int
    """The exit status, or minus the signal that ended it."""
    out: str
    err: str


class Script:
    """A script that runs, in a session of its own, with pipes to its standard streams."""

    def __init__(self, pid: int, streams: tuple[IO[str], IO[str], IO[str]], ended: Callable[[], int]) -> None:
        self.pid = pid
        self.stdin, self.stdout, self.stderr = streams
        self._ended = ended
        self._status: int | None = None

    def finish(self, text: str = "") -> Ending:
        """Say ``text`` to it, read what it still says, and wait for its end."""
        said: list[str] = []
        reader = threading.Thread(target=lambda: said.append(self.stderr.read()))
        with ended_when_hung(self.kill):
            reader.start()
            with suppress(BrokenPipeError):
                self.stdin.write(text)
                self.stdin.close()
            out = self.stdout.read()
            reader.join()
            return Ending(self.wait(), out, said[0])

    def wait(self) -> int:
        if self._status is None:
            with ended_when_hung(self.kill):
                self._status = self._ended()
        return self._status

    def kill(self, number: int = signal.SIGKILL) -> None:
        """To the whole session, as a terminal and a scheduler do it: the children get it too."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def close(self) -> None:
        if self._status is None:
            self.kill()
            self.wait()
        for stream in (self.stdin, self.stdout, self.stderr):
            with suppress(BrokenPipeError):
                stream.close()


Start = Callable[..., Script]
"""``python script arguments`` with this process's environment and working directory."""


@contextmanager
def started(start: Start, script: Path, *arguments: object) -> Iterator[Script]:
    """The running script; at the end of the block it is killed at the latest."""
    running = start(script, *arguments)
    try:
        yield running
    finally:
        running.close()


def run(start: Start, script: Path, *arguments: object) -> Ending:
    with started(start, script, *arguments) as running:
        return running.finish()


def cold(script: Path, *arguments: object) -> Script:
    """In a fresh interpreter."""
    process = subprocess.Popen(
        [sys.executable, str(script), *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    return Script(process.pid, (process.stdin, process.stdout, process.stderr), process.wait)


class Interpreter:
    """One Python with torch and trainwarden; it runs one script at a time."""

    def __init__(self) -> None:
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, str(ROOT / "tests/faults/warm_server.py"), str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                start_new_session=True,  # Ctrl-C in the tests is no business of its
            )
        assert self._channel.recv(64) == b"ready"

    def start(self, script: Path, *arguments: object) -> Script:
        """In a fork of this interpreter."""
        request = {
            "script": str(script),
            "arguments": [str(argument) for argument in arguments],
            "environ": dict(os.environ),
            "cwd": str(Path.cwd()),
        }
        (read_in, write_in), (read_out, write_out), (read_err, write_err) = os.pipe(), os.pipe(), os.pipe()
        theirs = [read_in, write_out, write_err]
        try:
            socket.send_fds(self._channel, [json.dumps(request).encode()], theirs)
        finally:
            for descriptor in theirs:
                os.close(descriptor)
        streams = os.fdopen(write_in, "w"), os.fdopen(read_out), os.fdopen(read_err)
        return Script(int(self._channel.recv(64)), streams, lambda: int(self._channel.recv(64)))

    def close(self) -> None:
        self._channel.close()
        self._process.wait(LIMIT_S)
