"""The one place that touches NVML's binding: loaded late, initialised once per process, and never raising.

NVML is thread-safe but not fork-safe, so a forked child initialises it again. Any call may block for ever
when a GPU is failing: every call is noted while it is under way, so that whoever waits can say which one does
not return.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from typing import Any

from .values import Missing, Unknown, Unsupported, Value

UNINITIALIZED = 1
INVALID_ARGUMENT = 2
NOT_SUPPORTED = 3
TIMEOUT = 10
LIBRARY_NOT_FOUND = 12
FUNCTION_NOT_FOUND = 13
# Not supported; missing symbol; ECC not on this vGPU; structure version unknown to the driver; withdrawn
# call.
_NOT_OFFERED = frozenset({NOT_SUPPORTED, FUNCTION_NOT_FOUND, 22, 25, 26})
# nvmlValueType_t in its order of numbers, as the names of the union's members.
_UNION_MEMBERS = ("dVal", "uiVal", "ulVal", "ullVal", "sllVal", "siVal", "usVal")

_lock = threading.Lock()
_current: Nvml | None = None
_inherited: Nvml | None = None
_in_flight: dict[int, tuple[str, float]] = {}


class Nvml:
    """NVML as initialised in this process. A device handle is good only for the instance that gave it."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self._absent: dict[tuple[str, int], Unsupported] = {}

    def call(self, function: str, *arguments: Any) -> Any:
        """What the named pynvml function returns, or the `Missing` that says why it returns nothing."""
        # One binding function may stand for two symbols, told apart by a version argument.
        symbol = (function, len(arguments))
        absent = self._absent.get(symbol)
        if absent is not None:
            return absent
        result = _attempt(self._module, function, *arguments)
        if isinstance(result, Unsupported) and result.nvml_code == FUNCTION_NOT_FOUND:
            self._absent[symbol] = result
        return result

    def first_of(self, *calls: tuple[Any, ...]) -> Any:
        """The first of several calls for the same thing that this driver offers, newest first."""
        result: Any = Unsupported("no call given")
        for function, *arguments in calls:
            result = self.call(function, *arguments)
            if not isinstance(result, Unsupported):
                break
        return result

    def fields(self, handle: Any, fields: Sequence[int | tuple[int, int]]) -> list[Value[float]]:
        """The values of the given field ids, or (field id, scope) pairs, in their order."""
        answer = self.call("nvmlDeviceGetFieldValues", handle, list(fields))
        if isinstance(answer, Missing):
            return [_copy(answer) for _ in fields]
        return [self._field(value) for value in answer]

    def _field(self, value: Any) -> Value[float]:
        # The union is left undefined when nvmlReturn is not 0: reading it anyway would make "unsupported" a
        # 0.
        if value.nvmlReturn != 0:
            reason = f"field {value.fieldId}: {_error_text(self._module, value.nvmlReturn)}"
            kind = Unsupported if value.nvmlReturn in _NOT_OFFERED | {INVALID_ARGUMENT} else Unknown
            return kind(reason, int(value.nvmlReturn))
        if not 0 <= value.valueType < len(_UNION_MEMBERS):
            return Unknown(f"field {value.fieldId} has the unknown value type {value.valueType}")
        number: int | float = getattr(value.value, _UNION_MEMBERS[value.valueType])
        return number


def nvml() -> Nvml | Unsupported | Unknown:
    """NVML, initialised once for this process, or why it cannot be. May block as long as the driver does."""
    global _current, _inherited
    with _lock:
        if _current is not None:
            return _current
        try:
            import pynvml
        except ImportError as error:
            return Unsupported(f"nvidia-ml-py cannot be imported: {error}")
        if _inherited is not None:
            # The parent's initialisation was copied by fork: give it back, or the driver counts it as done.
            _inherited.call("nvmlShutdown")
            _inherited = None
        outcome = _attempt(pynvml, "nvmlInit")
        if isinstance(outcome, Unsupported | Unknown):
            if outcome.nvml_code == LIBRARY_NOT_FOUND:
                return Unsupported("no NVIDIA driver here: its NVML library was not found", LIBRARY_NOT_FOUND)
            return Unknown(f"NVML cannot be initialised: {outcome.reason}", outcome.nvml_code)
        _current = Nvml(pynvml)
        return _current


def forget(instance: Nvml) -> None:
    """Initialise NVML anew at the next `nvml()`: something in this process shut ``instance`` down."""
    global _current
    with _lock:
        if _current is instance:
            _current = None


def call_in_flight(thread_id: int) -> tuple[str, float] | None:
    """The NVML call that the thread is inside, and when it began (monotonic, seconds)."""
    return _in_flight.get(thread_id)


def _attempt(module: Any, function: str, *arguments: Any) -> Any:
    target = getattr(module, function, None)
    if target is None:
        return Unsupported(f"this nvidia-ml-py has no {function}", FUNCTION_NOT_FOUND)
    thread_id = threading.get_ident()
    _in_flight[thread_id] = (function, time.monotonic())
    try:
        return target(*arguments)
    except module.NVMLError as error:
        code = int(error.value)
        kind = Unsupported if code in _NOT_OFFERED else Unknown
        return kind(f"{function}: {error}", code)
    except Exception as error:  # noqa: BLE001 - a defect of the binding is an unknown reading, no end of a run
        return Unknown(f"{function}: {type(error).__name__}: {error}")
    finally:
        _in_flight.pop(thread_id, None)


def _error_text(module: Any, code: int) -> str:
    return str(module.NVMLError(code))


def _copy(missing: Missing) -> Unsupported | Unknown:
    return (Unsupported if isinstance(missing, Unsupported) else Unknown)(missing.reason, missing.nvml_code)


def _after_fork_in_child() -> None:
    # The lock may be held by a thread that does not exist here.
    global _lock, _current, _inherited
    _lock = threading.Lock()
    _inherited, _current = _current, None
    _in_flight.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
