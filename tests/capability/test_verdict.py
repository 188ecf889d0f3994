"""A verdict carries its reason everywhere, and is never mistaken for a yes."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainwarden.capability import Status, Verdict
from trainwarden.capability.verdict import degraded, supported, unknown, unsupported

verdicts = st.builds(
    Verdict,
    st.sampled_from(Status),
    st.text(),
    st.text(),
    st.dictionaries(st.text(), st.none() | st.booleans() | st.integers() | st.text()),
)


@given(verdicts)
def test_a_verdict_survives_the_way_from_a_child_process(verdict: Verdict) -> None:
    assert Verdict.from_dict(json.loads(json.dumps(verdict.to_dict()))) == verdict


def test_only_supported_is_supported() -> None:
    assert supported("it works").supported
    assert not any(verdict.supported for verdict in (degraded("x"), unsupported("x"), unknown("x")))


def test_a_verdict_has_no_truth_value_because_unknown_is_neither() -> None:
    with pytest.raises(TypeError, match="unknown: the driver is silent.*ask for .supported"):
        bool(unknown("the driver is silent"))


def test_a_verdict_prints_its_status_and_its_reason() -> None:
    assert str(degraded("only emulated")) == "degraded: only emulated"


def test_a_verdict_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        supported("it works").reason = "it does not"  # type: ignore[misc]
