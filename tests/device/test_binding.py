from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tests.waiting import LIMIT_S
from trainwarden.device import Missing, Unknown, Unsupported
from trainwarden.device.binding import Nvml, call_in_flight, nvml
from trainwarden.device.deadline import within

from .stand_in import StandIn


class NVMLError(Exception):
    def __init__(self, value: int) -> None:
        self.value = value


def library(**functions: Any) -> Nvml:
    return Nvml(SimpleNamespace(NVMLError=NVMLError, **functions))


def failing(error: BaseException) -> Any:
    def call(*arguments: object) -> None:
        raise error

    return call


@given(st.integers(1, 1000))
def test_every_error_code_becomes_a_missing_value_that_carries_it(code: int) -> None:
    value = library(f=failing(NVMLError(code))).call("f")
    assert isinstance(value, Missing)
    assert value.nvml_code == code


def test_a_defect_of_the_binding_is_unknown_and_does_not_end_the_run() -> None:
    value = library(f=failing(UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad name"))).call("f")
    assert isinstance(value, Unknown)
    assert "UnicodeDecodeError" in value.reason


def test_a_function_that_the_binding_lacks_is_unsupported() -> None:
    assert isinstance(library().call("nvmlOfTheFuture"), Unsupported)


def test_a_symbol_that_the_driver_lacks_is_looked_for_once() -> None:
    asked: list[object] = []

    def absent(*arguments: object) -> None:
        asked.append(arguments)
        raise NVMLError(13)

    nvml_library = library(f=absent)
    assert nvml_library.call("f", 1) == nvml_library.call("f", 2)
    assert asked == [(1,)]
    nvml_library.call("f", 1, "version")
    assert len(asked) == 2


class TestTheFirstOfSeveralCalls:
    def test_that_is_offered_answers(self) -> None:
        assert library(f=failing(NVMLError(3)), g=lambda x: x + 1).first_of(("f", 1), ("g", 2)) == 3

    def test_is_not_passed_over_for_a_failure(self) -> None:
        value = library(f=failing(NVMLError(15)), g=lambda: 1).first_of(("f",), ("g",))
        assert isinstance(value, Unknown)

    def test_says_why_when_none_is_offered(self) -> None:
        value = library(f=failing(NVMLError(3)), g=failing(NVMLError(13))).first_of(("f",), ("g",))
        assert value.nvml_code == 13


def test_a_call_is_noted_while_it_is_under_way_and_only_then() -> None:
    entered, leave = threading.Event(), threading.Event()

    def slow() -> None:
        entered.set()
        leave.wait(LIMIT_S)

    thread = threading.Thread(target=library(nvmlSlow=slow).call, args=("nvmlSlow",), daemon=True)
    thread.start()
    assert entered.wait(LIMIT_S)
    assert thread.ident is not None
    call = call_in_flight(thread.ident)
    assert call is not None
    assert call[0] == "nvmlSlow"
    leave.set()
    thread.join(LIMIT_S)
    assert call_in_flight(thread.ident) is None


def test_nvml_is_initialised_once_for_many_users(nvml_here: StandIn) -> None:
    assert nvml() is nvml()
    assert [name for _, name in nvml_here.calls()].count("nvmlInitWithFlags") == 1


def test_a_failed_initialisation_is_tried_again_when_asked_again(nvml_here: StandIn) -> None:
    nvml_here.set({"err.nvmlInitWithFlags": 9})
    assert isinstance(nvml(), Unknown)
    nvml_here.set({"err.nvmlInitWithFlags": None})
    assert isinstance(nvml(), Nvml)


class TestADeadline:
    def test_passes_on_what_the_task_returns(self) -> None:
        assert within(LIMIT_S, lambda: 42) == 42

    def test_turns_an_exception_into_unknown(self) -> None:
        assert within(LIMIT_S, failing(OSError("bad"))) == Unknown("OSError: bad")

    def test_goes_on_without_a_task_that_hangs(self) -> None:
        forever = threading.Event()
        assert within(0.02, forever.wait) == Unknown("the driver did not answer within 0.02 s")
        forever.set()
