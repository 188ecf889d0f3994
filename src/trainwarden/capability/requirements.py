"""What ``warden probe --require`` understands: ``vram>=80GiB``, ``sm>=90``, ``driver>=535``, ``fp8``; and its judge."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

from trainwarden.capability.quantities import Amount, Quantity, version
from trainwarden.capability.verdict import Status, Verdict
from trainwarden.errors import InvalidSettingError

ABILITIES = ("bf16", "fp8", "flash_attention", "adam8bit", "nccl", "fsdp", "mlx", "hub", "ollama")
"""Names that stand alone: their verdict has to be ``supported``."""

NOMINAL_SHARE = Fraction(97, 100)
"""Of an amount of ``vram`` or ``ram`` that is enough: a card sold with 80 GB reports 79.65 GiB (H100), a host with
64 GiB reports 62.5, and who asks for 80 or 64 means these."""
_NOMINAL = ("vram", "ram")

_UNITS = {"MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZE = re.compile(r"(\d{1,12}(?:\.\d{1,6})?)\s*([A-Za-z]+)", re.ASCII)
_COUNT = re.compile(r"\d{1,9}", re.ASCII)
_VERSION = re.compile(r"\d{1,9}(?:\.\d{1,9}){0,5}", re.ASCII)
_FORM = re.compile(r"\s*(?P<name>[^\s<>=!~]+)\s*(?:(?P<operator>[<>=!~]+)\s*(?P<value>.*?)\s*)?", re.DOTALL)


@dataclass(frozen=True)
class Requirement:
    """An ability (``least`` None), or a quantity of at least ``least``. Prints as it can be parsed again."""

    name: str
    least: Amount | None = None
    value: str = ""
    """``least`` as it was written."""

    def __str__(self) -> str:
        return self.name if self.least is None else f"{self.name}>={self.value}"


@dataclass(frozen=True)
class Outcome:
    """How one requirement came out. ``unknown`` is not met either, and says so."""

    requirement: Requirement
    status: Literal["met", "unmet", "unknown"]
    found: str
    reason: str
    fix: str = ""

    @property
    def met(self) -> bool:
        return self.status == "met"

    def to_dict(self) -> dict[str, Any]:
        return {
            "requirement": str(self.requirement),
            "status": self.status,
            "found": self.found,
            "reason": self.reason,
            "fix": self.fix,
        }

    def __str__(self) -> str:
        """``vram>=80GiB: found 24.00 GiB (on cuda:0)``"""
        return f"{self.requirement}: found {self.found} ({self.reason})"


def parse_requirements(texts: Sequence[str], *, place: str = "requirements") -> list[Requirement]:
    """All of them, or `InvalidSettingError` naming the one that is wrong (``requirements[2]``) and what it may be."""
    return [parse_requirement(text, place=f"{place}[{index}]") for index, text in enumerate(texts)]


def parse_requirement(text: str, *, place: str = "requirement") -> Requirement:
    """One requirement: ``NAME`` of an ability, or ``NAME>=AMOUNT`` of a quantity.

    Raises `InvalidSettingError` with ``place``, the text and what is expected there.
    """
    match = _FORM.fullmatch(text)
    if match is None:
        raise _wrong(place, text, f"NAME or NAME>=AMOUNT; the names are {_names()}")
    name, operator, value = match["name"], match["operator"], match["value"]
    if name in ABILITIES:
        if operator is not None:
            raise _wrong(place, text, f"{name} alone: it is there or not, and has no amount")
        return Requirement(name)
    if name not in KINDS:
        near = difflib.get_close_matches(name.lower(), [*KINDS, *ABILITIES], n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise _wrong(place, text, f"a known name instead of {name!r}{hint}: {_names()}")
    kind = KINDS[name]
    if operator is None:
        raise _wrong(place, text, f"{name}>= and {kind.expected}")
    if operator != ">=":
        raise _wrong(place, text, f">= after {name}, which is the only comparison")
    least = kind.read(value)
    if least is None:
        raise _wrong(place, text, f"{kind.expected} after {name}>=")
    return Requirement(name, least, value)


def judge(requirement: Requirement, verdicts: Mapping[str, Verdict], quantities: Mapping[str, Quantity]) -> Outcome:
    """Whether it is met by what was found. Only ``supported`` meets an ability: ``degraded`` is not what was asked."""
    if requirement.least is None:
        verdict = verdicts[requirement.name]
        status: Literal["met", "unmet", "unknown"] = "met" if verdict.supported else "unmet"
        if verdict.status is Status.UNKNOWN:
            status = "unknown"
        return Outcome(requirement, status, str(verdict.status), verdict.reason, verdict.fix)
    quantity = quantities[requirement.name]
    if quantity.status is Status.UNKNOWN:
        return Outcome(requirement, "unknown", "unknown", quantity.reason)
    if quantity.amount is None:
        return Outcome(requirement, "unmet", quantity.found, quantity.reason)
    if _reaches(quantity.amount, requirement.least):
        return Outcome(requirement, "met", quantity.found, quantity.reason)
    if requirement.name in _NOMINAL and _nearly(quantity.amount, requirement.least):
        note = f"{quantity.reason}; within 3 % of {requirement.value}, as much as is reserved of a part of that name"
        return Outcome(requirement, "met", quantity.found, note)
    return Outcome(requirement, "unmet", quantity.found, quantity.reason)


def _reaches(amount: Amount, least: Amount) -> bool:
    if isinstance(amount, tuple) and isinstance(least, tuple):
        return amount >= least
    return isinstance(amount, int) and isinstance(least, int) and amount >= least


def _nearly(amount: Amount, least: Amount) -> bool:
    return isinstance(amount, int) and isinstance(least, int) and amount >= least * NOMINAL_SHARE


@dataclass(frozen=True)
class Kind:
    """How the amount of a quantity is written; ``read`` gives None for what is not written so."""

    read: Callable[[str], Amount | None]
    expected: str


def _size(text: str) -> int | None:
    match = _SIZE.fullmatch(text)
    if match is None or match[2] not in _UNITS:
        return None
    exact = Fraction(match[1]) * _UNITS[match[2]]
    return -(-exact.numerator // exact.denominator)


def _count(text: str) -> int | None:
    return int(text) if _COUNT.fullmatch(text) else None


def _version(text: str) -> tuple[int, ...] | None:
    return version(text) if _VERSION.fullmatch(text) else None


_SIZE_KIND = Kind(_size, f"a size such as 80GiB (units: {', '.join(_UNITS)})")
_COUNT_KIND = Kind(_count, "a whole number such as 2")
_VERSION_KIND = Kind(_version, "a version such as 12.4")
KINDS: Mapping[str, Kind] = {
    "vram": _SIZE_KIND,
    "sm": Kind(_count, "a compute capability without its point, such as 90 for 9.0"),
    "gpus": _COUNT_KIND,
    "driver": _VERSION_KIND,
    "cuda": _VERSION_KIND,
    "ram": _SIZE_KIND,
    "disk": _SIZE_KIND,
}


def _names() -> str:
    return ", ".join([*(f"{name}>=…" for name in KINDS), *ABILITIES])


def _wrong(place: str, text: str, expected: str) -> InvalidSettingError:
    return InvalidSettingError(
        setting=place, value=text, expected=expected, suggestion=f"The known requirements are {_names()}."
    )
