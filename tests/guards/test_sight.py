"""Not being able to see: told once, and a reason to stop only for those who ask for it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainwarden.errors import InvalidSettingError
from trainwarden.guards.sight import Blindness, SightAction, SightPolicy, SightState

SILENT = Blindness(reason="no reading for 6.1 s")
HICCUP = Blindness(reason="GPU 0 says nothing", tell_after_s=2.0)
ABSENT = Blindness(reason="no driver", final=True)
WARN = SightPolicy()
ABORT = SightPolicy(on_unreadable="abort")


def play(policy: SightPolicy, trace: list[Blindness | None], *, start_s: float = 0.0) -> list[tuple[int, SightAction]]:
    """One look a second."""
    state, told = SightState(), []
    for second, blindness in enumerate(trace):
        state, action = policy.step(state, blindness, start_s + second)
        if action is not None:
            told.append((second, action))
        if action == "abort":
            break
    return told


@pytest.mark.parametrize("start_s", [0.0, 1e6])
def test_silence_is_told_at_once_and_once_and_so_is_its_end(start_s: float) -> None:
    assert play(WARN, [None, *[SILENT] * 90, None, None], start_s=start_s) == [(1, "tell"), (91, "back")]


def test_a_hiccup_is_not_told() -> None:
    assert play(WARN, [None, HICCUP, HICCUP, None]) == []
    assert play(WARN, [None, HICCUP, HICCUP, HICCUP, None]) == [(3, "tell"), (4, "back")]


def test_a_run_that_may_not_be_blind_ends_after_the_time_of_grace() -> None:
    assert play(ABORT, [SILENT] * 90) == [(0, "tell"), (20, "abort")]


def test_a_run_that_may_not_be_blind_outlives_a_shorter_silence() -> None:
    assert play(ABORT, [*[SILENT] * 19, None] * 5) == [
        (place, action) for start in range(0, 100, 20) for place, action in ((start, "tell"), (start + 19, "back"))
    ]


def test_a_machine_without_a_device_is_told_once_or_ends_the_run_at_once() -> None:
    assert play(WARN, [ABSENT] * 90) == [(0, "tell")]
    assert play(ABORT, [ABSENT] * 90) == [(0, "abort")]


@given(st.lists(st.sampled_from([None, SILENT, HICCUP]), max_size=100))
def test_telling_and_taking_back_alternate(trace: list[Blindness | None]) -> None:
    told = [action for _, action in play(WARN, trace)]
    assert told == ["tell", "back"] * (len(told) // 2) + ["tell"] * (len(told) % 2)


@pytest.mark.parametrize("wrong", [{"on_unreadable": "ignore"}, {"grace_s": -1.0}])
def test_a_policy_that_makes_no_sense_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(InvalidSettingError):
        SightPolicy(**wrong)  # type: ignore[arg-type]
