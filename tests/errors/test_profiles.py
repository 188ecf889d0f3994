"""Which status a process ends with, in our own table and in those of others."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainwarden.errors import (
    EXIT_STATUSES,
    ExitProfile,
    GPUMemoryError,
    InternalError,
    Retry,
    TrainingAbortedError,
    UsageError,
    exit_status,
    lookup,
    registry,
    resolve_profile,
)
from trainwarden.errors.exits import FORCED_INTERRUPT_STATUSES
from trainwarden.errors.profiles import _BY_CODE, _BY_FAMILY
from trainwarden.errors.registry import FAMILY_PREFIXES, SEED_NAMED_CODES

DESIGN_TABLE = [0, 64, 65, 66, 69, 70, 74, 75, 77, 78, 80, 81, 82, 83, 84, 85, 86, 93]


def test_the_exit_table_is_that_of_the_design() -> None:
    assert list(EXIT_STATUSES) == DESIGN_TABLE
    assert not set(FORCED_INTERRUPT_STATUSES) & set(EXIT_STATUSES)


def test_only_a_clean_stop_is_continued_without_counting_as_a_failure() -> None:
    continued = {status for status, row in EXIT_STATUSES.items() if row.restart == "continue"}
    assert continued == {75}
    resumable = {condition.exit_code for condition in registry().values() if condition.retry is Retry.RESUME}
    assert resumable <= continued


@pytest.mark.parametrize("condition", registry().values(), ids=registry())
@pytest.mark.parametrize("profile", ExitProfile)
def test_every_code_has_a_status_in_every_profile(condition: type, profile: ExitProfile) -> None:
    assert 1 <= exit_status(condition, profile) <= 255


@pytest.mark.parametrize("profile", [ExitProfile.BACKPROPAGATE, ExitProfile.GENOLEWM])
def test_a_foreign_profile_covers_every_family_that_a_code_may_have(profile: ExitProfile) -> None:
    families = {*FAMILY_PREFIXES, *(code.partition("_")[0] + "_" for code in SEED_NAMED_CODES)}
    assert set(_BY_FAMILY[profile]) == families
    assert set(_BY_CODE[profile]) <= set(registry())


@pytest.mark.parametrize(
    ("code", "warden", "backpropagate", "genolewm"),
    [
        ("INPUT_VALIDATION_FAILED", 64, 1, 2),
        ("INPUT_DATASET_PARSE_FAILED", 65, 1, 2),
        ("CONFIG_INVALID_SETTING", 78, 1, 3),
        ("DEP_MODEL_LOAD_FAILED", 69, 2, 4),
        ("RUNTIME_TRAINING_FAILED", 70, 2, 5),
        ("RUNTIME_TRAINING_ABORTED", 75, 2, 130),
        ("RUNTIME_GPU_OOM", 81, 137, 4),
        ("RUNTIME_NAN_LOSS", 80, 2, 5),
        ("RUNTIME_DISK_FULL", 74, 2, 4),
        ("STATE_CHECKPOINT_INVALID", 74, 2, 4),
        ("RUNTIME_EVAL_GATE_REGRESSED", 83, 65, 6),
        ("PARTIAL_BATCH_OPERATION", 85, 3, 5),
        ("INTERNAL_ERROR", 70, 2, 9),
    ],
)
def test_the_tables_of_the_seed_documents(code: str, warden: int, backpropagate: int, genolewm: int) -> None:
    condition = lookup(code)
    assert exit_status(condition) == exit_status(condition, "warden") == warden
    assert exit_status(condition, ExitProfile.BACKPROPAGATE) == backpropagate
    assert exit_status(condition, "genolewm") == genolewm


def test_an_instance_has_the_status_of_its_class() -> None:
    assert exit_status(GPUMemoryError(phase="load")) == exit_status(GPUMemoryError) == 81


@pytest.mark.parametrize("profile", ExitProfile)
def test_what_is_not_ours_counts_as_our_bug_and_a_bare_interrupt_as_forced(profile: ExitProfile) -> None:
    assert exit_status(ZeroDivisionError(), profile) == exit_status(InternalError, profile)
    assert exit_status(KeyboardInterrupt(), profile) == 130


def test_the_flag_wins_over_the_environment_and_the_environment_over_the_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert resolve_profile(None) is ExitProfile.WARDEN
    monkeypatch.setenv("WARDEN_EXIT_PROFILE", "Genolewm ")
    assert resolve_profile(None) is ExitProfile.GENOLEWM
    assert resolve_profile("backpropagate") is ExitProfile.BACKPROPAGATE
    monkeypatch.setenv("WARDEN_EXIT_PROFILE", "")
    assert resolve_profile(None) is ExitProfile.WARDEN


def test_an_unknown_profile_is_refused_with_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError) as caught:
        resolve_profile("slurm")
    assert caught.value.message == "unknown exit profile 'slurm'; known are warden, backpropagate, genolewm"
    monkeypatch.setenv("WARDEN_EXIT_PROFILE", "slurm")
    with pytest.raises(UsageError, match="'slurm' in WARDEN_EXIT_PROFILE"):
        resolve_profile(None)


@given(st.text())
def test_a_profile_name_is_known_or_refused_and_nothing_else(name: str) -> None:
    if name.strip().lower() in list(ExitProfile):
        assert resolve_profile(name) == name.strip().lower()
    else:
        with pytest.raises(UsageError, match="unknown exit profile"):
            resolve_profile(name)


def test_the_profile_of_the_environment_does_not_change_what_an_error_says_of_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WARDEN_EXIT_PROFILE", "genolewm")
    error = TrainingAbortedError(reason="SIGTERM")
    assert (error.exit_code, error.to_dict()["exit_code"], exit_status(error)) == (75, 75, 75)
