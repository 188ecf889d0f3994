"""Out of memory, NaN, a crash, a signal: the training ends as if nothing had been, or in a typed error that resumes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.tiny import (
    GPT2,
    LLAMA,
    checkpoint_parts,
    distance,
    identical,
    instructions,
    model_weights,
    settings,
    write_jsonl,
)
from trainwarden.errors import (
    CheckpointNotFoundError,
    GPUMemoryError,
    InvalidSettingError,
    NaNLossError,
    ResumeMismatchError,
    RunExistsError,
    TrainingAbortedError,
    TrainingError,
)
from trainwarden.events import EvaluationShrunk, Event, MemoryRemedyApplied, MetricsLogged, Resumed, StepSkipped
from trainwarden.testing import MemoryCeiling, NonFinite, out_of_memory_error
from trainwarden.train import Trainer

ROWS = instructions(24)
DROPOUT = {**GPT2, "resid_pdrop": 0.2}
RESUMABLE = {"max_steps": 9, "checkpoint_every_steps": 2, "max_length": 48}


class Faulty(Trainer):
    """A trainer with something wrong around its loss; ``fault(steps completed)`` runs before each forward."""

    wrap: Callable[[Any], Any] = staticmethod(lambda compute_loss: compute_loss)
    before: Callable[[int], None] = staticmethod(lambda step: None)
    steps = 0

    def compute_loss(self, model: Any, batch: Any) -> Any:
        type(self).before(self.steps)
        return self.wrapped(model)(batch)

    def wrapped(self, model: Any) -> Any:
        return type(self).wrap(lambda batch: super(Faulty, self).compute_loss(model, batch))

    def count(self, event: Event) -> None:
        self.steps = event.step


def faulty(model: Any, run_dir: Path, *, rows: Any = ROWS, wrap: Any = None, before: Any = None, **changes: Any) -> Any:
    kind = type("Faulty", (Faulty,), {})
    if wrap is not None:
        kind.wrap = staticmethod(wrap)
    if before is not None:
        kind.before = staticmethod(before)
    observers = list(changes.pop("observers", ()))
    trainer: Any = kind(model, rows, output_dir=run_dir, **settings(**changes, observers=observers))
    observers.append(trainer.count)
    return trainer


def train(model: Any, run_dir: Path, rows: Any = ROWS, **changes: Any) -> Any:
    return Trainer(model, rows, output_dir=run_dir, **settings(**changes)).train()


def crash_at(step: int) -> Callable[[int], None]:
    def before(steps_completed: int) -> None:
        if steps_completed + 1 == step:
            raise LookupError("boom")

    return before


# -- out of memory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_a_batch_that_fits_no_longer_is_trained_in_parts_with_the_same_result(
    tmp_path: Path, llama_dir: Path, phase: Any
) -> None:
    """A batch of 8 that only fits at 4 from step 7 on; 10 steps over 80 rows."""
    rows = instructions(80)
    asked = {"rows": rows, "max_steps": 10, "batch_size": 8, "schedule": "cosine"}
    undisturbed = train(llama_dir, tmp_path / "undisturbed", **asked)
    ceiling = MemoryCeiling(4, from_step=7, phase=phase)
    trainer = faulty(llama_dir, tmp_path / "squeezed", wrap=ceiling, **asked)
    ceiling._steps_completed = lambda: trainer.steps
    result = trainer.train()
    assert distance(model_weights(tmp_path / "squeezed"), model_weights(tmp_path / "undisturbed")) < 1e-5
    assert (result.steps_completed, result.shrinks, ceiling.struck) == (10, 1, 1)
    assert ceiling.samples <= 80 + 8
    assert result.tokens == undisturbed.tokens
    assert result.final_loss == pytest.approx(undisturbed.final_loss, rel=1e-5)


def test_accumulated_micro_batches_survive_a_shrink_too(tmp_path: Path, llama_dir: Path) -> None:
    asked = {"max_steps": 4, "batch_size": 6, "grad_accum_steps": 2}
    train(llama_dir, tmp_path / "undisturbed", **asked)
    ceiling = MemoryCeiling(3, from_step=2)
    trainer = faulty(llama_dir, tmp_path / "squeezed", wrap=ceiling, **asked)
    ceiling._steps_completed = lambda: trainer.steps
    trainer.train()
    assert ceiling.struck == 1
    assert distance(model_weights(tmp_path / "squeezed"), model_weights(tmp_path / "undisturbed")) < 1e-5


def test_a_row_that_does_not_fit_alone_ends_in_the_memory_error(tmp_path: Path) -> None:
    trainer = faulty(LLAMA, tmp_path, wrap=MemoryCeiling(0, from_step=1), max_shrinks=9)
    with pytest.raises(GPUMemoryError, match="one row does not fit") as caught:
        trainer.train()
    assert caught.value.exit_code == 81


def needs_checkpointing(compute_loss: Any) -> Any:
    """Nothing fits while blocks keep their activations."""

    def limited(batch: Any, model: Any) -> Any:
        if torch.is_grad_enabled() and not model.is_gradient_checkpointing:
            raise out_of_memory_error()
        return compute_loss(batch)

    return limited


def checkpointing_trainer(run_dir: Path, seen: list[Event], **changes: Any) -> Any:
    class Needy(Trainer):
        def compute_loss(self, model: Any, batch: Any) -> Any:
            return needs_checkpointing(lambda part: super(Needy, self).compute_loss(model, part))(batch, model)

    asked = settings(**{**RESUMABLE, "gradient_checkpointing_if_needed": True, **changes, "observers": [seen.append]})
    return Needy(LLAMA, ROWS, output_dir=run_dir, **asked)


def test_activations_are_recomputed_when_nothing_else_helps_and_a_resumed_run_begins_so(tmp_path: Path) -> None:
    train(LLAMA, tmp_path / "undisturbed", **RESUMABLE)
    seen: list[Event] = []
    result = checkpointing_trainer(tmp_path / "a", seen, max_steps=4, warmup_steps=0, schedule="constant").train()
    (applied,) = [event for event in seen if isinstance(event, MemoryRemedyApplied)]
    assert applied.remedy == "enable_checkpointing"
    assert result.steps_completed == 4
    checkpointing_trainer(tmp_path / "b", seen).train()
    assert distance(model_weights(tmp_path / "b"), model_weights(tmp_path / "undisturbed")) < 1e-5
    seen.clear()
    accepted = {"accept_changes": ["max_steps"], "schedule": "constant", "max_steps": 6}
    checkpointing_trainer(tmp_path / "a", seen, **accepted).train()
    (again,) = [event for event in seen if isinstance(event, MemoryRemedyApplied)]
    assert "before the resume" in again.reason


def test_a_model_that_cannot_recompute_is_not_promised_to(tmp_path: Path, llama_dir: Path, tokenizer: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama_dir)
    type(model).supports_gradient_checkpointing, before = False, True
    try:
        with pytest.raises(InvalidSettingError, match="has no gradient checkpointing"):
            train(model, tmp_path, tokenizer=tokenizer, gradient_checkpointing_if_needed=True)
    finally:
        type(model).supports_gradient_checkpointing = before


def test_without_recovery_the_first_lack_of_memory_ends_the_run_with_a_checkpoint(tmp_path: Path) -> None:
    ceiling = MemoryCeiling(4, from_step=4)
    trainer = faulty(LLAMA, tmp_path, wrap=ceiling, oom_recovery=False, checkpoint_every_steps=1)
    ceiling._steps_completed = lambda: trainer.steps
    with pytest.raises(GPUMemoryError) as caught:
        trainer.train()
    assert caught.value.steps_completed == 3
    assert caught.value.checkpoint_path == str(tmp_path / "checkpoints" / "step-00000003")


def test_memory_that_runs_out_in_the_optimizer_is_a_memory_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(self: Any, closure: Any = None) -> None:
        raise out_of_memory_error()

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(GPUMemoryError) as caught:
        train(LLAMA, tmp_path)
    assert caught.value.details["requested_bytes"] == 2 * 2**30


def test_evaluation_goes_on_with_fewer_rows_when_memory_runs_out(tmp_path: Path) -> None:
    def ceiling(compute_loss: Any) -> Any:
        def limited(batch: Any) -> Any:
            if not torch.is_grad_enabled() and len(batch["labels"]) > 3:
                raise out_of_memory_error()
            return compute_loss(batch)

        return limited

    said: list[Event] = []
    held_out = instructions(40)[30:]
    asked = {"eval_dataset": held_out, "batch_size": 8, "max_steps": 2}
    squeezed = faulty(LLAMA, tmp_path / "a", wrap=ceiling, observers=[said.append], **asked).train()
    assert squeezed.eval_loss == pytest.approx(train(LLAMA, tmp_path / "b", **asked).eval_loss, rel=1e-5)
    shrinks = [(event.from_size, event.to_size) for event in said if isinstance(event, EvaluationShrunk)]
    assert shrinks == [(8, 4), (4, 2)]


# -- not a number ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_nan_step_is_skipped_told_and_left_out_of_the_means(tmp_path: Path, what: Any) -> None:
    seen: list[Event] = []
    trainer: Any = None
    fault = NonFinite({3}, what=what, steps_completed=lambda: trainer.steps)
    trainer = faulty(LLAMA, tmp_path, wrap=fault, log_every_steps=3, observers=[seen.append])
    result = trainer.train()
    assert (result.steps_completed, result.steps_skipped) == (6, 1)
    assert [event.step for event in seen if isinstance(event, StepSkipped)] == [3]
    lines = {event.step: event for event in seen if isinstance(event, MetricsLogged)}
    assert lines[3].steps_skipped == 1
    assert all(torch.isfinite(tensor).all() for tensor in model_weights(tmp_path).values())
    assert result.mean_loss == result.mean_loss


def test_a_window_of_skipped_steps_is_shown_as_nan(tmp_path: Path) -> None:
    seen: list[Event] = []
    trainer: Any = None
    fault = NonFinite({3, 4}, steps_completed=lambda: trainer.steps)
    trainer = faulty(LLAMA, tmp_path, wrap=fault, observers=[seen.append])
    trainer.train()
    (line,) = [event for event in seen if isinstance(event, MetricsLogged) and event.step == 4]
    assert line.loss != line.loss
    assert "loss nan" in str(line)


def test_a_streak_of_nan_ends_in_its_error_with_a_checkpoint(tmp_path: Path) -> None:
    trainer: Any = None
    fault = NonFinite(range(3, 99), steps_completed=lambda: trainer.steps)
    trainer = faulty(LLAMA, tmp_path, wrap=fault, max_skipped_in_a_row=2, max_steps=50)
    with pytest.raises(NaNLossError) as caught:
        trainer.train()
    assert caught.value.exit_code == 80
    assert Path(caught.value.checkpoint_path or "").is_dir()
    assert not (tmp_path / "model").exists()


# -- crash and resume ----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*:UserWarning")
@pytest.mark.parametrize(
    "changes",
    [
        {"mode": "full"},
        {"mode": "lora", "lora_dropout": 0.3},
        {"mode": "full", "grad_accum_steps": 2, "batch_size": 3},
        {"mode": "full", "eval_rows": 4, "eval_every_steps": 3},
    ],
    ids=["full", "lora", "accumulation", "evaluation"],
)
@pytest.mark.parametrize("crash_step", [1, 6])
def test_a_resumed_run_is_bit_identical_to_an_unbroken_one(
    tmp_path: Path, gpt2_dir: Path, changes: dict[str, Any], crash_step: int
) -> None:
    asked = {**RESUMABLE, **changes}
    unbroken = train(gpt2_dir, tmp_path / "unbroken", **asked)
    with pytest.raises(TrainingError, match="LookupError: boom"):
        faulty(gpt2_dir, tmp_path / "broken", before=crash_at(crash_step), **asked).train()
    seen: list[Event] = []
    resumed = train(gpt2_dir, tmp_path / "broken", **asked, observers=[seen.append])
    assert [event.step for event in seen if isinstance(event, Resumed)] == ([4] if crash_step == 6 else [])
    assert identical(model_weights(tmp_path / "broken"), model_weights(tmp_path / "unbroken"))
    ignored = ("run_id", "run_dir", "wall_s", "peak_memory_bytes", "checkpoint_path", "model_path")
    assert {k: v for k, v in resumed.to_dict().items() if k not in ignored} == {
        k: v for k, v in unbroken.to_dict().items() if k not in ignored
    }


def test_a_resumed_new_model_uses_the_tokenizer_of_its_beginning(tmp_path: Path) -> None:
    unbroken = train(DROPOUT, tmp_path / "unbroken", **RESUMABLE)
    with pytest.raises(TrainingError):
        faulty(DROPOUT, tmp_path / "broken", before=crash_at(6), **RESUMABLE).train()
    folder = tmp_path / "broken" / "tokenizer"
    before = (folder / "tokenizer.json").stat().st_mtime_ns
    resumed = train(DROPOUT, tmp_path / "broken", **RESUMABLE)
    assert (folder / "tokenizer.json").stat().st_mtime_ns == before
    assert resumed.final_loss == unbroken.final_loss
    assert identical(model_weights(tmp_path / "broken"), model_weights(tmp_path / "unbroken"))


def test_a_damaged_tokenizer_is_learned_again_and_said(tmp_path: Path) -> None:
    with pytest.raises(TrainingError):
        faulty(LLAMA, tmp_path, before=crash_at(6), **RESUMABLE).train()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{")
    seen: list[Event] = []
    train(LLAMA, tmp_path, **RESUMABLE, observers=[seen.append])
    assert any("is learned again" in str(event) for event in seen)
    assert any(isinstance(event, Resumed) for event in seen)


def test_an_unexpected_exception_becomes_a_training_error_that_says_where_it_stands(tmp_path: Path) -> None:
    with pytest.raises(TrainingError) as caught:
        faulty(LLAMA, tmp_path, before=crash_at(4), checkpoint_every_steps=1).train()
    error = caught.value
    assert isinstance(error.__cause__, LookupError)
    assert error.steps_completed == 3
    assert error.checkpoint_path == str(tmp_path / "checkpoints" / "step-00000003")
    assert error.run_id
    assert error.resume_command
    assert error.exit_code == 70


def test_a_signal_finishes_the_step_and_the_run_goes_on_later(tmp_path: Path) -> None:
    def interrupt(steps_completed: int) -> None:
        if steps_completed + 1 == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    unbroken = train(LLAMA, tmp_path / "unbroken", **RESUMABLE)
    with pytest.raises(TrainingAbortedError) as caught:
        faulty(LLAMA, tmp_path / "broken", before=interrupt, **RESUMABLE).train()
    assert caught.value.exit_code == 75
    assert caught.value.steps_completed == 5
    assert train(LLAMA, tmp_path / "broken", **RESUMABLE).final_loss == unbroken.final_loss
    assert identical(model_weights(tmp_path / "broken"), model_weights(tmp_path / "unbroken"))


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    first = train(LLAMA, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "model").iterdir()}
    seen: list[Event] = []
    again = train(LLAMA, tmp_path, observers=[seen.append])
    assert any("nothing left to do" in str(event) for event in seen)
    assert not [event for event in seen if isinstance(event, MetricsLogged)]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "model").iterdir()} == before
    assert (again.run_id, again.final_loss, again.tokens) == (first.run_id, first.final_loss, first.tokens)


def test_a_run_may_be_made_longer_and_its_model_is_brought_up_to_date(tmp_path: Path) -> None:
    train(LLAMA, tmp_path, schedule="constant")
    (tmp_path / "model" / "notes.txt").write_text("mine")
    before = model_weights(tmp_path)
    longer = train(LLAMA, tmp_path, schedule="constant", max_steps=8, accept_changes=["max_steps"])
    assert longer.steps_completed == 8
    assert not identical(before, model_weights(tmp_path))
    assert (tmp_path / "model" / "notes.txt").read_text() == "mine"
    train(LLAMA, tmp_path / "straight", schedule="constant", max_steps=8)
    assert identical(model_weights(tmp_path), model_weights(tmp_path / "straight"))


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"learning_rate": 5e-3}, "lr"),
        ({"max_steps": 12}, "max_steps"),
        ({"batch_size": 4}, "batch_size"),
        ({"rows": [*ROWS[:-1], {"text": "another row"}]}, "data.sha256"),
    ],
)
def test_a_run_is_not_continued_as_something_else(tmp_path: Path, changes: dict[str, Any], key: str) -> None:
    with pytest.raises(TrainingError):
        faulty(LLAMA, tmp_path, before=crash_at(6), tokenizer=None, **RESUMABLE).train()
    parts = checkpoint_parts(tmp_path)
    with pytest.raises(ResumeMismatchError) as caught:
        train(LLAMA, tmp_path, **{**RESUMABLE, **changes})
    assert any(key in name for name in caught.value.details["differences"])
    assert checkpoint_parts(tmp_path)["guard"]["steps_completed"] == parts["guard"]["steps_completed"]


def test_resume_never_and_must_are_obeyed(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError):
        train(LLAMA, tmp_path, resume="must")
    train(LLAMA, tmp_path)
    with pytest.raises(RunExistsError):
        train(LLAMA, tmp_path, resume="never")


def test_a_file_of_rows_that_grew_is_not_continued_unnoticed(tmp_path: Path, llama_dir: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(TrainingError):
        faulty(llama_dir, tmp_path / "run", rows=path, before=crash_at(6), **RESUMABLE).train()
    write_jsonl(path, instructions(25))
    with pytest.raises(ResumeMismatchError):
        train(llama_dir, tmp_path / "run", path, **RESUMABLE)
    accepted = ["data", "loader"]
    result = train(llama_dir, tmp_path / "run", path, **RESUMABLE, accept_changes=accepted)
    assert result.steps_completed == 9
