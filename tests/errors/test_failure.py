"""What a person sees when something failed."""

from __future__ import annotations

import pytest

from trainwarden.errors import (
    GPUMemoryError,
    InvalidSettingError,
    TrainingAbortedError,
    TrainingError,
    failure_text,
    registry,
)


def test_the_block_ends_with_the_command_to_type() -> None:
    error = GPUMemoryError(
        phase="backward",
        micro_batch_size=1,
        shrinks=3,
        problem="CUDA out of memory",
        steps_completed=41,
        checkpoint_path="runs/demo/checkpoints/step-00000040",
        resume_command="warden resume runs/demo",
    )
    assert failure_text(error) == (
        "warden: memory ran out in backward at micro-batch size 1 after 3 shrinks: CUDA out of memory\n"
        "\n"
        f"  to do           {GPUMemoryError.suggestion}\n"
        "  code            RUNTIME_GPU_OOM (exit status 81)\n"
        "  last good step  41\n"
        "  checkpoint      runs/demo/checkpoints/step-00000040\n"
        "  explained by    warden explain RUNTIME_GPU_OOM\n"
        "  resume with     warden resume runs/demo"
    )


def test_what_is_unknown_has_no_line() -> None:
    text = failure_text(InvalidSettingError(setting="trainer.max_steps", value=-5, expected="at least 1"))
    assert "last good step" not in text
    assert "checkpoint" not in text
    assert text.endswith("warden explain CONFIG_INVALID_SETTING")


def test_no_completed_step_is_said_as_zero() -> None:
    assert "last good step  0\n" in failure_text(TrainingError(problem="x", steps_completed=0))


def test_the_nearest_cause_is_named_unless_the_message_says_it() -> None:
    error = TrainingError(problem="the loader stopped")
    error.__cause__ = OSError("No such device")
    assert "  caused by     OSError: No such device\n" in failure_text(error)
    error = TrainingError(problem="OSError: No such device")
    error.__cause__ = OSError("No such device")
    assert "caused by" not in failure_text(error)


def test_a_message_of_many_lines_stays_one_sentence() -> None:
    text = failure_text(TrainingError(problem="CUDA error:\n  an illegal\n\taccess"))
    assert text.splitlines()[0] == "warden: training failed: CUDA error: an illegal access"
    assert text.splitlines()[1] == ""


@pytest.mark.parametrize("condition", registry().values(), ids=registry())
def test_every_error_has_a_plain_aligned_block(condition: type[TrainingAbortedError]) -> None:
    head, blank, *rows = failure_text(condition(steps_completed=7, run_id="r")).splitlines()
    assert head.startswith("warden: ")
    assert blank == ""
    columns = {len(row) - len(row[2:].partition("  ")[2].lstrip()) for row in rows}
    assert len(columns) == 1
    assert f"warden explain {condition.code}" in rows[-1]
    assert "\x1b" not in head
