"""A campaign: each task a run of its own, merged one after the other, and every ending told by its status."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

from trainwarden import slao
from trainwarden.errors import (
    DatasetParseError,
    DatasetValidationError,
    EvalRegressionError,
    InvalidSettingError,
    NaNLossError,
    PartialBatchError,
    ResumeMismatchError,
    RunLockedError,
    SLAOError,
    TrainingAbortedError,
)
from trainwarden.events import Event, StepCompleted
from trainwarden.runs import Ledger
from trainwarden.runs.lock import DirectoryLock
from trainwarden.slao import campaign as campaign_module
from trainwarden.slao.campaign import Campaign
from trainwarden.slao.campaign_result import CampaignResult

from .adapters import same
from .campaigns import NAN, TWO, Told, accumulator, loaded, merged_tasks, run

pytestmark = pytest.mark.usefixtures("campaign")


def states(result: CampaignResult) -> list[str]:
    return [task.state for task in result.tasks]


def test_three_tasks_become_one_adapter_that_plain_peft_loads() -> None:
    told = Told()
    result = run(observers=[told])
    assert states(result) == ["merged"] * 3
    assert told.steps_trained() == 9
    assert [task.weight for task in result.tasks] == [1.0, pytest.approx(2**-0.5), pytest.approx(3**-0.5)]
    assert [sorted(task.losses or {}) for task in result.tasks] == [["a"], ["a", "b"], ["a", "b", "c"]]
    snapshot = slao.SlaoStore(result.merged_path).current()
    assert snapshot is not None
    assert [record.recorded_lineage for record in snapshot.history] == [False, True, True]
    exported = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained("base"), result.merged_path)
    held = {k.replace(".default", ""): v for k, v in exported.state_dict().items() if "lora_" in k}
    assert same(held, snapshot.exported())
    assert json.loads(json.dumps(result.to_dict()))["tasks"][2]["snapshot"] == 3


def test_the_merge_is_that_of_the_adapters_which_the_runs_left() -> None:
    result = run()
    adapters = [slao.read_adapter(Path(str(task.run_dir)) / "model").tensors for task in result.tasks]
    expected = slao.begin(adapters[0]).tensors
    for index, adapter in enumerate(adapters[1:], start=2):
        expected = slao.merge(expected, adapter, index).tensors
    assert same(accumulator(), expected)


def test_each_task_starts_orthogonally_from_the_last_adapter_as_it_was_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[dict[str, torch.Tensor]] = []
    real = campaign_module.next_start

    def seen(store: slao.SlaoStore, model: Any) -> slao.Start | None:
        start = real(store, model)
        begun.append(dict(slao.adapter_of(model).tensors))
        return start

    monkeypatch.setattr(campaign_module, "next_start", seen)
    result = run(TWO)
    first = slao.read_adapter(Path(str(result.tasks[0].run_dir)) / "model").tensors
    assert same(begun[1], slao.init_adapter(first))


def test_each_training_is_an_ordinary_run_that_the_campaigns_command_continues() -> None:
    Campaign(loaded(TWO), observers=(), command="warden slao run campaign.yaml").run()
    rows = Ledger().rows(10)
    assert {Path(row.path).name for row in rows} == {"a", "b"}
    assert {row.status for row in rows} == {"finished"}
    assert {row.command_line for row in rows} == {"warden slao run campaign.yaml"}
    assert json.loads(Path("campaign/tasks/a/run.json").read_text())["config"] is None


def test_a_finished_campaign_trains_and_writes_nothing_more() -> None:
    first = run(TWO)
    before = accumulator()
    told = Told()
    assert run(TWO, observers=[told]) == first
    assert told.events == []
    assert same(accumulator(), before)


def test_a_task_that_is_added_at_the_end_is_all_that_is_done() -> None:
    run(TWO)
    told = Told()
    assert states(run(observers=[told])) == ["merged"] * 3
    assert told.steps_trained() == 3


# -- failures -------------------------------------------------------------------------------------------------------


def test_a_failed_task_stops_the_campaign_with_its_own_error() -> None:
    with pytest.raises(NaNLossError) as caught:
        Campaign(loaded(NAN), observers=(), command="warden slao run campaign.yaml").run()
    assert caught.value.exit_code == 80
    assert caught.value.resume_command == "warden slao run campaign.yaml"
    assert merged_tasks() == ["a"]
    assert states(Campaign(loaded(NAN), observers=()).result())[0] == "merged"


def test_told_to_continue_the_others_are_merged_and_the_failures_listed() -> None:
    Path("c.jsonl").write_text('{"text": 3}\n')
    with pytest.raises(PartialBatchError) as caught:
        run("on_failure=continue", NAN)
    error = caught.value
    assert (error.exit_code, error.failed_count, error.total, error.success_percent) == (85, 2, 3, 33)
    assert error.done == ["a"]
    assert [(one["task"], one["code"]) for one in error.details["failed"]] == [  # type: ignore[union-attr, index, call-overload]
        ("b", "RUNTIME_NAN_LOSS"),
        ("c", "INPUT_DATASET_VALIDATION_FAILED"),
    ]
    assert "b (RUNTIME_NAN_LOSS), c (INPUT_DATASET_VALIDATION_FAILED)" in error.message
    assert merged_tasks() == ["a"]


def test_when_all_fail_it_ends_with_the_first_failure_itself() -> None:
    Path("a.jsonl").write_text('{"text": 3}\n')
    Path("b.jsonl").unlink()
    with pytest.raises(DatasetValidationError) as caught:
        run("on_failure=continue", TWO)
    assert caught.value.exit_code == 65
    assert not Path("campaign/merged").exists()


def test_the_same_command_tries_what_failed_again_and_only_that() -> None:
    bad = Path("b.jsonl").read_text()
    Path("b.jsonl").write_text('{"text": 3}\n')
    with pytest.raises(PartialBatchError):
        run("on_failure=continue")
    Path("b.jsonl").write_text(bad)
    told = Told()
    result = run("on_failure=continue", observers=[told])
    assert states(result) == ["merged"] * 3
    assert merged_tasks() == ["a", "c", "b"]
    assert told.steps_trained() == 3
    assert result.tasks[1].attempt == 2, "it has to begin from the adapter of c, which was merged meanwhile"
    assert Path(str(result.tasks[1].run_dir)).name == "b.2"


def test_a_failure_under_other_settings_is_begun_anew_without_its_old_checkpoint() -> None:
    with pytest.raises(NaNLossError):
        run(TWO, NAN)
    result = run(TWO)
    assert [(task.state, task.attempt) for task in result.tasks] == [("merged", 1), ("merged", 2)]


def test_a_failure_that_lies_in_no_task_ends_the_campaign_whatever_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(*_: object, **__: object) -> None:
        raise RunLockedError(path="tasks/b", pid=1)

    real = Campaign._train
    trains = lambda self, task, number: busy() if task == "b" else real(self, task, number)  # noqa: E731
    monkeypatch.setattr(Campaign, "_train", trains)
    with pytest.raises(RunLockedError):
        run("on_failure=continue")
    monkeypatch.undo()


def test_two_processes_do_not_run_one_campaign() -> None:
    Path("campaign").mkdir()
    lock = DirectoryLock(Path("campaign/.lock"))
    with pytest.raises(RunLockedError):
        run()
    lock.close()


def test_it_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InvalidSettingError, match="a campaign is one process"):
        run()
    assert not Path("campaign").exists()


def test_one_campaign_object_can_be_run_again_and_tries_again() -> None:
    good = Path("b.jsonl").read_text()
    Path("b.jsonl").write_text("{")
    campaign = Campaign(loaded(TWO), observers=())
    with pytest.raises(DatasetParseError):
        campaign.run()
    assert states(campaign.result()) == ["merged", "failed"]
    assert campaign.result().status == "unfinished"
    Path("b.jsonl").write_text(good)
    assert campaign.run().status == "finished"


# -- the gate -------------------------------------------------------------------------------------------------------


def test_a_merge_that_forgets_too_much_is_taken_back_and_recorded() -> None:
    with pytest.raises(EvalRegressionError) as caught:
        run(TWO, "gate.max_forgetting_nats=0.0")
    error = caught.value
    assert (error.exit_code, error.task, error.regressed) == (83, "b", "a")
    assert error.rise_nats > 0
    assert set(error.losses) == {"a", "b"}
    assert merged_tasks() == ["a"]
    first = slao.read_adapter("campaign/tasks/a/model").tensors
    assert same(slao.read_adapter("campaign/merged").tensors, first), "the export is that of task a"
    told = Told()
    with pytest.raises(EvalRegressionError):
        run(TWO, "gate.max_forgetting_nats=0.0", observers=[told])
    assert told.steps_trained() == 0, "neither trained nor evaluated again"


def test_a_gate_that_allows_more_lets_the_very_same_adapter_pass() -> None:
    with pytest.raises(EvalRegressionError):
        run(TWO, "gate.max_forgetting_nats=0.0")
    told = Told()
    assert states(run(TWO, "gate.max_forgetting_nats=100.0", observers=[told])) == ["merged"] * 2
    assert told.steps_trained() == 0


def test_what_the_gate_holds_back_is_partial_success_when_told_to_continue() -> None:
    with pytest.raises(PartialBatchError) as caught:
        run(TWO, "gate.max_forgetting_nats=0.0", "on_failure=continue")
    assert "b (RUNTIME_EVAL_GATE_REGRESSED)" in caught.value.message


# -- stopped, and gone on with ----------------------------------------------------------------------------------------


def stopping_at(task: str, step: int) -> Any:
    """An observer that sends SIGTERM in that step of that task."""
    place: list[str] = []

    def observe(event: Event) -> None:
        if event.name == "run_started":
            place[:] = [Path(event.run_dir).name]  # type: ignore[attr-defined]
        if isinstance(event, StepCompleted) and event.step == step and place == [task]:
            os.kill(os.getpid(), signal.SIGTERM)

    return observe


def test_a_stop_in_a_training_is_resumable_and_the_result_the_same() -> None:
    run(TWO, "output_dir=undisturbed")
    with pytest.raises(TrainingAbortedError) as caught:
        run(TWO, observers=[stopping_at("b", 2)])
    assert (caught.value.exit_code, caught.value.steps_completed) == (75, 2)
    assert merged_tasks() == ["a"]
    told = Told()
    assert states(run(TWO, observers=[told])) == ["merged"] * 2
    assert told.steps_trained() == 1
    assert same(accumulator(), accumulator("undisturbed"))


def test_a_stop_while_a_training_is_prepared_ends_it_before_its_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    real = campaign_module.trainer_from_config

    def asked_to_stop(*arguments: Any, **changes: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments, **changes)

    told = Told()
    monkeypatch.setattr(campaign_module, "trainer_from_config", asked_to_stop)
    with pytest.raises(TrainingAbortedError) as caught:
        run(TWO, observers=[told])
    assert caught.value.exit_code == 75
    assert told.steps_trained() == 0


def test_a_stop_between_preparation_and_the_first_step_is_handed_to_the_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    real = campaign_module.next_start

    def asked_to_stop(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(campaign_module, "next_start", asked_to_stop)
        with pytest.raises(TrainingAbortedError) as caught:
            run(TWO)
    assert caught.value.steps_completed in (1, 2)
    assert caught.value.checkpoint_path is not None
    assert states(run(TWO)) == ["merged"] * 2


def test_a_stop_during_a_merge_lets_it_come_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGTERM)
        return {"a": 1.0}

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(campaign_module, "held_out_losses", stopped)
    with pytest.raises(TrainingAbortedError) as caught:
        run(TWO)
    assert caught.value.details["reason"] == "SIGTERM"
    assert merged_tasks() == ["a"]
    assert signal.getsignal(signal.SIGTERM) == before


def test_after_a_rollback_the_task_is_merged_again_without_being_trained_again() -> None:
    run()
    before = accumulator()
    slao.SlaoStore("campaign/merged").rollback(1)
    told = Told()
    assert states(run(observers=[told])) == ["merged"] * 3
    assert told.steps_trained() == 0
    assert same(accumulator(), before)


def test_other_settings_for_what_is_done_are_refused_unless_accepted() -> None:
    run(TWO)
    with pytest.raises(ResumeMismatchError) as caught:
        run(TWO, "tasks.a.trainer.max_steps=2", "merge.schedule=inverse")
    assert caught.value.differences == {
        "tasks.a.trainer.max_steps": {"saved": 3, "now": 2},
        "merge.schedule": {"saved": "inverse_sqrt", "now": "inverse"},
    }
    accepted = ["tasks.a.trainer.max_steps=2", "guard.accept_changes=[max_steps]"]
    assert states(run(TWO, *accepted)) == ["merged"] * 2
    with pytest.raises(ResumeMismatchError, match="tasks.b"):
        run("tasks.b=null")


def test_a_training_that_is_gone_on_with_under_other_settings_is_refused_by_its_guard() -> None:
    with pytest.raises(TrainingAbortedError):
        run(TWO, observers=[stopping_at("a", 1)])
    with pytest.raises(ResumeMismatchError, match="initial_lr"):
        run(TWO, "trainer.learning_rate=1e-3", "on_failure=continue")
    assert states(run(TWO)) == ["merged"] * 2


def test_an_accumulator_that_changed_while_a_task_was_prepared_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(campaign_module, "next_start", lambda store, model: slao.Start(2, "another"))
    with pytest.raises(SLAOError, match="the accumulator was changed"):
        run(TWO)
