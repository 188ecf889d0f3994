"""Ask processes of our own that may print, hang or crash, and make verdicts of whatever becomes of them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from trainwarden.capability.verdict import Verdict, unknown, unsupported

MODULE = "trainwarden.capability.child"
_TAIL_CHARACTERS = 2000
_REAP_S = 2.0


@dataclass(frozen=True)
class Errand:
    """Tasks for one process, done in order, and what its environment has beside that of this process."""

    tasks: Sequence[str]
    environ: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """What came back from one errand: a verdict for each of its tasks, whatever happened to the process."""

    verdicts: Mapping[str, Verdict]
    printed: str = ""
    """The end of what it wrote to stdout and stderr."""


def run(errands: Sequence[Errand], *, deadline_s: float) -> list[Report]:
    """All errands at once, each in its own process, killed with its own children after ``deadline_s`` seconds.

    Never raises for what a process does. Where none can be started, every task is unknown.
    """
    if not errands:
        return []
    with ThreadPoolExecutor(len(errands), thread_name_prefix="trainwarden-errand") as threads:
        return list(threads.map(lambda errand: _run(errand, deadline_s), errands))


def _run(errand: Errand, deadline_s: float) -> Report:
    with tempfile.TemporaryDirectory(prefix="warden-probe-", ignore_cleanup_errors=True) as folder:
        answers = Path(folder, "answers")
        with Path(folder, "printed").open("w+b") as printed:
            if not sys.executable:
                return _nowhere(errand, "this program does not know its Python interpreter")
            try:
                process = _start(errand, answers, printed)
            except OSError as error:
                return _nowhere(errand, error.strerror or str(error))
            status = _wait(process, deadline_s)
            printed.seek(0)
            text = printed.read().decode(errors="replace")[-_TAIL_CHARACTERS:]
        return _judged(errand.tasks, _lines(answers), status, text, deadline_s)


def _nowhere(errand: Errand, why: str) -> Report:
    return Report({task: unknown(f"no process could be started to try it: {why}") for task in errand.tasks})


def _start(errand: Errand, answers: Path, printed: IO[bytes]) -> subprocess.Popen[bytes]:
    """The child finds its packages where this process does, also those of a changed ``sys.path``."""
    environ = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        **errand.environ,
        "PYTHONPATH": os.pathsep.join(place or str(Path.cwd()) for place in sys.path),
    }
    return subprocess.Popen(
        [sys.executable, "-P", "-m", MODULE, str(answers), *errand.tasks],
        stdin=subprocess.DEVNULL,
        # Not a pipe: a grandchild that outlives the child would hold it open.
        stdout=printed,
        stderr=subprocess.STDOUT,
        env=environ,
        start_new_session=True,  # its own group, so that what it started can be ended with it
    )


def _wait(process: subprocess.Popen[bytes], deadline_s: float) -> int | None:
    """Its exit status, or None when it had to be killed."""
    try:
        return process.wait(deadline_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if sys.platform == "win32":
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)
    # One that is blocked inside a driver cannot be killed: it is left behind rather than waited for.
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_REAP_S)


def _lines(answers: Path) -> list[dict[str, Any]]:
    found = []
    try:
        text = answers.read_text(encoding="utf-8")
    except OSError:
        return []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):  # the last one may be cut
            found.append(json.loads(line))
    return found


def _judged(
    tasks: Sequence[str], lines: Sequence[Mapping[str, Any]], status: int | None, printed: str, deadline_s: float
) -> Report:
    """The verdicts that were written, and for every other task one on how the process ended."""
    verdicts = {line["task"]: Verdict.from_dict(line["verdict"]) for line in lines if "verdict" in line}
    begun = [line["task"] for line in lines if line.get("began") and line["task"] not in verdicts]
    for task in tasks:
        if task in verdicts:
            continue
        if task not in begun:
            verdicts[task] = unknown(_why_not_begun(begun, status, printed, deadline_s))
        elif status is None:
            verdicts[task] = unknown(f"no answer within {deadline_s:g} s")
        else:
            verdicts[task] = unsupported(f"trying it ended the process with {_ending(status, printed)}")
    return Report(verdicts, printed)


def _why_not_begun(begun: Sequence[str], status: int | None, printed: str, deadline_s: float) -> str:
    if status is None:
        return f"not tried within {deadline_s:g} s"
    if begun:
        return f"not tried: the process ended before it, in {begun[0]}"
    return f"not tried: the process ended at once with {_ending(status, printed)}"


def _ending(status: int, printed: str) -> str:
    """``SIGABRT`` or ``exit status 3``, and the last line that it printed."""
    how = f"exit status {status}"
    if status < 0:
        try:
            how = signal.Signals(-status).name
        except ValueError:
            how = f"signal {-status}"
    last = next((line.strip() for line in reversed(printed.splitlines()) if line.strip()), "")
    return f"{how}: {last[:200]}" if last else how
