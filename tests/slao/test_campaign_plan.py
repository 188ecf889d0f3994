"""What a campaign does next, over everything that can be recorded; and when a merge may stand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainwarden.errors import ResumeMismatchError, WardenError, registry
from trainwarden.slao import Record
from trainwarden.slao.campaign_plan import (
    Attempt,
    Facts,
    Failure,
    Finish,
    Forgetting,
    Merge,
    Stop,
    Train,
    differences,
    forgetting,
    lies_in_task,
    merged_sources,
    mismatches,
    next_action,
    regressed,
)

SETTINGS = {name: {"trainer.max_steps": 3} for name in "abc"}
FAILURE = Failure("RUNTIME_NAN_LOSS", "not finite", 80)


def attempt(number: int = 1, started_from: str | None = None, failure: Failure | None = None) -> Attempt:
    return Attempt(number, started_from, SETTINGS["a"], failure=failure)


def test_the_first_task_that_is_not_merged_is_trained_and_then_merged() -> None:
    assert next_action(SETTINGS, Facts(), "stop") == Train("a", 1)
    facts = Facts({"a": attempt()})
    assert next_action(SETTINGS, facts, "stop") == Train("a", 1), "what was begun is gone on with"
    facts = replace(facts, trained=frozenset("a"))
    assert next_action(SETTINGS, facts, "stop") == Merge("a")
    facts = replace(facts, merged=frozenset("a"), head="A")
    assert next_action(SETTINGS, facts, "stop") == Train("b", 1)
    assert next_action(SETTINGS, Facts(merged=frozenset("abc")), "stop") == Finish()


def test_a_failure_stops_or_is_passed_over_as_told() -> None:
    facts = Facts({"a": attempt(failure=FAILURE)}, failed=frozenset("a"))
    assert next_action(SETTINGS, facts, "stop") == Stop("a")
    assert next_action(SETTINGS, facts, "continue") == Train("b", 1)
    every = replace(facts, failed=frozenset("abc"))
    assert next_action(SETTINGS, every, "continue") == Finish()


def test_an_earlier_failure_is_tried_again_where_it_stopped_unless_its_settings_changed() -> None:
    facts = Facts({"a": attempt(failure=FAILURE)})
    assert next_action(SETTINGS, facts, "stop") == Train("a", 1)
    assert next_action(SETTINGS, replace(facts, trained=frozenset("a")), "stop") == Merge("a")
    changed = {**SETTINGS, "a": {"trainer.max_steps": 2}}
    assert next_action(changed, replace(facts, trained=frozenset("a")), "stop") == Train("a", 2)
    begun = Facts({"a": attempt()})
    assert next_action(changed, begun, "stop") == Train("a", 1), "its own guard compares, and refuses or accepts"


@pytest.mark.parametrize("trained", [frozenset(), frozenset("b")])
def test_a_training_that_began_from_another_adapter_is_begun_anew(trained: frozenset[str]) -> None:
    facts = Facts({"b": attempt(3, "A")}, merged=frozenset("ac"), trained=trained, head="C")
    assert next_action(SETTINGS, facts, "stop") == Train("b", 4)


class World:
    """A disk on which a campaign is run: every action succeeds, fails or is killed, as drawn."""

    def __init__(self) -> None:
        self.attempts: dict[str, Attempt] = {}
        self.merged: list[str] = []
        self.trained: set[str] = set()
        self.failed: set[str] = set()
        self.trainings: list[tuple[str, int]] = []

    def facts(self) -> Facts:
        head = self.merged[-1] if self.merged else None
        return Facts(dict(self.attempts), frozenset(self.merged), frozenset(self.trained), head, frozenset(self.failed))

    def train(self, action: Train, outcome: str) -> None:
        known = self.attempts.get(action.task)
        if known is None or known.number != action.attempt:
            assert action.attempt == (known.number + 1 if known else 1)
            head = self.facts().head
            self.attempts[action.task] = Attempt(action.attempt, head, SETTINGS[action.task])
            self.trained.discard(action.task)
        assert self.attempts[action.task].started_from == self.facts().head
        if outcome == "ok":
            self.trained.add(action.task)
            self.trainings.append((action.task, action.attempt))
        self._settle(action.task, outcome)

    def merge(self, action: Merge, outcome: str) -> None:
        assert action.task in self.trained
        assert self.attempts[action.task].started_from == self.facts().head
        if outcome == "ok":
            self.merged.append(action.task)
        self._settle(action.task, outcome)

    def _settle(self, task: str, outcome: str) -> None:
        failure = FAILURE if outcome == "fails" else None
        self.attempts[task] = replace(self.attempts[task], failure=failure)
        if failure:
            self.failed.add(task)


@settings(max_examples=150)
@given(data=st.data(), on_failure=st.sampled_from(["stop", "continue"]))
def test_whatever_happens_nothing_finished_is_done_twice_and_it_ends(data: st.DataObject, on_failure: str) -> None:
    world = World()
    for start in range(6):
        troubled = start < 5  # the last start meets no trouble
        world.failed.clear()
        for _ in range(20):
            action = next_action(SETTINGS, world.facts(), on_failure)  # type: ignore[arg-type]
            if isinstance(action, Finish | Stop):
                break
            assert action.task not in world.merged
            assert action.task not in world.failed
            outcome = data.draw(st.sampled_from(["ok", "ok", "fails", "killed"])) if troubled else "ok"
            (world.train if isinstance(action, Train) else world.merge)(action, outcome)  # type: ignore[arg-type]
            if outcome == "killed":
                break
        else:
            raise AssertionError("it did not come to an end")
    assert sorted(world.merged) == ["a", "b", "c"]
    assert len(set(world.trainings)) == len(world.trainings), "each attempt is trained to its end once"


@pytest.mark.parametrize("condition", registry().values(), ids=registry())
def test_a_failure_lies_in_the_task_or_meets_every_task_alike(condition: type[WardenError]) -> None:
    machine = {64, 69, 74, 75, 77, 82, 84, 85, 86, 93}
    error = condition.__new__(condition)
    expected = condition.exit_code not in machine and not issubclass(condition, ResumeMismatchError)
    assert lies_in_task(error) is expected


# -- what is in the accumulator ---------------------------------------------------------------------------------------


def record(sequence: int, action: str, source: str) -> Record:
    return Record(sequence, action, 1, 1.0, "slao", "inverse", source, "d", True, None, {}, "now")  # type: ignore[arg-type]


def test_the_history_says_which_tasks_are_in_the_accumulator_through_every_rollback() -> None:
    history = [record(1, "start", "a"), record(2, "merge", "b"), record(3, "merge", "c")]
    assert merged_sources(history) == ("a", "b", "c")
    history.append(record(4, "rollback", "snapshot 2"))
    assert merged_sources(history) == ("a", "b")
    history.append(record(5, "merge", "d"))
    assert merged_sources(history) == ("a", "b", "d")
    history += [record(6, "rollback", "snapshot 4"), record(7, "rollback", "snapshot 3")]
    assert merged_sources(history) == ("a", "b", "c")
    assert merged_sources([*history, record(8, "start", "z")]) == ("z",)
    assert merged_sources([*history, record(8, "rollback", "snapshot 99")]) == ()
    assert merged_sources([]) == ()


# -- settings that changed --------------------------------------------------------------------------------------------


def test_only_what_is_done_and_would_come_out_differently_is_a_mismatch() -> None:
    facts = Facts(
        {"a": attempt(), "b": attempt(), "c": attempt(failure=FAILURE), "gone": attempt()},
        merged=frozenset(["a", "gone"]),
        trained=frozenset("bc"),
    )
    now = {name: {"trainer.max_steps": 9, "trainer.seed": 1} for name in "abc"}
    accepted = {name: ["seed"] for name in "abc"}
    steps = {"saved": 3, "now": 9}
    assert mismatches(now, facts, accepted) == {
        "tasks.a.trainer.max_steps": steps,
        "tasks.b.trainer.max_steps": steps,
        "tasks.gone": {"saved": "merged", "now": None},
    }
    every = {name: ["seed", "max_steps"] for name in "abc"}
    assert list(mismatches(now, facts, every)) == ["tasks.gone"]
    assert mismatches({**SETTINGS, "gone": SETTINGS["a"]}, facts, {**accepted, "gone": []}) == {}


def test_differences_tell_both_sides() -> None:
    assert differences({"x": 1, "y": 2}, {"y": 3, "z": 4}) == {
        "x": {"saved": 1, "now": None},
        "y": {"saved": 2, "now": 3},
        "z": {"saved": None, "now": 4},
    }
    assert differences({"x": 1}, {"x": 1}) == {}


# -- the gate ---------------------------------------------------------------------------------------------------------


def test_forgetting_is_told_from_the_lowest_loss_that_a_task_ever_had() -> None:
    before = [{"a": 2.0}, {"a": 1.5, "b": 3.0}]
    assert forgetting(before, {"a": 1.75, "b": 3.125, "c": 9.0}, "c") == Forgetting("a", 0.25)
    assert forgetting(before, {"a": 1.0, "b": 2.75, "c": 9.0}, "c") == Forgetting("b", -0.25)
    assert forgetting([], {"a": 2.0}, "a") is None
    assert forgetting([{}], {"a": 2.0, "b": 1.0}, "b") is None, "an earlier task without an earlier loss tells nothing"


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_the_worst(loss: float) -> None:
    found = forgetting([{"a": 1.0, "b": 1.0}], {"a": 5.0, "b": loss, "c": 1.0}, "c")
    assert found is not None
    assert found.task == "b"
    assert math.isnan(found.rise_nats)
    assert regressed(found, 1e9)
    assert not regressed(found, None)


@given(rise=st.floats(-10, 10), limit=st.floats(0, 10))
def test_the_gate_holds_back_what_rises_above_its_limit_and_nothing_else(rise: float, limit: float) -> None:
    assert regressed(Forgetting("a", rise), limit) is (rise > limit)
    assert not regressed(Forgetting("a", rise), None)
    assert not regressed(None, limit)
