"""SIGINT and SIGTERM to a real script: the step is finished, a checkpoint written, and the exit status says so."""

from __future__ import annotations

import os
import signal
import textwrap
import threading
from pathlib import Path

import pytest
import torch

from tests.runtime.loops import Loop
from tests.waiting import LIMIT_S
from trainwarden.checkpoint import CheckpointStore
from trainwarden.events import Notice

from .warm import Interpreter, Script, Start, run, started

SCRIPT = textwrap.dedent(
    """
    import sys, time, torch
    from torch import nn
    from torch.utils.data import DataLoader
    from trainwarden import Guard
    torch.set_num_threads(1)
    torch.manual_seed(0)
    workers, hold = int(sys.argv[2]), sys.argv[3]
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loader = DataLoader(list(torch.randn(64, 4)), batch_size=4, shuffle=True, num_workers=workers)
    guard = Guard(sys.argv[1])
    with guard.watch(model=model, optimizer=optimizer):
        for batch in guard.batches(loader, max_steps=30):
            guard.backward(lambda b: model(b).square().mean(), batch)
            print("step", guard.steps_completed + 1, flush=True)
            if hold == "hold" and guard.steps_completed + 1 == 5:
                sys.stdin.readline()           # the step lasts until the test has sent its signal
            optimizer.step()
            optimizer.zero_grad()
    print("weights", sum(p.double().sum().item() for p in model.parameters()), flush=True)
    """
)


class Training:
    """The script above, running."""

    def __init__(self, running: Script) -> None:
        self.running = running

    def wait_for(self, line: str) -> None:
        while (read := self.running.stdout.readline()) and read.strip() != line:
            pass
        assert read, f"the script ended before {line!r}: {self.running.finish().err}"

    def wait_for_stderr(self, text: str) -> str:
        """Reads until the script has taken notice of the signal."""
        seen = ""
        while text not in seen and (line := self.running.stderr.readline()):
            seen += line
        assert text in seen, seen
        return seen


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    return path


@pytest.mark.parametrize(
    ("number", "workers", "start"),
    [
        (signal.SIGINT, 0, "warm"),
        (signal.SIGINT, 2, "warm"),
        (signal.SIGTERM, 0, "cold"),
        (signal.SIGTERM, 2, "warm"),
    ],
    indirect=["start"],
)
def test_a_stop_signal_finishes_the_step_saves_and_exits_75(
    path: Path, tmp_path: Path, start: Start, interpreter: Interpreter, number: signal.Signals, workers: int
) -> None:
    """The signal goes to the whole process group, as a terminal and a scheduler send it: data workers get it too."""
    run_dir = tmp_path / "run"
    with started(start, path, run_dir, workers, "hold") as running:
        training = Training(running)
        training.wait_for("step 5")
        running.kill(number)
        training.wait_for_stderr(f"{number.name}: finishing the step")
        status, out, err = running.finish("\n")

    assert status == 75, err
    assert "step 6" not in out
    assert "RUNTIME_TRAINING_ABORTED" in err
    assert "Traceback" not in err, "a clean stop is no accident"
    assert f"{path} {run_dir} {workers} hold" in err.splitlines()[-1], "the resume command is the user's own"
    checkpoint = CheckpointStore(run_dir / "checkpoints").load_newest(on_rejected=lambda *_: None)
    assert checkpoint is not None
    assert checkpoint.step == 5

    resumed = run(interpreter.start, path, run_dir, workers, "run")
    whole = run(interpreter.start, path, tmp_path / "whole", workers, "run")
    assert resumed.status == whole.status == 0, resumed.err
    assert "continues after step 5" in resumed.err
    assert resumed.out.splitlines()[-1] == whole.out.splitlines()[-1]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_second_signal_stops_at_once(
    path: Path, tmp_path: Path, start: Start, number: signal.Signals, status: int
) -> None:
    with started(start, path, tmp_path / "run", 0, "hold") as running:
        training = Training(running)
        training.wait_for("step 5")
        running.kill(number)
        training.wait_for_stderr("once more stops at once")
        running.kill(number)
        code = running.wait()  # nobody has let the step go on
        assert code == status, "the shell sees 130 or 143"
        assert "weights" not in running.finish().out


def test_off_the_main_thread_signals_are_left_alone_and_that_is_said(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    loop = Loop(tmp_path, max_steps=2)
    inside: list[object] = []
    loop.after_step = lambda guard: inside.append((signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)))
    thread = threading.Thread(target=loop.run)
    thread.start()
    thread.join(LIMIT_S)
    assert not thread.is_alive()
    assert loop.guard.steps_completed == 2
    assert inside == [before, before]
    assert any("not on the main thread" in e.text for e in loop.named(Notice))


def test_handlers_are_put_back_after_the_watch(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    Loop(tmp_path, max_steps=1).run()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_signal_that_the_parent_ignores_stays_ignored(tmp_path: Path) -> None:
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        loop = Loop(tmp_path, max_steps=4)
        loop.after_step = lambda guard: os.kill(os.getpid(), signal.SIGINT)
        assert loop.run().guard.steps_completed == 4
    finally:
        signal.signal(signal.SIGINT, previous)


def test_a_stop_request_in_the_last_step_lets_the_run_finish(tmp_path: Path) -> None:
    loop = Loop(tmp_path, max_steps=3)
    loop.after_step = lambda guard: os.kill(os.getpid(), signal.SIGTERM) if guard.steps_completed == 2 else None
    loop.run()
    assert loop.guard.steps_completed == 3
    assert torch.isfinite(loop.weights()).all()
