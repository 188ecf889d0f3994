"""One configuration out of file, environment and flags: refused with reasons, never guessed at."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainwarden.errors import (
    ConfigNotFoundError,
    ConfigurationError,
    InvalidSettingError,
    UsageError,
    WardenError,
)
from trainwarden.train.config import ResolvedConfig, TrainConfig, load_config

MINIMAL = """\
output_dir: runs/demo
model:
  config:
    model_type: llama
    hidden_size: 32
data:
  train: python-docstrings
trainer:
  learning_rate: 1e-4
  max_steps: 20
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = Path("demo.yaml")
    path.write_text(MINIMAL)
    return path


def load(file: Path, *overrides: str, **environ: str) -> ResolvedConfig:
    return load_config(file, overrides, environ)


def refused(file: Path, *overrides: str, **environ: str) -> WardenError:
    with pytest.raises(WardenError) as caught:
        load(file, *overrides, **environ)
    return caught.value


def test_what_is_not_said_has_its_default(file: Path) -> None:
    config = load(file).config
    assert (config.model.mode, config.model.lora_rank, config.model.lora_alpha) == ("lora", 16, 32.0)
    assert (config.trainer.batch_size, config.trainer.schedule, config.trainer.seed) == (8, "cosine", 0)
    assert (config.guard.max_shrinks, config.guard.checkpoint_every_s, config.guard.resume) == (
        3,
        600.0,
        "auto",
    )
    assert config.trainer.learning_rate == 1e-4


def test_the_defaults_are_those_of_the_trainer(file: Path) -> None:
    from trainwarden.train import Trainer

    ours = {key.rpartition(".")[2]: value for key, value, source in load(file).rows() if source == "default"}
    theirs = {field.name: field.default for field in dataclasses.fields(Trainer)}
    shared = {name: value for name, value in ours.items() if name in theirs and name not in ("accept_changes", "waive")}
    assert len(shared) > 25
    assert shared == {name: theirs[name] for name in shared}


def test_a_flag_beats_the_environment_beats_the_file_beats_the_default(file: Path) -> None:
    names = {"WARDEN_TRAINER__MAX_STEPS": "30", "WARDEN_TRAINER__SEED": "7", "WARDEN_OUTPUT_DIR": "elsewhere"}
    resolved = load(file, "trainer.max_steps=40", **names)
    assert resolved.config.trainer.max_steps == 40
    assert resolved.config.trainer.seed == 7
    sources = {key: source for key, _, source in resolved.rows()}
    assert sources["trainer.max_steps"] == "flag"
    assert sources["trainer.seed"] == "environment WARDEN_TRAINER__SEED"
    assert sources["output_dir"] == "environment WARDEN_OUTPUT_DIR"
    assert sources["trainer.learning_rate"] == "demo.yaml:9"
    assert sources["model.config.hidden_size"] == "demo.yaml:5"
    assert sources["guard.keep_last"] == "default"


def test_every_key_is_listed_once_in_the_order_of_the_sections(file: Path) -> None:
    keys = [key for key, _, _ in load(file).rows()]
    assert len(keys) == len(set(keys))
    sections = list(dict.fromkeys(key.partition(".")[0] for key in keys))
    assert sections == ["output_dir", "model", "data", "trainer", "guard"]


def test_other_variables_of_ours_are_no_settings(file: Path) -> None:
    load(file, WARDEN_HOME="/h", WARDEN_DEBUG="1", WARDEN_EXIT_PROFILE="warden", OTHER__KEY="x")


def test_the_environment_is_by_default_that_of_the_process(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WARDEN_TRAINER__SEED", "11")
    assert load_config(file).config.trainer.seed == 11


def test_a_flag_reaches_into_the_model_configuration(file: Path) -> None:
    resolved = load(file, "model.config.num_hidden_layers=2", WARDEN_MODEL__CONFIG__VOCAB_SIZE="512")
    assert resolved.config.model.config == {
        "model_type": "llama",
        "hidden_size": 32,
        "vocab_size": 512,
        "num_hidden_layers": 2,
    }


def test_a_flag_takes_the_place_of_a_whole_branch(file: Path) -> None:
    resolved = load(file, "model.config=null", "model.name_or_path=org/name")
    assert resolved.config.model.config is None
    assert resolved.config.model.name_or_path == "org/name"
    again = load(file, "model.config=null", "model.config.model_type=gpt2")
    assert again.config.model.config == {"model_type": "gpt2"}


def test_a_section_can_be_given_in_one_flag(file: Path) -> None:
    trainer = load(file, "trainer={max_steps: 3, seed: 2}").config.trainer
    assert (trainer.max_steps, trainer.seed, trainer.learning_rate) == (3, 2, 1e-4)


@pytest.mark.parametrize("empty", ["trainer={}", "trainer=", "trainer=null"])
def test_a_section_with_nothing_in_it_changes_nothing(file: Path, empty: str) -> None:
    assert load(file, empty).config == load(file).config


def test_a_section_whose_lines_are_commented_out_is_empty(file: Path) -> None:
    file.write_text(MINIMAL + "guard:\n  # max_shrinks: 1\n")
    assert load(file).config.guard.max_shrinks == 3


def test_paths_become_whole_and_names_stay(file: Path, tmp_path: Path) -> None:
    (tmp_path / "llama").mkdir()
    config = load(file, "model={config: null, name_or_path: llama}", "data={train: a.jsonl, eval: ../b.jsonl}").config
    assert config.output_dir == str(tmp_path / "runs" / "demo")
    assert config.model.name_or_path == str(tmp_path / "llama")
    assert config.data.train == str(tmp_path / "a.jsonl")
    assert config.data.eval == str(tmp_path.parent / "b.jsonl")
    assert load(file).config.data.train == "python-docstrings"
    hub = load(file, "model={config: null, name_or_path: org/llama}").config
    assert hub.model.name_or_path == "org/llama"


def test_an_unknown_key_is_refused_with_the_nearest_one_and_its_line(file: Path) -> None:
    file.write_text(MINIMAL + "  learning_rat: 1\n")
    error = refused(file)
    assert isinstance(error, ConfigurationError)
    assert error.details["place"] == "demo.yaml:11"
    assert "did you mean trainer.learning_rate?" in error.message


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("trainer.batchsize=4", "did you mean trainer.batch_size?"),
        ("max_steps=4", "did you mean trainer.max_steps?"),
        ("trainer.oom_recovery=true", "did you mean guard.oom_recovery?"),
        ("zzz.qqq=4", "known here are data, guard, model, output_dir, trainer"),
        ("guard.zzz=4", "known here are accept_changes"),
    ],
)
def test_an_unknown_flag_is_refused_with_what_could_be_meant(file: Path, override: str, said: str) -> None:
    error = refused(file, override)
    assert error.code == "CONFIG_INVALID"
    assert said in error.message


def test_an_unknown_variable_is_refused_by_its_name(file: Path) -> None:
    error = refused(file, WARDEN_TRAINER__LEARNING_RAT="1e-3")
    assert "environment WARDEN_TRAINER__LEARNING_RAT" in error.message
    assert "trainer.learning_rate" in error.message


@pytest.mark.parametrize(
    ("override", "setting", "value"),
    [
        ("trainer.max_steps=0", "trainer.max_steps", 0),
        ("trainer.max_steps=-5", "trainer.max_steps", -5),
        ("trainer.max_steps=true", "trainer.max_steps", True),
        ("trainer.max_steps=2.5", "trainer.max_steps", 2.5),
        ("trainer.max_steps='8'", "trainer.max_steps", '"8"'),
        ("trainer.max_steps=null", "trainer.max_steps", None),
        ("trainer.learning_rate=nan", "trainer.learning_rate", "nan"),
        ("trainer.learning_rate=.inf", "trainer.learning_rate", "inf"),
        ("trainer.learning_rate=false", "trainer.learning_rate", False),
        ("trainer.learning_rate=0", "trainer.learning_rate", 0),
        ("trainer.batch_size=0", "trainer.batch_size", 0),
        ("trainer.schedule=sine", "trainer.schedule", '"sine"'),
        ("trainer.warmup_steps=20", "trainer.warmup_steps", 20),
        ("model.mode=half", "model.mode", '"half"'),
        ("model.lora_dropout=1.0", "model.lora_dropout", 1.0),
        ("model.lora_target_modules=[]", "model.lora_target_modules", []),
        ("model.config=7", "model.config", 7),
        ("data.train=''", "data.train", '""'),
        ("data.train=7", "data.train", 7),
        ("data={eval: e.jsonl, eval_rows: 3}", "data.eval_rows", 3),
        ("guard.oom_recovery=no", "guard.oom_recovery", '"no"'),
        ("guard.checkpoint_every_s=-1", "guard.checkpoint_every_s", -1),
        ("guard.accept_changes=[1]", "guard.accept_changes", [1]),
        ("trainer=5", "trainer", 5),
    ],
)
def test_a_value_that_cannot_be_is_named_with_what_is_expected(
    file: Path, override: str, setting: str, value: Any
) -> None:
    error = refused(file, override)
    assert isinstance(error, InvalidSettingError)
    assert error.details["setting"] == setting
    assert error.details["value"] == value
    assert error.details["expected"].endswith("[flag]")
    assert "None" not in error.details["expected"]
    json.dumps(error.to_dict(), allow_nan=False)


@pytest.mark.parametrize("override", ["model.name_or_path=org/name", "model.config=null"])
def test_a_model_comes_from_exactly_one_place(file: Path, override: str) -> None:
    error = refused(file, override)
    assert error.details["setting"] == "model"
    assert "exactly one of name_or_path and config" in error.message


def test_everything_that_is_wrong_is_said_at_once(file: Path) -> None:
    file.write_text(MINIMAL.replace("max_steps: 20", "max_steps: -20") + "  colour: red\n")
    error = refused(file, "guard.keep_last=0")
    assert isinstance(error, ConfigurationError)
    problems = error.details["problems"]
    assert len(problems) == 3
    for word in ("trainer.max_steps", "trainer.colour", "guard.keep_last"):
        assert sum(word in problem for problem in problems) == 1
        assert word in error.message


def test_what_must_be_given_is_named(file: Path) -> None:
    file.write_text("model: {config: {model_type: llama}}\n")
    error = refused(file)
    for key in ("output_dir", "data.train", "trainer.max_steps"):
        assert f"{key} is missing" in error.message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigNotFoundError) as caught:
        load_config(tmp_path / "none.yaml")
    assert caught.value.details["path"] == str(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("content", "place", "problem"),
    [
        (b"a: [1\nb: 2\n", "bad.yaml:2", ""),
        (b"", "bad.yaml", "empty"),
        (b"just words", "bad.yaml:1", "expected keys"),
        (b"output_dir: a\noutput_dir: b\n", "bad.yaml:2", "given twice"),
        (b"\xff\xfe\x00", "bad.yaml", "UTF-8"),
    ],
)
def test_a_malformed_file_is_refused_with_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, place: str, problem: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_bytes(content)
    with pytest.raises(ConfigurationError) as caught:
        load_config("bad.yaml")
    assert caught.value.details["place"] == place
    assert problem in caught.value.details["problem"]


def test_a_directory_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be read"):
        load_config(tmp_path)


@pytest.mark.parametrize("override", ["trainer.max_steps", "=4", ""])
def test_a_flag_without_key_or_value_is_a_mistake_of_usage(file: Path, override: str) -> None:
    with pytest.raises(UsageError):
        load(file, override)


def test_a_flag_that_is_not_yaml_is_refused(file: Path) -> None:
    assert "flag (trainer.seed)" in refused(file, "trainer.seed=[1").message


def test_a_stored_configuration_is_the_same_again(file: Path) -> None:
    config = load(file, "guard.accept_changes=[optimizer]").config
    stored = json.loads(json.dumps(config.to_dict()))
    assert TrainConfig.from_dict(stored, place="run.json") == config
    changed = TrainConfig.from_dict(stored, place="run.json", guard__resume="must")
    assert changed.guard.resume == "must"
    assert changed.trainer == config.trainer


def test_a_stored_configuration_that_was_damaged_is_refused(file: Path) -> None:
    stored = load(file).config.to_dict()
    stored["trainer"]["max_steps"] = "many"
    with pytest.raises(InvalidSettingError, match=r"run\.json"):
        TrainConfig.from_dict(stored, place="run.json")


def test_the_resolved_configuration_is_strict_json(file: Path) -> None:
    document = load(file, "trainer.seed=3").to_dict()
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert document["config"]["trainer"]["seed"] == 3
    assert document["provenance"]["trainer.seed"] == "flag"


@settings(deadline=None, max_examples=60)
@given(
    key=st.sampled_from(["trainer.max_steps", "trainer.learning_rate", "data.train", "model.mode", "guard", "x"]),
    text=st.text(alphabet="ab1.-e[]{}:,' \n#&*!", max_size=12),
)
def test_any_flag_gives_a_configuration_or_a_typed_error(
    tmp_path_factory: pytest.TempPathFactory, key: str, text: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(MINIMAL)
    try:
        resolved = load_config(path, [f"{key}={text}"], {})
    except WardenError as raised:
        error = raised
    else:
        assert math.isfinite(resolved.config.trainer.learning_rate)
        assert resolved.config.trainer.max_steps >= 1
        return
    assert error.exit_code in (64, 78)
    assert json.dumps(error.to_dict(), allow_nan=False)
