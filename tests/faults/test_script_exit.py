"""A raw script that dies of a typed error exits with its status and tells a person what to do next."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

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


def run(tmp_path: Path, body: str) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "train.py"
    script.write_text(HEAD + textwrap.dedent(body))
    command = [sys.executable, str(script), str(tmp_path / "run")]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


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
def test_the_exit_status_is_the_errors(tmp_path: Path, body: str, status: int, code: str) -> None:
    done = run(tmp_path, body)
    assert done.returncode == status, done.stderr
    assert code in done.stderr
    assert f"warden explain {code}" in done.stderr


def test_the_last_lines_name_the_last_good_step_and_the_command_that_resumes(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        "train(MemoryCeiling(0, from_step=4, steps_completed=lambda: guard.steps_completed)(compute_loss))",
    )
    block = done.stderr[done.stderr.rindex("RUNTIME_GPU_OOM") - 400 :]
    assert "3" in block
    assert "step-00000002" in block
    assert "train.py" in block
    assert "Traceback" in done.stderr, "where it happened is not hidden"


def test_other_exceptions_exit_as_ever(tmp_path: Path) -> None:
    done = run(tmp_path, "train(lambda batch: 1 / 0)")
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr
    assert "warden explain" not in done.stderr


def test_what_was_registered_for_exit_still_runs(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        """
        import atexit
        atexit.register(lambda: print("goodbye", flush=True))
        train(MemoryCeiling(0)(compute_loss))
        """,
    )
    assert done.returncode == 81
    assert "goodbye" in done.stdout
