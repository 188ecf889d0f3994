"""All conditions by code and alias; registering a class checks it: a wrong one cannot even be imported."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from .exits import EXIT_STATUSES
from .pages import SECTIONS, sections_of
from .values import placeholders

if TYPE_CHECKING:
    from .base import WardenError

FAMILY_PREFIXES = (
    "INPUT_",
    "CONFIG_",
    "PREFLIGHT_",
    "DEP_",
    "RUNTIME_",
    "STATE_",
    "GATE_",
    "PROVENANCE_",
    "PARTIAL_",
    "INTERNAL_",
)
SEED_NAMED_CODES = frozenset({"SLAO_MERGE_DIVERGED", "PEFT_API_INCOMPATIBLE", "UI_OUTPUT_DIR_FORBIDDEN"})
"""Codes without a family prefix that others already search their logs for; no further ones."""

_CODE = re.compile(r"[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+")
_ALIAS = re.compile(r"[A-Z]+(?:\.[A-Z][A-Z0-9_]*)+|[0-9]{5}|[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+")

_classes: dict[str, type[WardenError]] = {}
_names: dict[str, str] = {}  # every code and alias -> code


def registry() -> Mapping[str, type[WardenError]]:
    """Every condition by its code, in the order of registration; read-only."""
    return MappingProxyType(_classes)


def find(name: str) -> type[WardenError] | None:
    """The condition that `name`, a code or an alias in any case, stands for."""
    code = _names.get(name.strip().upper())
    return None if code is None else _classes[code]


def known_names() -> list[str]:
    """Every code and every alias."""
    return list(_names)


def register(cls: type[WardenError]) -> None:
    """Check `cls` against the contract and add it. Raises TypeError naming the class and what is wrong."""
    problem = _problem_with(cls)
    if problem is not None:
        raise TypeError(f"{cls.__module__}.{cls.__qualname__} ({cls.code}): {problem}")
    _classes[cls.code] = cls
    for name in (cls.code, *cls.aliases):
        _names[name] = cls.code


def _problem_with(cls: type[WardenError]) -> str | None:
    return _problem_with_names(cls) or _problem_with_statuses(cls) or _problem_with_words(cls)


def _problem_with_names(cls: type[WardenError]) -> str | None:
    if not _CODE.fullmatch(cls.code):
        return "a code is upper snake case with a family prefix"
    if cls.code not in SEED_NAMED_CODES and not cls.code.startswith(FAMILY_PREFIXES):
        return f"unknown family; the known ones are {', '.join(FAMILY_PREFIXES)}"
    if cls.code not in SEED_NAMED_CODES and not cls.code.startswith(cls.prefix):
        return f"its family begins with {cls.prefix}"
    for name in (cls.code, *cls.aliases):
        if not _ALIAS.fullmatch(name):
            return f"{name!r} is no alias: write FAMILY.NAME, UPPER_SNAKE or five digits"
        taken_by = find(name)
        if taken_by is not None and not _same_definition(taken_by, cls):
            return f"{name} already belongs to {taken_by.__qualname__}"
    if len({cls.code, *cls.aliases}) != 1 + len(cls.aliases):
        return "it repeats a name of its own"
    return None


def _same_definition(one: type, other: type) -> bool:
    # A reloaded module defines its classes anew; that is not a second condition.
    return (one.__module__, one.__qualname__) == (other.__module__, other.__qualname__)


def _problem_with_statuses(cls: type[WardenError]) -> str | None:
    from .base import Retry

    if cls.exit_code not in EXIT_STATUSES or cls.exit_code == 0:
        return f"exit status {cls.exit_code} is not a failure in the exit table"
    if not 400 <= cls.http_status <= 599:
        return f"HTTP status {cls.http_status} is not an error"
    if not isinstance(cls.retry, Retry):
        return f"retry is {cls.retry!r}, expected one of {', '.join(Retry)}"
    return None


def _problem_with_words(cls: type[WardenError]) -> str | None:
    if "template" not in vars(cls) or not cls.template:
        return "it needs a message template of its own"
    undeclared = sorted(placeholders(cls.template) - set(cls.fields))
    if undeclared:
        return f"its template uses fields that it does not declare: {', '.join(undeclared)}"
    if not cls.suggestion:
        return "it needs a suggestion"
    if sys.flags.optimize >= 2:  # python -OO removes docstrings; everything else still holds
        return None
    missing = [title for title in SECTIONS if not sections_of(vars(cls).get("__doc__") or "").get(title)]
    return f"its docstring lacks the sections: {', '.join(missing)}" if missing else None
