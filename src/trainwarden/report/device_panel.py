"""The devices as a table with what has to be said about them below it, each sentence once for all it is true of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from trainwarden.device import ClocksEventReasons, Missing, Reading, Sample, SensorSilent, Value, Xid
from trainwarden.guards.health import xid_finding
from trainwarden.guards.thermal import ThermalPolicy
from trainwarden.guards.vram import VramPolicy
from trainwarden.report import text

GRAVE, DOUBTFUL, FAINT = "bold red", "yellow", "dim"
_THERMAL, _VRAM = ThermalPolicy(), VramPolicy()
_XIDS_SHOWN = 3
_HEADERS = ("HEAT", "HEADROOM", "MEMORY", "POWER", "BUSY", "CLOCKS")
_GAP = "  "
_NAME_COLUMNS = 8
_NO_RESTRAINT = frozenset({"gpu_idle"})
_SENSOR_WORDS = {
    "temperature_c": "temperature",
    "headroom_c": "headroom",
    "slowdown_headroom_c": "distance to slowdown",
    "memory_used_bytes": "memory in use",
    "memory_total_bytes": "memory in all",
    "power_w": "power",
    "power_limit_w": "power limit",
    "utilization_percent": "utilisation",
    "clocks_event_reasons": "clocks reasons",
    "ecc_uncorrected_volatile": "ECC errors",
    "ecc_uncorrected_aggregate": "ECC errors in its life",
    "remapped_rows": "remapped rows",
    "recovery_action": "recovery action",
    "pcie_replays": "PCIe replays",
    "nvlink_errors": "NVLink errors",
    "mig_enabled": "MIG",
}

Note = tuple[str, str, str]
"""Whom it is about (``GPU 0``), what is to be said, and its style."""


def device_panel(devices: Sample | SensorSilent, *, width: int) -> list[RenderableType]:
    """Table and notes; one line with the reason where nothing can be read.

    Args:
        devices: what the sampler has. The last reading of a silent one is shown faintly, with its age.
        width: columns; where they are few, names are cut and nothing else.
    """
    if isinstance(devices, SensorSilent):
        line = Text(f"GPUs: unknown, {clean(str(devices))}", GRAVE)
        if not devices.last.readings:
            return [line]
        line.append("; below is the last reading, which says nothing about now", FAINT)
        return [line, _table(devices.last.readings, width, FAINT)]
    if not devices.readings:
        return [Text(f"no GPU: {clean(devices.reason)}") if devices.sequence else Text("reading the devices …", FAINT)]
    notes = [*_machine_notes(devices), *_grouped(devices.readings)]
    return [_table(devices.readings, width), *(_note_line(note) for note in notes)]


def clean(words: str) -> str:
    """On one line and without characters that would steer the terminal: names and reasons come from anywhere."""
    return " ".join("".join(sign if sign.isprintable() else " " for sign in words).split())


def _table(readings: Sequence[Reading], width: int, style: str = "") -> Table:
    rows = [_cells(reading) for reading in readings]
    widths = [max(len(header), *(len(row[place]) for row in rows)) for place, header in enumerate(_HEADERS)]
    gaps = len(_GAP) * (len(_HEADERS) + 1)
    name_columns = max(_NAME_COLUMNS, width - len("GPU") - sum(widths) - gaps)
    table = Table(box=None, pad_edge=False, padding=(0, len(_GAP), 0, 0), header_style=FAINT)
    table.add_column("GPU", justify="right", no_wrap=True)
    table.add_column("NAME", no_wrap=True, overflow="ellipsis", max_width=name_columns)
    for header in _HEADERS:
        table.add_column(header, justify="left" if header == "CLOCKS" else "right", no_wrap=True)
    for reading, cells in zip(readings, rows, strict=True):
        name = clean(reading.name)
        shown = name if len(name) <= name_columns else name.removeprefix("NVIDIA ")
        # A colour would say something about now, which a faint table does not.
        table.add_row(str(reading.index), shown, *(cell.plain if style else cell for cell in cells), style=style)
    return table


def _cells(reading: Reading) -> list[Text]:
    return [
        _heat(reading),
        _headroom(reading),
        _memory(reading),
        _power(reading),
        _busy(reading),
        _clocks(reading),
    ]


def _missing(value: Missing) -> Text:
    return Text(str(value), DOUBTFUL if str(value) == text.UNKNOWN else FAINT)


def _heat(reading: Reading) -> Text:
    value = reading.temperature_c
    return _missing(value) if isinstance(value, Missing) else Text(text.temperature(value))


def _headroom(reading: Reading) -> Text:
    value = reading.headroom_c
    if isinstance(value, Missing):
        return _missing(value)
    style = GRAVE if value <= _THERMAL.pause_headroom_c else DOUBTFUL if value <= _THERMAL.warn_headroom_c else ""
    return Text(text.temperature(value), style)


def _memory(reading: Reading) -> Text:
    used, total = reading.memory_used_bytes, reading.memory_total_bytes
    if isinstance(used, Missing):
        return _missing(used)
    if isinstance(total, Missing) or total <= 0:
        return Text(text.size(used))
    share = used / total
    style = GRAVE if share > _VRAM.full_fraction else DOUBTFUL if share > _VRAM.relieved_fraction else ""
    return Text(f"{used / 2**30:.1f}/{total / 2**30:.1f} GiB", style)


def _power(reading: Reading) -> Text:
    drawn, limit = reading.power_w, reading.power_limit_w
    if isinstance(drawn, Missing):
        return _missing(drawn)
    return Text(f"{drawn:.0f} W" if isinstance(limit, Missing) else f"{drawn:.0f}/{limit:.0f} W")


def _busy(reading: Reading) -> Text:
    value = reading.utilization_percent
    return _missing(value) if isinstance(value, Missing) else Text(f"{value} %")


def _clocks(reading: Reading) -> Text:
    reasons = reading.clocks_event_reasons
    if isinstance(reasons, Missing):
        return _missing(reasons)
    if reasons.names - _NO_RESTRAINT:
        return Text("held", GRAVE if reasons.thermal else DOUBTFUL)
    return Text("idle" if reasons.names else "full")


def _note_line(note: Note) -> Text:
    whom, words, style = note
    return Text(f"{whom}: {clean(words)}" if whom else clean(words), style)


def _machine_notes(sample: Sample) -> Iterator[Note]:
    if sample.reason:
        yield "", sample.reason, DOUBTFUL
    for xid in sample.xids[-_XIDS_SHOWN:]:
        whom = "a GPU" if xid.index is None else f"GPU {xid.index}"
        yield whom, _xid(xid), FAINT if xid.action == "record" else GRAVE


def _xid(xid: Xid) -> str:
    return f"Xid {xid.code}, {xid.meaning} (needed: {xid_finding(xid).action.replace('_', ' ')})"


def _grouped(readings: Sequence[Reading]) -> list[Note]:
    """The notes of all devices, the gravest first; what is true of several is said once."""
    found: dict[tuple[str, str], list[int]] = {}
    for reading in readings:
        for words, style in _notes(reading):
            found.setdefault((words, style), []).append(reading.index)
    order = (GRAVE, DOUBTFUL, FAINT)
    notes = [(f"GPU {_ranges(indices)}", words, style) for (words, style), indices in found.items()]
    return sorted(notes, key=lambda note: order.index(note[2]))


def _notes(reading: Reading) -> Iterator[tuple[str, str]]:
    yield from _damage(reading)
    yield from _restraint(reading.clocks_event_reasons)
    if reading.headroom_note and not isinstance(reading.headroom_c, Missing):
        yield f"headroom: {reading.headroom_note}", FAINT
    if reading.memory_source == "host":
        yield "shares its memory with the host", FAINT
    yield from _missing_notes(reading)


def _damage(reading: Reading) -> Iterator[tuple[str, str]]:
    if reading.lost:
        yield "lost, fallen off the bus (needed: reboot node)", GRAVE
    if reading.reset_required:
        yield "the driver refuses to read it until it is reset", GRAVE
    rows, action, errors = reading.remapped_rows, reading.recovery_action, reading.ecc_uncorrected_volatile
    if not isinstance(rows, Missing) and rows.failed:
        yield "a bad memory row could not be replaced (needed: return card)", GRAVE
    if not isinstance(rows, Missing) and rows.pending:
        yield "bad memory rows are replaced at the next reset", DOUBTFUL
    if not isinstance(action, Missing) and action.needed:
        yield f"the driver asks for recovery action {action}", GRAVE
    if not isinstance(errors, Missing) and errors:
        yield f"{errors:,} uncorrectable ECC {'error' if errors == 1 else 'errors'} since the driver was loaded", GRAVE


def _restraint(reasons: Value[ClocksEventReasons]) -> Iterator[tuple[str, str]]:
    if not isinstance(reasons, Missing) and (names := reasons.names - _NO_RESTRAINT):
        yield f"clocks are held down by {', '.join(sorted(names))}", GRAVE if reasons.thermal else DOUBTFUL


def _missing_notes(reading: Reading) -> Iterator[tuple[str, str]]:
    """One note a kind and reason; none for a GPU of which worse is said. The sensors are listed unless it is all."""
    missing = {} if reading.lost or reading.reset_required else reading.missing()
    causes = sorted((str(value), value.reason, name) for name, value in missing.items())
    for (kind, reason), group in groupby(causes, key=lambda cause: cause[:2]):
        names = {name for _, _, name in group}
        style = DOUBTFUL if kind == text.UNKNOWN else FAINT
        listed = ", ".join(words for name, words in _SENSOR_WORDS.items() if name in names)
        yield f"{kind}: {'everything' if len(names) == len(_SENSOR_WORDS) else listed} ({reason})", style


def _ranges(indices: Sequence[int]) -> str:
    """``0-3, 5``."""
    parts: list[str] = []
    for _, run in groupby(enumerate(indices), key=lambda pair: pair[1] - pair[0]):
        numbers = [index for _, index in run]
        parts.append(str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}")
    return ", ".join(parts)
