"""The course of a run out of its log, and its curve in one line."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainwarden.report.history import BARS, BARS_ASCII, INTERVENTIONS, History, marks, sparkline


def event(name: str, step: int, **fields: Any) -> dict[str, Any]:
    return {"event": name, "step": step, **fields}


def logged(*pairs: tuple[int, Any]) -> list[dict[str, Any]]:
    return [event("metrics_logged", step, loss=loss) for step, loss in pairs]


def test_losses_are_read_in_order() -> None:
    history = History.read(logged((1, 5.0), (10, 4.0), (20, 3.0)))
    assert history.losses == [(1, 5.0), (10, 4.0), (20, 3.0)]
    assert history.last_step == 20


def test_a_nan_loss_is_nan_and_an_unknown_one_is_none() -> None:
    history = History.read(logged((1, "nan"), (2, None), (3, "words"), (4, 1.0)))
    assert [step for step, _ in history.losses] == [1, 4]
    assert math.isnan(history.losses[0][1])


def test_what_a_resume_took_back_is_forgotten() -> None:
    records = [
        *logged((10, 5.0), (20, 4.0), (30, 9.0)),
        event("resumed", 20),
        *logged((30, 3.0)),
    ]
    history = History.read(records)
    assert history.losses == [(10, 5.0), (20, 4.0), (30, 3.0)]
    assert history.interventions == [(20, "resumed")]


def test_interventions_and_checkpoints_are_kept() -> None:
    records = [
        event("run_started", 0),
        event("step_skipped", 3),
        event("step_skipped", 4),
        event("micro_batch_shrunk", 5),
        event("checkpoint_saved", 6, path="c/step-6"),
        event("checkpoint_saved", 8, path="c/step-8"),
        event("run_started", 0),
    ]
    history = History.read(records)
    assert history.counts() == {"step_skipped": 2, "micro_batch_shrunk": 1}
    assert history.checkpoint_path == "c/step-8"
    assert history.starts == 2


def test_the_names_are_those_of_events() -> None:
    from trainwarden import events

    kinds = [kind for kind in vars(events).values() if isinstance(kind, type) and issubclass(kind, events.Event)]
    names = {kind.name.fget(object.__new__(kind)) for kind in kinds}  # type: ignore[attr-defined]
    assert {*INTERVENTIONS, "metrics_logged", "checkpoint_saved", "run_started"} <= names


def test_what_the_hardware_did_to_the_run_is_marked_each_with_its_own_letter() -> None:
    records = [
        event("memory_pressure", 10),
        event("thermal_pause", 20),
        event("thermal_resume", 20),
        event("device_unhealthy", 30),
        event("sensors_silent", 40),
        event("sensors_back", 41),
    ]
    history = History.read(records)
    assert marks([(step, 1.0) for step in (10, 20, 30, 40)], history.interventions) == "pth?"
    assert history.counts() == {"thermal_pause": 1, "memory_pressure": 1, "device_unhealthy": 1, "sensors_silent": 1}
    assert len(set(INTERVENTIONS.values())) == len(INTERVENTIONS)


def test_a_falling_loss_is_a_falling_line() -> None:
    losses = [(step, 8.0 - step) for step in range(8)]
    assert sparkline(losses) == BARS[::-1]
    assert sparkline(losses, unicode=False) == BARS_ASCII[::-1]


def test_a_nan_is_marked_where_it_was_even_among_neighbours() -> None:
    losses = [(1, 1.0), (2, math.nan), (3, 2.0), (4, 2.0)]
    assert sparkline(losses) == "▁×██"
    assert sparkline(losses, width=2) == "×▁"


def test_a_constant_loss_is_a_flat_line() -> None:
    assert sparkline([(1, 3.0), (2, 3.0)]) == "▁▁"


def test_no_loss_is_no_line() -> None:
    assert sparkline([]) == ""
    assert marks([], [(1, "step_skipped")]) == ""


def test_marks_stand_under_the_step_they_belong_to() -> None:
    losses = [(step, 1.0) for step in (10, 20, 30, 40)]
    interventions = [(15, "step_skipped"), (20, "step_skipped"), (39, "micro_batch_shrunk"), (99, "resumed")]
    assert marks(losses, interventions) == " s *"


LOSSES = st.lists(st.tuples(st.integers(0, 10**6), st.floats()), max_size=200)


@given(LOSSES, st.integers(1, 80))
def test_any_losses_fit_into_the_width(losses: list[tuple[int, float]], width: int) -> None:
    line = sparkline(losses, width=width)
    assert len(line) == min(width, len(losses))
    assert set(line) <= {*BARS, "×"}


@given(st.lists(st.floats(-1e300, 1e300), min_size=2, max_size=60))
def test_the_lowest_and_the_highest_loss_get_the_lowest_and_the_highest_bar(values: list[float]) -> None:
    line = sparkline(list(enumerate(values)))
    if max(values) / 2 > min(values) / 2:
        assert line[values.index(max(values))] == BARS[-1]
    assert line[values.index(min(values))] == BARS[0]


@given(
    st.lists(st.integers(0, 500), min_size=1, max_size=100, unique=True),
    st.lists(st.tuples(st.integers(0, 600), st.sampled_from(sorted(INTERVENTIONS))), min_size=1),
    st.integers(1, 80),
)
def test_every_intervention_leaves_a_mark_under_the_curve(
    steps: list[int], interventions: list[tuple[int, str]], width: int
) -> None:
    losses = [(step, 1.0) for step in sorted(steps)]
    line = marks(losses, interventions, width=width)
    assert len(line) <= min(width, len(losses))
    letters = {INTERVENTIONS[name] for _, name in interventions}
    assert set(line) - {" "} <= letters | {"*"}
    assert line.strip()


@pytest.mark.parametrize("record", [{"event": "step_skipped"}, {"event": "x", "step": "3"}, {"event": 4, "step": 1}])
def test_foreign_records_are_passed_over(record: dict[str, Any]) -> None:
    assert History.read([record]).interventions == []
