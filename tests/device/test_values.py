from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainwarden.device import Missing, Unknown, Unsupported, known

KINDS = [Unsupported, Unknown]


@pytest.mark.parametrize("kind", KINDS)
class TestAMissingReading:
    @given(spec=st.sampled_from(["", ".1f", "d", ">8", "08.3f", ",", "%"]))
    def test_prints_as_its_kind_under_any_number_format(self, kind: type[Missing], spec: str) -> None:
        assert format(kind("no sensor"), spec) == kind.__name__.lower()
        assert f"{kind('no sensor'):.1f} °C" == f"{kind.__name__.lower()} °C"

    def test_has_no_truth_value_so_that_it_is_never_taken_for_health(self, kind: type[Missing]) -> None:
        with pytest.raises(TypeError, match=r"neither true nor false.*|.*no sensor"):
            bool(kind("no sensor"))

    def test_compares_with_no_threshold(self, kind: type[Missing]) -> None:
        with pytest.raises(TypeError):
            kind("no sensor") > 90  # type: ignore[operator]  # noqa: B015

    def test_adds_up_to_nothing(self, kind: type[Missing]) -> None:
        with pytest.raises(TypeError):
            sum([1, kind("no sensor")])  # type: ignore[list-item]

    def test_is_a_value_equal_to_its_like_and_survives_pickling(self, kind: type[Missing]) -> None:
        value = kind("no sensor", 3)
        assert value == kind("no sensor", 3) == pickle.loads(pickle.dumps(value))
        assert value != kind("another reason", 3)

    def test_is_none_only_for_displays(self, kind: type[Missing]) -> None:
        assert known(kind("no sensor")) is None


def test_unsupported_and_unknown_are_different_statements() -> None:
    statements: list[Missing] = [Unsupported("x"), Unknown("x")]
    assert len(set(statements)) == 2


@given(st.one_of(st.integers(), st.floats(allow_nan=False), st.text()))
def test_a_reading_is_known_as_itself_zero_included(value: float | str) -> None:
    assert known(value) == value
