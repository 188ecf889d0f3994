"""What a device holds besides tensors: stated, and corrected by finished runs."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainwarden.memory.overheads import (
    ASSUMED_CONTEXT_BYTES,
    ASSUMED_FRAGMENTATION,
    CALIBRATION_RUNS,
    NO_OVERHEADS,
    REMEMBERED_RUNS,
    DeviceMemory,
    Overheads,
    RunMemory,
    calibrated,
)

GIB = 2**30
CARD = "NVIDIA GeForce RTX 4090"


def run(allocated: float = 10.0, *, device: str = CARD, predicted: float = 10.0, reserved: float = 10.5) -> RunMemory:
    return RunMemory(
        device=device,
        predicted_bytes=round(predicted * GIB),
        allocated_bytes=round(allocated * GIB),
        reserved_bytes=round(reserved * GIB),
        context_bytes=GIB // 2,
    )


def test_without_finished_runs_the_numbers_are_assumed_and_said_to_be() -> None:
    found = calibrated([], CARD)
    assert (found.context_bytes, found.fragmentation) == (ASSUMED_CONTEXT_BYTES, ASSUMED_FRAGMENTATION)
    assert found.source.startswith("assumed")


def test_a_few_finished_runs_replace_them() -> None:
    found = calibrated([run() for _ in range(CALIBRATION_RUNS)], CARD)
    assert found.runs == CALIBRATION_RUNS
    assert found.context_bytes == GIB // 2
    assert found.fragmentation == pytest.approx(0.05)
    assert found.source.startswith("measured by 3 finished runs")


def test_fewer_runs_do_not() -> None:
    assert calibrated([run()] * (CALIBRATION_RUNS - 1), CARD).runs == 0


def test_runs_on_other_devices_and_without_a_measurement_do_not_count() -> None:
    other = [run(device="NVIDIA H100 80GB HBM3")] * 5
    unmeasured = [RunMemory(device=CARD, predicted_bytes=GIB, allocated_bytes=None)] * 5
    assert calibrated([*other, *unmeasured], CARD).runs == 0


def test_the_worst_run_decides() -> None:
    found = calibrated([run(), run(11.0, reserved=12.0), run()], CARD)
    assert found.correction == pytest.approx(1.1)
    assert found.fragmentation == pytest.approx(12 / 11 - 1)


def test_runs_below_their_prediction_had_shorter_rows_and_correct_nothing() -> None:
    assert calibrated([run(6.0, reserved=6.1)] * 3, CARD).correction == 1.0


def test_only_the_newest_runs_are_remembered() -> None:
    old = [run(20.0, reserved=30.0)] * 3
    assert calibrated([*[run()] * REMEMBERED_RUNS, *old], CARD).correction == 1.0


@settings(deadline=None, max_examples=200, print_blob=True)
@given(
    peak=st.integers(0, 200 * GIB),
    fragmentation=st.floats(0, 0.5),
    correction=st.floats(1.0, 1.5),
    context=st.integers(0, 2 * GIB),
)
def test_a_peak_within_the_budget_fits_and_one_above_does_not(
    peak: int, fragmentation: float, correction: float, context: int
) -> None:
    overheads = Overheads(context_bytes=context, fragmentation=fragmentation, correction=correction)
    available = overheads.needed_bytes(peak)
    assert abs(overheads.peak_budget_bytes(available) - peak) <= 1
    assert overheads.needed_bytes(overheads.peak_budget_bytes(available)) <= available + 1


def test_a_budget_of_tensors_has_no_overheads() -> None:
    assert NO_OVERHEADS.needed_bytes(1234) == NO_OVERHEADS.peak_budget_bytes(1234) == 1234


def test_what_others_hold_is_not_available() -> None:
    assert DeviceMemory(name="x", total_bytes=24 * GIB, others_bytes=4 * GIB).available_bytes == 20 * GIB
    assert DeviceMemory(name="x", total_bytes=GIB, others_bytes=4 * GIB).available_bytes == 0
