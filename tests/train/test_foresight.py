"""A `Trainer` foresees memory: it refuses what cannot fit, tells the guard what does, and keeps how it really was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensor
from transformers import LlamaForCausalLM

from tests.train.tiny import LLAMA, instructions, settings
from trainwarden.errors import FullFinetuneModelTooLargeError, InvalidSettingError, PreflightMemoryError
from trainwarden.events import Event, Notice
from trainwarden.runs import Ledger
from trainwarden.train import Trainer
from trainwarden.train import models as loading
from trainwarden.train.foresight import AUTO_FILE, AUTO_MARGIN

MIB = 2**20
TIGHT = 1_400_000
"""Bytes in which a few rows of 24 tokens fit, and twelve do not."""
ROWS = instructions(24)
BIG: dict[str, Any] = {**LLAMA, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3}
"""About two million parameters: 30 MiB of weights, gradients and moments."""


def trainer(run_dir: Path, model: Any = LLAMA, *, events: list[Event] | None = None, **changes: Any) -> Trainer:
    observers = () if events is None else (events.append,)
    return Trainer(model, ROWS, output_dir=run_dir, **{**settings(max_steps=2), "observers": observers, **changes})


def said(events: list[Event]) -> str:
    return "\n".join(str(event) for event in events if isinstance(event, Notice))


def test_full_fine_tuning_that_cannot_fit_is_refused_before_weights_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def built(*_: Any, **__: Any) -> Any:
        raise AssertionError("weights were made")

    monkeypatch.setattr(loading, "build_model", built)
    with pytest.raises(FullFinetuneModelTooLargeError) as caught:
        trainer(tmp_path, BIG, device_memory_bytes=16 * MIB).train()
    error = caught.value
    assert error.exit_code == 78
    assert error.details["available_bytes"] == 16 * MIB
    assert error.details["needed_bytes"] > 29 * MIB
    assert "mode='lora'" in str(error.details["fits"])
    assert "full_ft_ceiling_billions=" in error.suggestion


def test_the_refusal_names_nothing_that_would_not_fit_either(tmp_path: Path) -> None:
    with pytest.raises(FullFinetuneModelTooLargeError) as caught:
        trainer(tmp_path, BIG, device_memory_bytes=MIB).train()
    assert not [option for option in caught.value.details["fits"] if "lora" in option]


def test_a_ceiling_of_ones_own_overrides_the_prediction(tmp_path: Path) -> None:
    result = trainer(tmp_path, BIG, device_memory_bytes=16 * MIB, full_ft_ceiling_billions=0.01).train()
    assert result.steps_completed == 2


def test_above_a_ceiling_of_ones_own_a_model_is_refused_whatever_fits(tmp_path: Path) -> None:
    with pytest.raises(FullFinetuneModelTooLargeError) as caught:
        trainer(tmp_path, BIG, full_ft_ceiling_billions=0.001).train()
    assert caught.value.details["ceiling_billions"] == 0.001


def test_a_model_object_is_checked_by_its_true_count(tmp_path: Path, tokenizer: Any) -> None:
    model = loading.build_model(BIG, tokenizer, dtype=torch.float32)
    with pytest.raises(FullFinetuneModelTooLargeError) as caught:
        trainer(tmp_path, model, tokenizer=tokenizer, device_memory_bytes=16 * MIB).train()
    assert caught.value.details["billions"] == pytest.approx(0.002, abs=0.01)


def test_adapters_that_cannot_fit_are_refused_with_what_would(tmp_path: Path) -> None:
    with pytest.raises(PreflightMemoryError) as caught:
        trainer(tmp_path, BIG, mode="lora", device_memory_bytes=4 * MIB).train()
    assert caught.value.details["available_bytes"] == 4 * MIB
    assert "waive" in caught.value.suggestion


def test_a_waived_refusal_trains(tmp_path: Path) -> None:
    result = trainer(tmp_path, mode="lora", device_memory_bytes=100_000, waive=["PREFLIGHT_MEMORY"]).train()
    assert result.steps_completed == 2


def test_what_fits_is_not_talked_about(tmp_path: Path) -> None:
    events: list[Event] = []
    trainer(tmp_path, device_memory_bytes=1024 * MIB, events=events).train()
    assert "predicted" not in said(events)


def test_a_batch_that_is_foretold_not_to_fit_runs_in_parts_from_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    forward = LlamaForCausalLM.forward

    def counted(model: Any, **batch: Any) -> Any:
        if torch.is_grad_enabled() and not isinstance(batch["input_ids"], FakeTensor):
            sizes.append(len(batch["input_ids"]))
        return forward(model, **batch)

    roomy = trainer(tmp_path / "a", batch_size=12, device_memory_bytes=1024 * MIB, max_length=24).train()
    monkeypatch.setattr(LlamaForCausalLM, "forward", counted)
    events: list[Event] = []
    tight = trainer(tmp_path / "b", batch_size=12, device_memory_bytes=TIGHT, max_length=24, events=events).train()
    assert "12 rows of 24 tokens are predicted not to fit: " in said(events)
    assert 1 <= max(sizes) < 12, "but for the check that the loss may be split, which keeps no activations"
    assert tight.shrinks == 0, "nothing had to fail"
    assert tight.final_loss == pytest.approx(roomy.final_loss, rel=1e-4), "the same step, in parts"


def test_a_loss_of_ones_own_is_not_foretold(tmp_path: Path) -> None:
    class Own(Trainer):
        def compute_loss(self, model: Any, batch: Any) -> Any:
            return super().compute_loss(model, batch)

    events: list[Event] = []
    options: dict[str, Any] = settings(max_steps=2, batch_size=12, max_length=24, observers=(events.append,))
    Own(LLAMA, ROWS, output_dir=tmp_path, device_memory_bytes=TIGHT, **options).train()
    assert "predicted" not in said(events)


def test_without_recovery_nothing_is_foretold(tmp_path: Path) -> None:
    events: list[Event] = []
    options: dict[str, Any] = {"device_memory_bytes": TIGHT, "max_length": 24, "events": events}
    trainer(tmp_path, batch_size=12, oom_recovery=False, **options).train()
    assert "predicted" not in said(events)


def test_auto_takes_what_is_predicted_to_fit_and_says_its_margin(tmp_path: Path) -> None:
    events: list[Event] = []
    options: dict[str, Any] = {"device_memory_bytes": TIGHT, "max_length": 24}
    trainer(tmp_path, batch_size="auto", events=events, **options).train()
    chosen = json.loads((tmp_path / AUTO_FILE).read_text())["batch_size"]
    assert 1 <= chosen < 24
    assert f"batch_size auto: {chosen}; " in said(events)
    assert f"{AUTO_MARGIN:.0%} of memory stays free" in said(events)


def test_auto_takes_no_more_rows_than_there_are(tmp_path: Path) -> None:
    trainer(tmp_path, batch_size="auto", device_memory_bytes=4096 * MIB).train()
    assert json.loads((tmp_path / AUTO_FILE).read_text())["batch_size"] == len(ROWS)


def test_a_continued_run_takes_the_batch_that_auto_chose_before(tmp_path: Path) -> None:
    trainer(tmp_path, batch_size="auto", device_memory_bytes=TIGHT, max_length=24).train()
    before = (tmp_path / AUTO_FILE).read_text()
    events: list[Event] = []
    changes: dict[str, Any] = {"max_steps": 3, "accept_changes": ["max_steps"], "max_length": 24}
    trainer(tmp_path, batch_size="auto", device_memory_bytes=64 * MIB, events=events, **changes).train()
    assert (tmp_path / AUTO_FILE).read_text() == before
    assert "as this run has chosen before" in said(events)


def test_auto_on_a_bare_cpu_takes_a_fixed_size_and_says_why(tmp_path: Path) -> None:
    events: list[Event] = []
    trainer(tmp_path, batch_size="auto", events=events).train()
    assert "batch_size auto: 8; memory is not predicted here" in said(events)


@pytest.mark.parametrize("kept", ["", "[]", '{"batch_size": 0}', '{"batch_size": true}'])
def test_a_damaged_note_of_the_choice_is_made_again(tmp_path: Path, kept: str) -> None:
    tmp_path.joinpath(AUTO_FILE).write_text(kept)
    trainer(tmp_path, batch_size="auto").train()
    assert json.loads((tmp_path / AUTO_FILE).read_text()) == {"batch_size": 8}


def test_predicted_and_real_peaks_are_in_the_ledger_at_the_end(tmp_path: Path) -> None:
    trainer(tmp_path, device_memory_bytes=1024 * MIB).train()
    [memory] = Ledger().memory_of_runs()
    assert memory.device == "cpu"
    assert memory.predicted_bytes > 100_000
    assert memory.allocated_bytes is None, "a CPU has no allocator that tells its peak"


def test_a_run_that_is_not_predicted_leaves_no_record(tmp_path: Path) -> None:
    trainer(tmp_path).train()
    assert Ledger().memory_of_runs() == []


def test_a_prediction_that_fails_is_a_notice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import trainwarden.train.foresight as module

    def fails(*_: Any) -> Any:
        raise module.NoPredictionError("it looks at values, and it is no decoder")

    monkeypatch.setattr(module.Forecast, "predict", fails)
    events: list[Event] = []
    assert trainer(tmp_path, device_memory_bytes=1024 * MIB, events=events).train().steps_completed == 2
    assert "memory is not predicted: it looks at values" in said(events)


def test_checkpointing_trains_the_same(tmp_path: Path) -> None:
    plain = trainer(tmp_path / "a").train()
    checkpointed = trainer(tmp_path / "b", gradient_checkpointing=True).train()
    assert checkpointed.final_loss == pytest.approx(plain.final_loss, rel=1e-5)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("batch_size", "all"),
        ("batch_size", 0),
        ("full_ft_ceiling_billions", -1.0),
        ("gradient_checkpointing", 1),
        ("device_memory_bytes", "24GiB"),
        ("waive", ["PREFLIGHT_MEMRY"]),
    ],
)
def test_a_setting_out_of_range_is_refused(tmp_path: Path, setting: str, value: Any) -> None:
    with pytest.raises(InvalidSettingError, match=setting):
        trainer(tmp_path, **{setting: value})
