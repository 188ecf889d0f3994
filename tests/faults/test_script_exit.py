"""A raw script that dies of a typed error exits with its status and tells a person what to do next."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import pytest

from .warm import Start, run

HEAD = textwrap.dedent(
    """
    import sys, torch
    from torch import nn
    from trainwarden import Guard
    from trainwarden.testing import MemoryCeiling, NonFinite
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = Guard(sys.argv[1], checkpoint_every_steps=2)
    def compute_loss(batch):
        return model(batch).square().mean()
    def train(loss):
        with guard.watch(model=model, optimizer=optimizer):
            for batch in guard.batches([torch.ones(4, 4)], max_steps=9):
                guard.backward(loss, batch)
                optimizer.step()
                optimizer.zero_grad()
    """
)


def script(tmp_path: Path, body: str) -> Path:
    path = tmp_path / "train.py"
    path.write_text(HEAD + textwrap.dedent(body))
    return path


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (
            "train(MemoryCeiling(0, from_step=4, steps_completed=lambda: guard.steps_completed)(compute_loss))",
            81,
            "RUNTIME_GPU_OOM",
        ),
        (
            "train(NonFinite(range(4, 99), steps_completed=lambda: guard.steps_completed)(compute_loss))",
            80,
            "RUNTIME_NAN_LOSS",
        ),
        ("train(compute_loss); model = nn.Linear(4, 2); train(compute_loss)", 78, "CONFIG_RESUME_MISMATCH"),
    ],
)
def test_the_exit_status_is_the_errors(tmp_path: Path, start: Start, body: str, status: int, code: str) -> None:
    done = run(start, script(tmp_path, body), tmp_path / "run")
    assert done.status == status, done.err
    assert code in done.err
    assert f"warden explain {code}" in done.err


def test_the_last_lines_name_the_last_good_step_and_the_command_that_resumes(tmp_path: Path, start: Start) -> None:
    path = script(
        tmp_path,
        "train(MemoryCeiling(0, from_step=4, steps_completed=lambda: guard.steps_completed)(compute_loss))",
    )
    done = run(start, path, tmp_path / "run")
    block = done.err[done.err.rindex("RUNTIME_GPU_OOM") - 400 :]
    assert "3" in block
    assert "step-00000002" in block
    assert f"{sys.executable} {path} {tmp_path / 'run'}" in block
    assert "Traceback" in done.err, "where it happened is not hidden"


def test_other_exceptions_exit_as_ever(tmp_path: Path, start: Start) -> None:
    done = run(start, script(tmp_path, "train(lambda batch: 1 / 0)"), tmp_path / "run")
    assert done.status == 1
    assert "ZeroDivisionError" in done.err
    assert "warden explain" not in done.err


@pytest.mark.parametrize("start", ["warm", "cold"], indirect=True)
def test_what_was_registered_for_exit_still_runs(tmp_path: Path, start: Start) -> None:
    path = script(
        tmp_path,
        """
        import atexit
        atexit.register(lambda: print("goodbye", flush=True))
        train(MemoryCeiling(0)(compute_loss))
        """,
    )
    done = run(start, path, tmp_path / "run")
    assert done.status == 81
    assert "goodbye" in done.out
    assert "Traceback" in done.err
    assert f"{sys.executable} {path} {tmp_path / 'run'}" in done.err.splitlines()[-1]
