"""Numbers and tables as text. Unknown reads "unknown" and NaN reads "NaN": neither ever reads 0."""

from __future__ import annotations

import math
from collections.abc import Sequence

UNKNOWN = "unknown"

Number = float | str | None
"""A number as events and results carry it to JSON: ``"nan"``, ``"inf"`` and ``"-inf"`` are words there."""


def as_number(value: Number) -> float | None:
    """The number behind a JSON value; ``None`` for unknown."""
    return None if value is None else float(value)


def number(value: Number, digits: int = 4) -> str:
    """``1.2346``, ``NaN``, ``inf`` or ``unknown``."""
    real = as_number(value)
    if real is None:
        return UNKNOWN
    return "NaN" if math.isnan(real) else f"{real:.{digits}f}"


def count(value: int | None) -> str:
    """``12,345`` or ``unknown``."""
    return UNKNOWN if value is None else f"{value:,}"


def size(value_bytes: int | None) -> str:
    """GiB (1024³ bytes), or MiB below a tenth of one."""
    if value_bytes is None:
        return UNKNOWN
    gib = value_bytes / 2**30
    return f"{gib:.2f} GiB" if gib >= 0.1 else f"{value_bytes / 2**20:.1f} MiB"


def temperature(value_c: float | None) -> str:
    return UNKNOWN if value_c is None else f"{value_c:.0f} °C"


def duration(value_s: Number) -> str:
    """``4.2 s``, ``3 min 05 s``, ``2 h 07 min``."""
    real = as_number(value_s)
    if real is None or not math.isfinite(real):
        return UNKNOWN
    if real < 60:
        return f"{real:.1f} s"
    minutes, seconds = divmod(round(real), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"


def word(value: object | None) -> str:
    return UNKNOWN if value is None else str(value)


def pairs(rows: Sequence[tuple[str, str]], indent: str = "  ") -> str:
    """Labels and values, the values in one column."""
    width = max((len(label) for label, _ in rows), default=0)
    return "\n".join(f"{indent}{label:<{width}}  {value}".rstrip() for label, value in rows)


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], right: frozenset[str] = frozenset()) -> str:
    """Columns under their headers, as wide as they need; those named in ``right`` are set flush right."""
    lines = [headers, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headers))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if header in right else cell.ljust(width)
            for header, cell, width in zip(headers, line, widths, strict=True)
        ).rstrip()
        for line in lines
    )
