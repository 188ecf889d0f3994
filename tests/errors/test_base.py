"""What every error carries, and what it survives."""

from __future__ import annotations

import copy
import json
import math
import pickle
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainwarden.errors import (
    CheckpointError,
    DatasetNotFoundError,
    GPUMemoryError,
    InputError,
    NaNLossError,
    Retry,
    TrainingAbortedError,
    TrainingError,
    WardenError,
    registry,
)


def test_the_message_is_the_template_filled_from_the_details() -> None:
    error = NaNLossError(streak=5, skipped=7, what="loss")
    assert error.message == "the loss was not finite for 5 steps in a row (7 skipped in all)"
    assert error.details == {"streak": 5, "skipped": 7, "what": "loss"}


def test_the_text_of_an_error_begins_with_its_code() -> None:
    assert str(DatasetNotFoundError(path="a.jsonl")) == "[INPUT_DATASET_NOT_FOUND] there is no data set at a.jsonl"


def test_a_declared_detail_reads_as_an_attribute_and_is_none_when_it_was_not_given() -> None:
    error = GPUMemoryError(phase="backward", micro_batch_size=1)
    assert (error.phase, error.micro_batch_size, error.free_bytes) == ("backward", 1, None)
    with pytest.raises(AttributeError, match="no attribute 'color'"):
        error.color  # type: ignore[attr-defined]  # noqa: B018


def test_a_missing_detail_makes_the_message_vague_and_never_fails() -> None:
    assert DatasetNotFoundError().message == "there is no data set at unknown"
    assert GPUMemoryError(phase="load").message == "memory ran out in load"


def test_a_suggestion_of_this_case_replaces_the_general_one() -> None:
    assert TrainingError(problem="x", suggestion="Read line 3.").suggestion == "Read line 3."
    assert TrainingError(problem="x").suggestion == TrainingError.suggestion


def test_retryable_follows_from_the_retry_policy() -> None:
    policies = {condition.retry: condition(problem="x").retryable for condition in registry().values()}
    assert policies == {
        Retry.NEVER: False,
        Retry.AFTER_CHANGE: False,
        Retry.BACKOFF: True,
        Retry.AFTER_COOLDOWN: True,
        Retry.RESUME: True,
    }


def test_add_context_fills_only_what_is_unknown() -> None:
    error = TrainingAbortedError(reason="SIGINT", steps_completed=3)
    same = error.add_context(run_id="r", steps_completed=9, checkpoint_path=Path("c"), resume_command="warden resume r")
    assert same is error
    assert (error.run_id, error.steps_completed, error.checkpoint_path) == ("r", 3, "c")
    error.add_context(run_id="other", resume_command="other")
    assert (error.run_id, error.resume_command) == ("r", "warden resume r")


def test_zero_completed_steps_are_known_and_not_overwritten() -> None:
    assert TrainingError(problem="x", steps_completed=0).add_context(steps_completed=4).steps_completed == 0


def test_a_family_cannot_be_raised() -> None:
    with pytest.raises(TypeError, match="family of errors"):
        InputError(problem="x")
    with pytest.raises(TypeError, match="family of errors"):
        WardenError()


def test_to_dict_holds_everything_that_a_program_needs() -> None:
    error = CheckpointError(operation="load", path="c/step-1", problem="torn", run_id="r", steps_completed=1)
    assert error.to_dict() == {
        "type": "CheckpointError",
        "code": "STATE_CHECKPOINT_INVALID",
        "message": "cannot load the checkpoint c/step-1: torn",
        "retryable": False,
        "retry": "after_change",
        "suggestion": CheckpointError.suggestion,
        "details": {"operation": "load", "path": "c/step-1", "problem": "torn"},
        "exit_code": 74,
        "http_status": 500,
        "run_id": "r",
        "steps_completed": 1,
        "checkpoint_path": None,
        "resume_command": None,
        "aliases": [],
        "cause": [],
    }


def _fail_in_three_layers() -> None:
    try:
        try:
            raise FileNotFoundError("model.safetensors")
        except FileNotFoundError as missing:
            raise CheckpointError(operation="load", path="c", problem="a file is missing") from missing
    except CheckpointError as broken:
        raise TrainingError(problem="no state") from broken


def test_the_chain_of_causes_is_written_nearest_first() -> None:
    with pytest.raises(TrainingError) as caught:
        _fail_in_three_layers()
    assert caught.value.to_dict()["cause"] == [
        {
            "type": "CheckpointError",
            "code": "STATE_CHECKPOINT_INVALID",
            "message": "cannot load the checkpoint c: a file is missing",
        },
        {"type": "FileNotFoundError", "message": "model.safetensors"},
    ]


def _fail_and_hide_why() -> None:
    try:
        raise KeyError("x")
    except KeyError:
        raise TrainingError(problem="y") from None


def test_raise_from_none_hides_the_context() -> None:
    with pytest.raises(TrainingError) as caught:
        _fail_and_hide_why()
    assert caught.value.to_dict()["cause"] == []


def test_a_foreign_cause_is_named_with_its_module() -> None:
    error = TrainingError(problem="x")
    error.__cause__ = json.JSONDecodeError("bad", "doc", 0)
    assert error.to_dict()["cause"][0]["type"] == "json.decoder.JSONDecodeError"


def test_a_cause_that_happens_to_have_a_code_of_its_own_is_not_taken_for_ours() -> None:
    error = TrainingError(problem="x")
    error.__cause__ = SystemExit(3)
    assert error.to_dict()["cause"] == [{"type": "SystemExit", "message": "3"}]


def test_a_circular_chain_of_causes_ends() -> None:
    first, second = TrainingError(problem="1"), TrainingError(problem="2")
    first.__cause__, second.__cause__ = second, first
    assert [link["message"] for link in first.to_dict()["cause"]] == ["training failed: 2"]


def test_a_cause_that_cannot_be_printed_does_not_hide_the_error() -> None:
    class SilentError(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no words")

    error = TrainingError(problem="x")
    error.__cause__ = SilentError()
    assert error.to_dict()["cause"][0]["message"] == "<unprintable SilentError>"


def _example(condition: type[WardenError]) -> WardenError:
    details = dict.fromkeys(condition.fields, "x")
    return condition(**details, run_id="r", steps_completed=3, suggestion="s", resume_command="warden resume r")


@pytest.mark.parametrize("condition", registry().values(), ids=registry())
@pytest.mark.parametrize(
    "duplicate",
    [lambda e: pickle.loads(pickle.dumps(e)), copy.copy, copy.deepcopy],
    ids=["pickle", "copy", "deepcopy"],
)
def test_every_error_survives_pickling_and_copying(
    condition: type[WardenError], duplicate: Callable[[WardenError], WardenError]
) -> None:
    error = _example(condition)
    other = duplicate(error)
    assert type(other) is condition
    assert (other.to_dict(), str(other), other.args) == (error.to_dict(), str(error), error.args)


def test_the_causes_are_remembered_where_the_exceptions_themselves_cannot_travel() -> None:
    error = TrainingError(problem="x")
    error.__cause__ = ValueError("why")
    error.__cause__.trap = lambda: None  # type: ignore[attr-defined]  # makes the cause unpicklable
    error.add_note("seen on rank 3")
    other = pickle.loads(pickle.dumps(error))
    assert other.to_dict()["cause"] == [{"type": "ValueError", "message": "why"}]
    assert other.__notes__ == ["seen on rank 3"]


def _fail_in_child() -> None:
    raise GPUMemoryError(phase="forward", micro_batch_size=2, shrinks=1, steps_completed=12)


def test_an_error_raised_in_another_process_arrives_whole() -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        error = pool.submit(_fail_in_child).exception()
    assert isinstance(error, GPUMemoryError)
    assert (error.details["micro_batch_size"], error.steps_completed, error.exit_code) == (2, 12, 81)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@given(value=JSON_VALUES | st.binary() | st.sets(st.integers()) | st.complex_numbers() | st.datetimes())
def test_whatever_an_error_is_raised_with_its_json_is_strict_json(value: object) -> None:
    error = TrainingError(problem=value, anything=value)

    def refuse(word: str) -> None:
        pytest.fail(f"{word} is not JSON")

    json.loads(error.to_json(), parse_constant=refuse)
    json.loads(error.to_json(indent=2).encode("ascii"))
    assert str(error)


def test_not_a_number_stays_visible_in_json() -> None:
    details = json.loads(TrainingError(problem="x", loss=math.nan, norm=[-math.inf]).to_json())["details"]
    assert (details["loss"], details["norm"]) == ("nan", ["-inf"])
