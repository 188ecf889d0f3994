from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainwarden.device import Missing, Unknown, Unsupported
from trainwarden.device.headroom import ASSUMED_MAX_C, Headroom, Thermals, decide_headroom

NO = Unsupported("not supported")
H100 = Thermals(
    temperature_c=60.0,
    margin_c=27.0,
    slowdown_offset_c=-2.0,
    gpu_max_c=87.0,
    slowdown_c=89.0,
    shutdown_c=92.0,
    heat_confirmed=False,
)
A100 = replace(H100, margin_c=NO, slowdown_offset_c=NO)
SILENT = replace(A100, gpu_max_c=NO, slowdown_c=NO, shutdown_c=NO)

temperatures = st.floats(-40, 150)
anything = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False, min_value=-1e6, max_value=1e6),
    st.just(NO),
    st.just(Unknown("read failed")),
)


def test_the_margin_is_believed_first() -> None:
    assert decide_headroom(H100) == Headroom(27.0, 29.0, "margin", "")


def test_the_slowdown_offset_is_signed_and_moves_the_slowdown_not_the_headroom() -> None:
    b200 = replace(H100, margin_c=4.0, slowdown_offset_c=-3.0, temperature_c=81.0)
    assert decide_headroom(b200) == Headroom(4.0, 7.0, "margin", "")


@pytest.mark.parametrize("offset", [NO, Unknown("x"), 5.0, -45.0, 4294967294.0])
def test_an_offset_that_makes_no_sense_counts_as_zero(offset: float | Unsupported) -> None:
    assert decide_headroom(replace(H100, slowdown_offset_c=offset)).slowdown_headroom_c == 27.0


def test_without_a_margin_the_maximum_of_the_device_itself_counts() -> None:
    found = decide_headroom(A100)
    assert (found.headroom_c, found.slowdown_headroom_c, found.source) == (27.0, 29.0, "gpu_max")
    assert "no margin" in found.note


def test_without_a_maximum_five_degrees_below_slowdown_count() -> None:
    found = decide_headroom(replace(A100, gpu_max_c=NO))
    assert (found.headroom_c, found.slowdown_headroom_c, found.source) == (24.0, 29.0, "slowdown")


def test_with_nothing_but_a_shutdown_temperature_ten_degrees_below_it_count() -> None:
    found = decide_headroom(replace(SILENT, shutdown_c=92.0))
    assert (found.headroom_c, found.source) == (22.0, "shutdown")
    assert isinstance(found.slowdown_headroom_c, Unknown)


def test_absolute_degrees_are_a_last_resort_and_said_to_be_one() -> None:
    found = decide_headroom(SILENT)
    assert (found.headroom_c, found.source) == (ASSUMED_MAX_C - 60.0, "assumed")
    assert "assumed" in found.note
    assert isinstance(found.slowdown_headroom_c, Unknown)


def test_a_laptop_that_calls_57_degrees_its_maximum_is_judged_by_its_slowdown_temperature() -> None:
    laptop = replace(A100, temperature_c=70.0, gpu_max_c=57.0, slowdown_c=97.0, shutdown_c=102.0)
    found = decide_headroom(laptop)
    assert (found.headroom_c, found.source) == (22.0, "slowdown")


def test_a_maximum_above_the_slowdown_temperature_is_out_of_order_and_not_used() -> None:
    card = replace(A100, gpu_max_c=105.0, slowdown_c=102.0, shutdown_c=105.0)
    assert decide_headroom(card).source == "slowdown"


def test_a_slowdown_above_the_shutdown_temperature_is_out_of_order_and_not_used() -> None:
    card = replace(A100, gpu_max_c=NO, slowdown_c=110.0, shutdown_c=95.0)
    assert decide_headroom(card).source == "shutdown"


@pytest.mark.parametrize("nonsense", [0.0, 255.0, 4294967295.0, -1.0])
def test_thresholds_out_of_any_range_are_as_good_as_none(nonsense: float) -> None:
    card = replace(A100, gpu_max_c=nonsense, slowdown_c=nonsense, shutdown_c=nonsense)
    assert decide_headroom(card).source == "assumed"


class TestAMarginAtOrBelowZero:
    def test_is_doubted_on_a_cool_gpu_since_some_parts_report_it_wrongly(self) -> None:
        found = decide_headroom(replace(H100, margin_c=0.0, temperature_c=45.0))
        assert (found.headroom_c, found.source) == (42.0, "gpu_max")
        assert "not credible" in found.note

    def test_is_believed_on_a_hot_gpu(self) -> None:
        found = decide_headroom(replace(H100, margin_c=-1.0, temperature_c=88.0))
        assert (found.headroom_c, found.slowdown_headroom_c, found.source) == (-1.0, 1.0, "margin")

    def test_is_believed_on_a_cool_gpu_whose_clocks_confirm_heat_as_with_hot_memory(self) -> None:
        hot_memory = replace(H100, margin_c=-1.0, temperature_c=60.0, heat_confirmed=True)
        assert decide_headroom(hot_memory).source == "margin"


def test_a_comfortable_margin_above_the_slowdown_temperature_is_not_believed() -> None:
    found = decide_headroom(replace(H100, margin_c=27.0, temperature_c=95.0))
    assert (found.headroom_c, found.slowdown_headroom_c, found.source) == (-8.0, -6.0, "gpu_max")


def test_without_a_temperature_the_margin_still_counts() -> None:
    assert decide_headroom(replace(H100, temperature_c=Unknown("gone"))).headroom_c == 27.0


def test_without_temperature_and_margin_nothing_is_known_and_the_reason_stays() -> None:
    found = decide_headroom(replace(A100, temperature_c=Unknown("gone")))
    assert found.headroom_c == Unknown("gone")
    assert found.source == "none"
    assert "gone" in found.note


@pytest.mark.parametrize("impossible", [255.0, -128.0, 4294967295.0])
def test_an_impossible_temperature_is_a_broken_sensor_and_not_heat(impossible: float) -> None:
    assert isinstance(decide_headroom(replace(A100, temperature_c=impossible)).headroom_c, Unknown)


@given(st.tuples(anything, anything, anything, anything, anything, anything), st.booleans())
def test_whatever_a_device_claims_there_is_an_answer_with_its_source(
    claims: tuple[float, float, float, float, float, float], confirmed: bool
) -> None:
    found = decide_headroom(_thermals(claims, confirmed))
    assert (found.source == "none") == isinstance(found.headroom_c, Missing)
    assert found.source == "margin" or found.note


@given(st.tuples(anything, anything, anything), temperatures, temperatures)
def test_by_thresholds_a_hotter_gpu_never_has_more_headroom(
    limits: tuple[float, float, float], one: float, other: float
) -> None:
    gpu_max, slowdown, shutdown = limits
    card = replace(A100, gpu_max_c=gpu_max, slowdown_c=slowdown, shutdown_c=shutdown)
    cool, hot = (decide_headroom(replace(card, temperature_c=t)) for t in sorted((one, other)))
    assert not isinstance(cool.headroom_c, Missing)
    assert not isinstance(hot.headroom_c, Missing)
    assert cool.headroom_c >= hot.headroom_c


@given(temperatures, st.integers(60, 100), st.integers(0, 20))
def test_thresholds_in_order_are_used_as_they_stand(temperature: float, top: int, gap: int) -> None:
    card = replace(A100, temperature_c=temperature, gpu_max_c=top, slowdown_c=top + gap, shutdown_c=NO)
    found = decide_headroom(card)
    assert (found.headroom_c, found.source) == (top - temperature, "gpu_max")


def _thermals(claims: tuple[float, float, float, float, float, float], confirmed: bool) -> Thermals:
    temperature, margin, offset, gpu_max, slowdown, shutdown = claims
    return Thermals(
        temperature_c=temperature,
        margin_c=margin,
        slowdown_offset_c=offset,
        gpu_max_c=gpu_max,
        slowdown_c=slowdown,
        shutdown_c=shutdown,
        heat_confirmed=confirmed,
    )
