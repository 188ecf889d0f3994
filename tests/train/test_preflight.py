"""Whether a training fits, known from its configuration: what may be asked, and what is answered."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.train.tiny import GPT2, LLAMA
from trainwarden.errors import (
    ConfigNotFoundError,
    ConfigurationError,
    InvalidSettingError,
    ModelLoadError,
    PreflightRefusedError,
    UnknownCodeError,
    UnpredictableModelError,
)
from trainwarden.memory.overheads import NO_OVERHEADS, DeviceMemory, Overheads
from trainwarden.memory.plan import TrainingPlan
from trainwarden.train.forecast import Forecast, NoPredictionError
from trainwarden.train.preflight import PreflightReport, fitting_cards, preflight
from trainwarden.train.subject import Subject, complete, plan_for, read_subject, subject_of, under_mode

GIB = 2**30
LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}
CONFIG = """\
output_dir: runs/demo
model: {config: {model_type: llama, hidden_size: 64, num_hidden_layers: 2, num_attention_heads: 4}, mode: full}
data: {train: python-docstrings, max_length: 96}
trainer: {max_steps: 20, batch_size: 5, grad_accum_steps: 3, gradient_checkpointing: true}
"""


def big(plan: TrainingPlan | None = None, **changes: Any) -> Subject:
    plan = plan or plan_for("lora", "bfloat16")
    return subject_of("llama-8b", complete("x", LLAMA_8B), replace(plan, **changes))


def ask(subject: Subject, gib: float = 24.0, **options: Any) -> PreflightReport:
    device = DeviceMemory(name="a card", total_bytes=round(gib * GIB))
    return preflight(subject, device=device, overheads=Overheads(), traced=False, **options)


# -- what may be asked about ------------------------------------------------------------------------------------------


def test_a_training_configuration(tmp_path: Path) -> None:
    file = tmp_path / "demo.yaml"
    file.write_text(CONFIG)
    subject = read_subject(str(file), ["data.max_length=64"])
    plan = subject.plan
    assert (plan.mode, plan.micro_batch_size, plan.sequence_length, plan.grad_accum_steps) == ("full", 5, 64, 3)
    assert (plan.weights, plan.autocast, plan.checkpointing) == ("float32", "bfloat16", True)
    assert subject.architecture is not None
    assert subject.architecture.hidden == 64


def test_a_batch_size_that_is_chosen_later_counts_as_one_row(tmp_path: Path) -> None:
    file = tmp_path / "demo.yaml"
    file.write_text(CONFIG.replace("batch_size: 5", "batch_size: auto"))
    assert read_subject(str(file)).plan.micro_batch_size == 1


def test_a_model_directory_as_it_was_saved(llama_dir: Path) -> None:
    subject = read_subject(str(llama_dir))
    assert subject.plan.mode == "lora"
    assert subject.architecture is not None
    assert subject.architecture.hidden == LLAMA["hidden_size"]


@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_a_bare_model_configuration(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"model{suffix}"
    file.write_text(json.dumps(dict(LLAMA)))
    subject = read_subject(str(file))
    assert subject.config["rms_norm_eps"] == pytest.approx(1e-6), "defaults of the type are filled in"


def test_a_hub_name_whose_configuration_is_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--org--tiny" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(dict(LLAMA)))
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    import huggingface_hub

    found = huggingface_hub.try_to_load_from_cache
    monkeypatch.setattr(
        huggingface_hub, "try_to_load_from_cache", lambda name, file: found(name, file, cache_dir=tmp_path)
    )
    assert read_subject("org/tiny").config["hidden_size"] == LLAMA["hidden_size"]


def test_a_hub_name_that_is_not_here_is_not_downloaded() -> None:
    with pytest.raises(ModelLoadError, match="no such file or directory, and no model of this name") as caught:
        read_subject("org/absent-model")
    assert "downloads nothing" in caught.value.suggestion


def test_an_adapter_directory_points_to_its_base(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelLoadError, match="adapter"):
        read_subject(str(tmp_path))


def test_an_empty_directory_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"no config\.json"):
        read_subject(str(tmp_path))


@pytest.mark.parametrize(
    "content", ["not json", "[1, 2]", '{"hidden_size": 4}', '{"model_type": "llama", "hidden_size": "big"}']
)
def test_a_file_that_is_no_configuration(tmp_path: Path, content: str) -> None:
    file = tmp_path / "config.json"
    file.write_text(content)
    with pytest.raises(ConfigurationError) as caught:
        read_subject(str(file))
    assert str(file) in caught.value.message


def test_a_model_type_that_nobody_knows(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"model_type": "quux"}')
    with pytest.raises(InvalidSettingError, match="quux"):
        read_subject(str(file))


def test_a_new_model_type_with_the_usual_numbers_is_answered_by_the_closed_form(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**LLAMA, "model_type": "quux"}))
    subject = read_subject(str(file))
    report = preflight(subject, device=None, overheads=NO_OVERHEADS)
    assert report.prediction.source == "closed form"
    assert any("not traced" in note for note in report.prediction.notes)


def test_a_missing_yaml_file_is_a_missing_file() -> None:
    with pytest.raises(ConfigNotFoundError):
        read_subject("nowhere.yaml")


def test_another_mode_holds_the_weights_as_the_trainer_would() -> None:
    full = under_mode(big(), "full")
    assert (full.plan.weights, full.plan.autocast) == ("float32", "bfloat16")
    back = under_mode(full, "lora")
    assert (back.plan.weights, back.plan.autocast) == ("bfloat16", "bfloat16")
    assert under_mode(big(plan_for("lora", "float32")), "qlora").plan.weights == "bfloat16"


def test_without_bfloat16_units_auto_means_float32() -> None:
    assert plan_for("lora", "auto", bfloat16=False).weights == "float32"


# -- what is answered -------------------------------------------------------------------------------------------------


def test_it_fits_with_a_margin() -> None:
    report = ask(big(checkpointing=True))
    assert report.fits
    assert report.margin_bytes == 24 * GIB - report.needed_bytes
    assert not list(report.findings)
    report.require()
    assert report.rows is not None
    assert report.rows.value >= 1
    assert report.tokens is not None
    assert report.tokens.value >= 2048


def test_it_does_not_fit_and_the_finding_names_what_would() -> None:
    report = ask(big(micro_batch_size=8))
    assert report.fits is False
    with pytest.raises(PreflightRefusedError) as caught:
        report.require()
    [finding] = caught.value.details["findings"]
    assert finding["code"] == "PREFLIGHT_MEMORY"
    assert "gradient checkpointing" in finding["message"]
    assert caught.value.details["report"]["fits"] is False
    assert report.advice is not None
    assert report.advice.plan is not None
    assert ask(big(report.advice.plan)).fits


def test_the_largest_micro_batch_is_where_it_stops_fitting() -> None:
    subject = big(checkpointing=True)
    report = ask(subject, 40.0)
    assert report.rows is not None
    assert ask(subject.having(micro_batch_size=report.rows.value), 40.0).fits
    assert not ask(subject.having(micro_batch_size=report.rows.value + 1), 40.0).fits


def test_fitting_by_less_than_the_stated_error_is_a_warning() -> None:
    needed = ask(big(checkpointing=True)).needed_bytes
    report = ask(big(checkpointing=True), needed / GIB + 0.05)
    [finding] = report.findings
    assert (finding.code, str(finding.severity)) == ("PREFLIGHT_MEMORY", "warning")
    report.require()


def test_a_waived_finding_lets_it_pass() -> None:
    report = ask(big(), waive=["preflight_memory"])
    assert report.fits is False
    report.require()


def test_a_waiver_with_a_typing_error_is_said_before_anything_is_computed() -> None:
    with pytest.raises(UnknownCodeError):
        ask(big(), waive=["PREFLIGHT_MEMORI"])


def test_offloading_is_judged_by_the_host_too() -> None:
    offloaded = big(plan_for("full", "bfloat16", offload=True, checkpointing=True))
    report = ask(offloaded, 24.0, host_bytes=64 * GIB)
    assert report.fits
    with pytest.raises(PreflightRefusedError) as caught:
        report.require()
    assert "PREFLIGHT_HOST_MEMORY" in caught.value.message
    ask(offloaded, 24.0, host_bytes=256 * GIB).require()


def test_without_a_device_nothing_is_judged_and_the_cards_that_would_do_are_known() -> None:
    report = preflight(big(), device=None, overheads=Overheads(), traced=False)
    assert report.fits is None
    assert report.rows is None
    cards = fitting_cards(report.needed_bytes)
    assert "H100" in cards
    assert "RTX 4090" not in cards


def test_the_report_is_json() -> None:
    document = json.loads(json.dumps(ask(big(micro_batch_size=2)).to_dict(), allow_nan=False))
    assert document["parameters"] == pytest.approx(8.03e9, rel=0.01)
    assert document["prediction"]["source"] == "closed form"
    assert document["advice"]["changes"][0]["name"] == "gradient checkpointing"


# -- how it is known --------------------------------------------------------------------------------------------------


def test_a_small_model_is_traced_and_says_which_operation_makes_the_peak() -> None:
    subject = subject_of("tiny", complete("x", LLAMA), plan_for("full", "float32", sequence_length=32))
    report = preflight(subject, device=DeviceMemory(name="x", total_bytes=GIB), overheads=NO_OVERHEADS)
    assert report.prediction.source == "traced"
    assert report.prediction.operation
    assert report.fits


def test_what_cannot_be_traced_says_why_and_falls_back_to_the_closed_form(monkeypatch: pytest.MonkeyPatch) -> None:
    import trainwarden.train.forecast as module

    def broken(*_: Any, **__: Any) -> Any:
        raise module.CannotTraceError("it looks at values")

    monkeypatch.setattr(module, "trace", broken)
    prediction = Forecast(big()).predict(big().plan)
    assert prediction.source == "closed form"
    assert prediction.notes[0] == "not traced: it looks at values"


def test_what_nobody_can_predict_is_an_error_and_no_guess() -> None:
    subject = subject_of("odd", {**LLAMA, "model_type": "mamba"}, TrainingPlan())
    with pytest.raises(NoPredictionError):
        Forecast(subject, traced=False).predict(subject.plan)
    with pytest.raises(UnpredictableModelError, match="attention"):
        preflight(subject, device=None, overheads=NO_OVERHEADS, traced=False)


def test_a_change_that_nothing_can_predict_is_not_advised(monkeypatch: pytest.MonkeyPatch) -> None:
    import trainwarden.train.forecast as module
    from trainwarden.memory import arithmetic

    known = big()
    assert known.architecture is not None
    architecture = known.architecture
    odd = replace(known, architecture=None, no_architecture="it is none that the closed form knows")
    plans: list[TrainingPlan] = []
    monkeypatch.setattr(module, "loop_for", plans.append)
    monkeypatch.setattr(module, "trace", lambda *_, **__: arithmetic.predict(architecture, plans[-1]))
    report = preflight(
        odd, device=DeviceMemory(name="x", total_bytes=24 * GIB), overheads=NO_OVERHEADS, largest_too=False
    )
    assert report.advice is not None
    assert [change.name for change in report.advice.changes] == ["gradient checkpointing"]
    tight = preflight(odd, device=DeviceMemory(name="x", total_bytes=GIB), overheads=NO_OVERHEADS, largest_too=False)
    assert tight.advice is not None
    assert tight.advice.plan is None


def test_a_disagreement_with_the_closed_form_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    import trainwarden.train.forecast as module
    from trainwarden.memory import arithmetic

    other = subject_of("x", complete("x", GPT2), TrainingPlan())
    assert other.architecture is not None
    architecture = replace(other.architecture, vocab=99 * other.architecture.vocab)
    monkeypatch.setattr(module, "trace", lambda *_, **__: arithmetic.predict(architecture, TrainingPlan()))
    prediction = Forecast(other).predict(TrainingPlan())
    assert any("closed form gives" in note for note in prediction.notes)


def test_after_a_trace_estimates_are_scaled_to_it() -> None:
    subject = subject_of("tiny", complete("x", LLAMA), plan_for("full", "float32", sequence_length=32))
    forecast = Forecast(subject)
    traced = forecast.predict(subject.plan)
    two = replace(subject.plan, micro_batch_size=2)
    assert forecast.estimate(subject.plan) is traced
    assert forecast.estimate(two).peak_bytes == pytest.approx(forecast.predict(two).peak_bytes, rel=0.05)
