"""A campaign's file: one training for each task, and every mistake named with its place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainwarden.errors import ConfigNotFoundError, ConfigurationError, InvalidSettingError, UsageError, WardenError
from trainwarden.slao import MergePolicy
from trainwarden.slao.campaign_config import CampaignConfig, load_campaign

FILE = """\
output_dir: runs/campaign
model: {name_or_path: ./base, lora_rank: 4}
data: {eval_rows: 4}
trainer: {max_steps: 10, seed: 3}
tasks:
  first:
    data: {train: one.jsonl}
  second:
    data: {train: two.jsonl, eval_rows: 0, eval: held.jsonl}
    trainer: {max_steps: 20}
merge: {mode: ties, schedule: inverse, keep_last: 2}
gate: {max_forgetting_nats: 0.25}
on_failure: continue
"""


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "campaign.yaml").write_text(FILE)
    return tmp_path


def load(*overrides: str, **environ: str) -> CampaignConfig:
    return load_campaign("campaign.yaml", overrides, environ)


def test_each_task_is_a_training_of_its_own(work: Path) -> None:
    campaign = load()
    first, second = campaign.tasks
    assert campaign.output_dir == work / "runs" / "campaign"
    assert (first.name, first.config.output_dir) == ("first", str(work / "runs/campaign/tasks/first"))
    assert (first.config.trainer.max_steps, second.config.trainer.max_steps) == (10, 20)
    assert (first.config.trainer.seed, second.config.trainer.seed) == (3, 3)
    assert first.config.data.train == str(work / "one.jsonl")
    assert second.config.data.eval == str(work / "held.jsonl")
    assert first.config.model == second.config.model
    assert first.has_held_out_rows
    assert second.has_held_out_rows
    assert not load("data.eval_rows=0").tasks[0].has_held_out_rows


def test_the_merge_and_the_gate_are_those_of_the_file() -> None:
    campaign = load()
    assert campaign.policy == MergePolicy(mode="ties", schedule="inverse")
    assert (campaign.merge.keep_last, campaign.max_forgetting_nats, campaign.on_failure) == (2, 0.25, "continue")


def test_what_is_left_away_has_the_defaults_of_the_merge_policy(work: Path) -> None:
    (work / "campaign.yaml").write_text(FILE.partition("merge:")[0] + "merge:\ngate: {}\n")
    campaign = load()
    assert campaign.policy == MergePolicy()
    assert (campaign.max_forgetting_nats, campaign.on_failure) == (None, "stop")


def test_a_task_goes_before_all_tasks_and_flags_before_the_environment_before_the_file() -> None:
    def steps(*overrides: str, **environ: str) -> list[int]:
        return [task.config.trainer.max_steps for task in load(*overrides, **environ).tasks]

    assert steps("trainer.max_steps=5") == [5, 20]
    assert steps("tasks.second.trainer.max_steps=5") == [10, 5]
    assert steps(WARDEN_TASKS__SECOND__TRAINER__MAX_STEPS="7") == [10, 7]
    assert steps("tasks.second.trainer.max_steps=5", WARDEN_TASKS__SECOND__TRAINER__MAX_STEPS="7") == [10, 5]
    assert load(WARDEN_MERGE__MODE="slao").policy.mode == "slao"


def test_tasks_can_be_added_and_left_out_by_a_flag() -> None:
    assert [task.name for task in load("tasks.third.data.train=x.jsonl").tasks] == ["first", "second", "third"]
    assert [task.name for task in load("tasks.first=null").tasks] == ["second"]
    shared = load("data.train=all.jsonl", "tasks.third={}").tasks[2]
    assert Path(shared.config.data.train).name == "all.jsonl"


def test_every_setting_is_shown_once_with_where_it_comes_from(work: Path) -> None:
    campaign = load("trainer.batch_size=2")
    rows = {key: (value, source) for key, value, source in campaign.rows}
    assert len(rows) == len(campaign.rows)
    assert rows["trainer.batch_size"] == (2, "flag")
    assert rows["merge.mode"] == ("ties", "campaign.yaml:11")
    assert rows["merge.density"] == (0.5, "default")
    assert rows["on_failure"] == ("continue", "campaign.yaml:13")
    assert rows["tasks.first.trainer.max_steps"] == (10, "campaign.yaml:4")
    assert rows["tasks.second.trainer.max_steps"] == (20, "campaign.yaml:10")
    assert "trainer.max_steps" not in rows, "it is one for each task"
    assert json.loads(json.dumps(campaign.to_dict()))["provenance"]["merge.schedule"] == "campaign.yaml:11"


@pytest.mark.parametrize(
    ("override", "kind", "said"),
    [
        ("tasks.second.trainer.max_stesp=3", ConfigurationError, "did you mean trainer.max_steps?"),
        ("tasks.second.merge.mode=ties", ConfigurationError, "a task has settings in data, trainer, guard"),
        ("tasks.second.model.lora_rank=8", ConfigurationError, "everything else is one for all tasks"),
        ("tasks.second=3", ConfigurationError, "tasks.second is no mapping"),
        ("tasks=3", InvalidSettingError, "expected names of tasks"),
        ("tasks=null", ConfigurationError, "tasks is missing"),
        ("tasks.no name.data.train=x", ConfigurationError, "'no name' is no name for a task"),
        ("merge.densty=0.1", ConfigurationError, "unknown key 'merge.densty'; did you mean merge.density?"),
        ("merge.mode=median", InvalidSettingError, "merge.mode is median, expected 'slao', 'average'"),
        ("merge.density=0", InvalidSettingError, "merge.density is 0.0, expected a number above 0 and at most 1"),
        ("merge.seed=1.5", InvalidSettingError, "merge.seed is 1.5, expected a whole number"),
        ("merge.keep_last=0", InvalidSettingError, "merge.keep_last is 0, expected at least 1"),
        ("merge=3", InvalidSettingError, "merge is 3, expected keys with values"),
        ("gate.max_forgetting_nats=-1", InvalidSettingError, "a number from 0, or null for no gate"),
        ("gate.max_forgetting_nats=.nan", InvalidSettingError, "a number from 0, or null for no gate"),
        ("on_failure=retry", InvalidSettingError, "on_failure is retry, expected 'stop' or 'continue'"),
        ("on_failur=stop", ConfigurationError, "did you mean on_failure?"),
        ("zzz=1", ConfigurationError, "known here are data, gate"),
        ("model.mode=full", InvalidSettingError, "lora or qlora: what is merged are adapters"),
        ("guard.resume=never", InvalidSettingError, "give a new one another output_dir"),
        ("output_dir=3", InvalidSettingError, "output_dir is 3, expected a directory"),
        ("tasks.first.data.train=null", WardenError, "data.train"),
        ("trainer.max_steps", UsageError, "-o takes key=value"),
    ],
)
def test_every_mistake_is_named_with_its_place(override: str, kind: type[WardenError], said: str) -> None:
    with pytest.raises(kind) as caught:
        load(override)
    assert said in caught.value.message
    if kind is not UsageError:
        assert "flag" in caught.value.message or override.startswith(("tasks=null", "model.", "guard."))


def test_a_new_model_has_no_tokenizer_that_all_tasks_could_share() -> None:
    with pytest.raises(InvalidSettingError, match="model.name_or_path instead"):
        load("model.name_or_path=null", "model.config.model_type=llama")


def test_a_gate_needs_rows_to_tell_forgetting_by() -> None:
    none = ("data.eval_rows=0", "tasks.second.data.eval=null")
    with pytest.raises(InvalidSettingError, match="held-out rows"):
        load(*none)
    assert load(*none, "gate.max_forgetting_nats=null").max_forgetting_nats is None


def test_a_file_that_is_not_there_or_names_no_directory(work: Path) -> None:
    with pytest.raises(ConfigNotFoundError):
        load_campaign("nowhere.yaml", (), {})
    (work / "campaign.yaml").write_text(FILE.partition("\n")[2])
    with pytest.raises(ConfigurationError, match="output_dir is missing"):
        load()
