"""What a sensor says when it says nothing: a typed value with its reason, never 0 and never ``None``.

Every reading in this room is either the value or one of the two kinds of `Missing`:

- `Unsupported`: this device, driver or platform does not offer it. Normal, and it will not change.
- `Unknown`: it should be there and could not be read. Something is wrong, or it is too early.

Neither may be taken for health, so neither compares, adds up or has a truth value (TypeError); both print.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn, TypeAlias, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Missing:
    """Base of `Unsupported` and `Unknown`: ``isinstance(value, Missing)`` narrows a `Value`."""

    reason: str
    """One clause that a person can read."""
    nvml_code: int | None = None
    """The ``nvmlReturn_t`` behind it, if any (3 not supported, 15 GPU is lost, 16 reset required)."""

    def __str__(self) -> str:
        return type(self).__name__.lower()

    def __format__(self, spec: str) -> str:
        # A format meant for a number (".1f") must not crash the line that prints it.
        return str(self)

    def __bool__(self) -> NoReturn:
        raise TypeError(f"a reading that is {self} ({self.reason}) is neither true nor false")


@dataclass(frozen=True, slots=True)
class Unsupported(Missing):
    """Not offered by this device, driver or platform. Prints as ``unsupported``."""


@dataclass(frozen=True, slots=True)
class Unknown(Missing):
    """Could not be read, although it might exist. Prints as ``unknown``."""


Value: TypeAlias = T | Unsupported | Unknown
"""A reading of type ``T``, or the typed statement that there is none."""


def known(value: Value[T]) -> T | None:
    """The reading itself, or None where there is none: for displays only, where both mean a dash."""
    return None if isinstance(value, Missing) else value
