"""Turn whatever an error was raised with into JSON values, and these into plain words; nothing raises."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterable, Mapping
from enum import Enum
from os import PathLike, fspath
from typing import Any

JSON = Any
"""A JSON value: ``None``, ``bool``, ``int``, ``float``, ``str``, or a list or string-keyed dict of these."""

_MAX_DEPTH = 12
_MAX_REPR_CHARACTERS = 2000
_MAX_INTEGER_BITS = 1024  # json refuses to print integers of more than 4300 digits
_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")
_OPTIONAL = re.compile(r"\[([^\[\]]*)\]")
_PLACEHOLDER = re.compile(r"\{(\w+)\}")


def jsonable(value: object, depth: int = 0) -> JSON:
    """`value` as a JSON value; what JSON cannot hold becomes its string form (cut at 2000 characters).

    Non-finite floats stay floats, so that a message can print them; `finite` spells them for the wire.
    """
    try:
        return _convert(value, depth)
    except Exception:  # noqa: BLE001 - boundary: a foreign __iter__, __index__ or keys() may raise anything
        return text_of(value)


def finite(value: JSON) -> JSON:
    """`value` with every NaN and infinity as a string (``"nan"``, ``"inf"``): JSON has no word for them."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return value


def _convert(value: object, depth: int) -> JSON:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Enum):
        return jsonable(value.value, depth + 1) if depth < _MAX_DEPTH else text_of(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, PathLike):
        path = fspath(value)
        return path if isinstance(path, str) else text_of(path)
    if isinstance(value, Mapping | list | tuple | set | frozenset):
        return _container(value, depth) if depth < _MAX_DEPTH else "…"
    if hasattr(type(value), "__index__"):  # int, numpy integers, integer tensors of one element
        integer = operator.index(value)  # type: ignore[arg-type]  # guarded by the line above
        return integer if integer.bit_length() <= _MAX_INTEGER_BITS else hex(integer)
    return text_of(value)


def _container(value: Mapping[object, object] | Iterable[object], depth: int) -> JSON:
    if isinstance(value, Mapping):
        return {text_of(key): jsonable(item, depth + 1) for key, item in value.items()}
    items = [jsonable(item, depth + 1) for item in value]
    return sorted(items, key=text_of) if isinstance(value, set | frozenset) else items


def text_of(value: object) -> str:
    """`str(value)`, cut at 2000 characters, whatever its class does."""
    try:
        text = str(value)
    except Exception:  # noqa: BLE001 - boundary: a foreign __str__ may raise anything
        return f"<unprintable {type(value).__name__}>"
    return text if len(text) <= _MAX_REPR_CHARACTERS else f"{text[:_MAX_REPR_CHARACTERS]}…"


def fill(template: str, details: Mapping[str, JSON]) -> str:
    """The sentence that `template` makes of `details`.

    ``{name}`` stands for a detail; a part in square brackets is left out when a detail it names is missing or
    ``None``. Outside brackets a missing detail reads "unknown". Values are never parsed, whatever they hold.
    """

    def optional(match: re.Match[str]) -> str:
        names = _PLACEHOLDER.findall(match[1])
        return match[1] if all(details.get(name) is not None for name in names) else ""

    def value(match: re.Match[str]) -> str:
        return plain(details.get(match[1]), unit_of=match[1])

    return _PLACEHOLDER.sub(value, _OPTIONAL.sub(optional, template))


def placeholders(template: str) -> frozenset[str]:
    """The names of the details that `template` uses."""
    return frozenset(_PLACEHOLDER.findall(template))


def plain(value: JSON, unit_of: str = "") -> str:
    """`value` in words: ``None`` is "unknown", an empty list "none"; `unit_of` names the detail."""
    if value is None:
        return "unknown"
    if isinstance(value, dict):
        return "; ".join(f"{key} {_nested(item)}" for key, item in value.items()) or "none"
    if isinstance(value, list):
        words = [plain(item) for item in value]
        return ("; " if any("," in word for word in words) else ", ").join(words) or "none"
    if unit_of.endswith("_bytes") and isinstance(value, int) and not isinstance(value, bool):
        return bytes_in_words(value)
    return str(value)


def _nested(value: JSON) -> str:
    return f"({', '.join(f'{k} {plain(v)}' for k, v in value.items())})" if isinstance(value, dict) else plain(value)


def bytes_in_words(count_bytes: int) -> str:
    """A size for people, in powers of 1024: ``1.50 GiB``."""
    size, unit = float(count_bytes), 0
    while abs(size) >= 1024 and unit < len(_UNITS) - 1:
        size, unit = size / 1024, unit + 1
    return f"{count_bytes} bytes" if unit == 0 else f"{size:.2f} {_UNITS[unit]}"
