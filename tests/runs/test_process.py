"""A process is known by more than its number."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path

import pytest

from tests.runs.processes import line_from, python
from trainwarden.runs import ProcessIdentity
from trainwarden.runs import process as module

INTRODUCE = """
    import json, sys
    from dataclasses import asdict
    from trainwarden.runs import ProcessIdentity
    print(json.dumps(asdict(ProcessIdentity.current())), flush=True)
    sys.stdin.read()
"""


def test_this_process_is_alive() -> None:
    me = ProcessIdentity.current()
    assert me.pid == os.getpid()
    assert me.is_alive() is True


def test_a_recycled_pid_is_another_process() -> None:
    earlier = dataclasses.replace(ProcessIdentity.current(), start="some-boot:1")
    assert earlier.is_alive() is False


def test_a_process_on_another_machine_is_unknown() -> None:
    elsewhere = dataclasses.replace(ProcessIdentity.current(), host="another-machine")
    assert elsewhere.is_alive() is None


def test_a_killed_process_is_dead_even_before_its_parent_has_looked() -> None:
    import json

    with python(INTRODUCE) as child:
        identity = ProcessIdentity(**json.loads(line_from(child)))
        assert identity.pid == child.pid
        assert identity.is_alive() is True
        os.kill(child.pid, signal.SIGKILL)
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, and left as a zombie
        assert identity.is_alive() is False
        child.wait()
        assert identity.is_alive() is False


def test_a_command_name_with_parentheses_and_spaces_is_no_obstacle(tmp_path: Path) -> None:
    """The kernel prints the name into the middle of the line that is parsed."""
    code = INTRODUCE.replace("print(", "open('/proc/self/comm', 'w').write(') S 1 (x'); print(")
    import json

    with python(code) as child:
        identity = ProcessIdentity(**json.loads(line_from(child)))
        assert identity.start.split(":")[1].isdigit()
        assert identity.is_alive() is True


def test_without_proc_the_creation_time_tells_processes_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "Path", lambda _: Path("/nonexistent"))
    me = ProcessIdentity.current()
    assert float(me.start) > 1e9
    assert me.is_alive() is True
    assert dataclasses.replace(me, start="1.00").is_alive() is False
    assert dataclasses.replace(me, pid=2**22 + 1).is_alive() is False
