"""A prediction's parts agree with each other, or it does not exist."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainwarden.memory import KINDS, PHASES, Prediction


def prediction(**changes: Any) -> Prediction:
    values: dict[str, Any] = {
        "peak_bytes": 30,
        "phase": "backward",
        "operation": "aten.mm.default in model",
        "breakdown": dict.fromkeys(KINDS, 5),
        "phases": {"load": 10, "forward": 20, "backward": 30, "optimizer": 25},
        "host_bytes": 0,
        "source": "traced",
        "error": 0.01,
    }
    return Prediction(**(values | changes))


def test_kinds_and_phases_are_the_public_ones() -> None:
    assert PHASES == ("load", "forward", "backward", "optimizer")
    assert KINDS == ("weights", "gradients", "optimizer_states", "activations", "logits_and_loss", "temporaries")


def test_a_prediction_that_agrees_with_itself_is_accepted() -> None:
    assert prediction().peak_bytes == 30


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"peak_bytes": 31}, "sums to 30"),
        ({"breakdown": {"weights": 30}}, "every kind"),
        ({"phases": {"backward": 30}}, "every phase"),
        ({"phase": "forward"}, "not that of its phase"),
        ({"phases": {"load": 10, "forward": 40, "backward": 30, "optimizer": 25}}, "not that of its phase"),
    ],
)
def test_one_that_contradicts_itself_is_refused(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        prediction(**changes)


@given(st.lists(st.integers(0, 2**40), min_size=len(KINDS), max_size=len(KINDS)))
def test_the_peak_is_the_sum_of_its_kinds(sizes: list[int]) -> None:
    total = sum(sizes)
    found = prediction(
        peak_bytes=total,
        breakdown=dict(zip(KINDS, sizes, strict=True)),
        phases=dict.fromkeys(PHASES, 0) | {"backward": total},
    )
    assert sum(found.breakdown.values()) == max(found.phases.values()) == total


def test_it_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        prediction().peak_bytes = 1  # type: ignore[misc]


def test_importing_the_room_does_not_import_torch() -> None:
    script = "import sys, trainwarden.memory; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
