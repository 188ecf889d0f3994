"""Real processes for the tests of what several of them do to one file."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager

from tests.waiting import ended_when_hung


@contextmanager
def python(code: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A child running ``code``; it is killed at the end of the block at the latest."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def line_from(process: subprocess.Popen[str]) -> str:
    """The next line the child prints; fails with what it said on stderr when it dies instead."""
    assert process.stdout is not None
    assert process.stderr is not None
    with ended_when_hung(process.kill):
        line = process.stdout.readline().strip()
        assert line, process.stderr.read()
    return line
