"""A `Trainer` foresees memory: it refuses what cannot fit, tells the guard what does, and keeps how it really was."""

from __future__ import annotations

import dataclasses
import json
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensor
from transformers import LlamaForCausalLM

from tests.capability.scripted import without_gpu
from tests.train.test_recovery import faulty
from tests.train.tiny import LLAMA, instructions, settings
from trainwarden.errors import (
    FullFinetuneModelTooLargeError,
    GPUMemoryError,
    InvalidSettingError,
    PreflightMemoryError,
)
from trainwarden.events import Event, Notice
from trainwarden.memory.overheads import CALIBRATION_RUNS, DeviceMemory, Overheads, calibrated
from trainwarden.runs import Ledger
from trainwarden.testing import MemoryCeiling
from trainwarden.train import Trainer, foresight, gates
from trainwarden.train import models as loading
from trainwarden.train.forecast import Forecast
from trainwarden.train.foresight import AUTO_FILE, AUTO_MARGIN
from trainwarden.train.precision import choose_precision
from trainwarden.train.subject import read_subject

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


def test_every_way_to_save_memory_is_part_of_what_is_predicted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gates, "Machine", lambda: without_gpu(installed=("torch", "bitsandbytes")))
    asked = {"mode": "qlora", "optimizer": "adamw_8bit", "loss_chunk_tokens": 7, "gradient_checkpointing": True}
    precision = choose_precision("bfloat16", torch.device("cpu"), "qlora")
    plan = foresight.plan_of(trainer(tmp_path, **asked), precision)
    assert (plan.mode, plan.optimizer, plan.loss_chunk_tokens) == ("qlora", "adamw_8bit", 7)
    assert (plan.weights, plan.autocast, plan.checkpointing) == ("bfloat16", "bfloat16", True)
    file = tmp_path / "asked.yaml"
    file.write_text(
        "output_dir: x\nmodel: {config: {model_type: llama}, mode: qlora}\ndata: {train: python-docstrings}\n"
        "trainer: {max_steps: 1, optimizer: adamw_8bit, loss_chunk_tokens: 7, gradient_checkpointing: true}\n"
    )
    read = read_subject(str(file)).plan
    assert (read.mode, read.optimizer, read.loss_chunk_tokens) == ("qlora", "adamw_8bit", 7)


def test_a_prediction_leaves_bitsandbytes_to_those_who_need_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing it takes a second; and what peft has found meanwhile must not outlive the prediction."""
    from peft import import_utils

    from trainwarden.train.forecast import _without_bitsandbytes

    before = import_utils.is_bnb_available()
    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
    with _without_bitsandbytes():
        import_utils.is_bnb_available.cache_clear()
        assert not import_utils.is_bnb_available()
    assert "bitsandbytes" not in sys.modules
    assert import_utils.is_bnb_available() is before


# -- calibration -------------------------------------------------------------------------------------------------


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The hardware boundary: an allocator that tells peaks of three times the prediction, on a device of this name."""
    told: dict[str, Any] = {"name": "Card A", "factor": 3.0, "predicted": []}
    monkeypatch.setattr(foresight, "Forecast", partial(foresight.Forecast, traced=False))

    def measured(memory: Any) -> foresight.Peaks:
        allocated = round(told["factor"] * told["predicted"][-1])
        return foresight.Peaks(allocated, 2 * allocated, 1000)

    def memory_of(_: Any, asked: int | None) -> DeviceMemory | None:
        return None if asked is None else DeviceMemory(name=told["name"], total_bytes=asked)

    predict = Forecast.predict

    def predicted(forecast: Any, plan: Any) -> Any:
        found = predict(forecast, plan)
        told["predicted"].append(found.peak_bytes)
        return found

    monkeypatch.setattr(Forecast, "predict", predicted)
    monkeypatch.setattr(foresight, "tells_peaks", lambda _: True)
    monkeypatch.setattr(foresight, "measured_peaks", measured)
    monkeypatch.setattr(foresight, "_memory_of", memory_of)
    return told


def overheads(name: str) -> Overheads:
    return calibrated(Ledger().memory_of_runs(), name)


AMPLE: dict[str, Any] = {"max_steps": 1, "batch_size": 4, "mode": "lora", "device_memory_bytes": 1024 * MIB}


def test_finished_runs_calibrate_the_predictions_of_their_own_device(tmp_path: Path, device: dict[str, Any]) -> None:
    for run in range(CALIBRATION_RUNS):
        assert overheads("Card A").runs == 0
        trainer(tmp_path / f"a{run}", **AMPLE).train()
    device |= {"name": "Card B", "factor": 1.0}
    trainer(tmp_path / "b", **AMPLE).train()
    found = overheads("Card A")
    assert (found.runs, found.fragmentation, found.context_bytes) == (3, pytest.approx(1.0), 1000)
    assert found.correction == pytest.approx(3.0, rel=1e-3)
    assert overheads("Card B") == Overheads(), "one run is not enough, and those of another device do not count"


def test_what_was_calibrated_decides_the_next_run(tmp_path: Path, device: dict[str, Any]) -> None:
    for run in range(CALIBRATION_RUNS):
        trainer(tmp_path / f"a{run}", **AMPLE).train()
    one_row = min(device["predicted"])
    with pytest.raises(PreflightMemoryError) as caught:  # six times what is predicted, and 1,000 bytes
        trainer(tmp_path / "small", **{**AMPLE, "device_memory_bytes": 5 * one_row}).train()
    assert caught.value.details["needed_bytes"] == pytest.approx(6 * one_row + 1000, rel=1e-3)
    assert trainer(tmp_path / "enough", **{**AMPLE, "device_memory_bytes": 7 * one_row}).train().steps_completed == 1


@pytest.mark.parametrize("how", ["shrank", "failed"])
def test_a_run_that_was_not_what_was_predicted_calibrates_nothing(
    tmp_path: Path, device: dict[str, Any], how: str
) -> None:
    ceiling = MemoryCeiling(2) if how == "shrank" else MemoryCeiling(0)
    for run in range(CALIBRATION_RUNS):
        disturbed = faulty(LLAMA, tmp_path / f"{run}", rows=ROWS, wrap=ceiling, **AMPLE)
        with pytest.raises(GPUMemoryError) if how == "failed" else nullcontext():
            assert disturbed.train().shrinks
    kept = Ledger().memory_of_runs()
    assert [(memory.device, memory.allocated_bytes) for memory in kept] == [("Card A", None)] * CALIBRATION_RUNS
    assert all(memory.predicted_bytes > 0 for memory in kept)
    assert overheads("Card A") == Overheads()


def test_a_run_that_went_back_calibrates_nothing(tmp_path: Path, device: dict[str, Any]) -> None:
    events: list[Event] = []
    went: list[Any] = []
    record = foresight.Foresight.record

    def rolled_back(self: Any, run_id: Any, result: Any) -> None:
        went.append(result)
        record(self, run_id, dataclasses.replace(result, rollbacks=1))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(foresight.Foresight, "record", rolled_back)
        trainer(tmp_path, events=events, **AMPLE).train()
    assert went[0].rollbacks == 0
    assert [memory.allocated_bytes for memory in Ledger().memory_of_runs()] == [None]


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
