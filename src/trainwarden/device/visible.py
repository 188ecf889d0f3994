"""Which GPUs this process's CUDA will see, and in which order: a pure reading of ``CUDA_VISIBLE_DEVICES``.

NVML numbers all GPUs of the machine and ignores that variable; torch numbers what CUDA leaves visible. The
two are brought together by UUID here, without initialising CUDA, by the rules of the CUDA programming guide
(and of torch's own parser): the list ends at the first invalid entry, and an entry named twice empties it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

VARIABLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, slots=True)
class MigPart:
    """One compute instance of a GPU in MIG mode."""

    uuid: str
    gpu_instance: int | None = None
    compute_instance: int | None = None


@dataclass(frozen=True, slots=True)
class PhysicalGpu:
    """One GPU as NVML numbers it. ``uuid`` is None when the driver could not even name it."""

    nvml_index: int
    uuid: str | None
    name: str
    mig_enabled: bool = False
    parts: tuple[MigPart, ...] = ()


@dataclass(frozen=True, slots=True)
class Visible:
    """A device that CUDA will number by its place in the list: a whole GPU, or one MIG part of it."""

    gpu: PhysicalGpu
    part: MigPart | None = None


@dataclass(frozen=True, slots=True)
class Selection:
    """The visible devices in CUDA's order, and what a person should know about them (empty: nothing)."""

    devices: tuple[Visible, ...]
    note: str


def select(gpus: Sequence[PhysicalGpu], environ: Mapping[str, str]) -> Selection:
    """The devices that CUDA will enumerate among ``gpus`` under the variables in ``environ``."""
    setting = environ.get(VARIABLE)
    if setting is None:
        chosen, note = _defaults(gpus)
    elif setting.startswith(("GPU-", "MIG-")):
        chosen, note = _by_identifier(gpus, setting)
    else:
        chosen, note = _by_ordinal(gpus, setting)
    notes = [note] if note else []
    if chosen and not (setting or "").startswith(("GPU-", "MIG-")):
        notes += _order_caveat(gpus, environ)
    return Selection(tuple(chosen), "; ".join(notes))


def _defaults(gpus: Sequence[PhysicalGpu]) -> tuple[list[Visible], str]:
    whole = [Visible(gpu) for gpu in gpus if not gpu.mig_enabled]
    if whole:
        hidden = len(gpus) - len(whole)
        return whole, f"{hidden} GPU in MIG mode must be chosen by MIG UUID" if hidden else ""
    parts = [Visible(gpu, part) for gpu in gpus for part in gpu.parts][:1]
    if gpus and not parts:
        return [], "all GPUs are in MIG mode and none has an instance"
    return parts, ""


def _by_ordinal(gpus: Sequence[PhysicalGpu], setting: str) -> tuple[list[Visible], str]:
    numbers: list[int] = []
    for entry in setting.split(","):
        number = _leading_integer(entry.strip())
        if number in numbers:
            return [], _says(setting, f"names {number} twice, which hides every GPU")
        if number < 0:
            break
        numbers.append(number)
    kept = next((place for place, number in enumerate(numbers) if number >= len(gpus)), len(numbers))
    return _ordinals(gpus, numbers[:kept]), _cut_short(setting, kept)


def _ordinals(gpus: Sequence[PhysicalGpu], chosen: Sequence[int]) -> list[Visible]:
    found: list[Visible] = []
    for number in chosen:
        gpu = gpus[number]
        if gpu.mig_enabled and not gpu.parts:
            continue
        found.append(Visible(gpu, gpu.parts[0]) if gpu.mig_enabled else Visible(gpu))
    return found


def _by_identifier(gpus: Sequence[PhysicalGpu], setting: str) -> tuple[list[Visible], str]:
    prefix = setting[:4]
    entries = [entry.strip() for entry in setting.split(",")]
    kind = next((place for place, entry in enumerate(entries) if not entry.startswith(prefix)), len(entries))
    entries = entries[:kind]
    if len(set(entries)) < len(entries):
        return [], _says(setting, "names a device twice, which hides every GPU")
    chosen: list[Visible] = []
    for entry in entries:
        matches = _matches(gpus, entry)
        if len(matches) > 1:
            return chosen, _cut_short(setting, len(chosen), f"{entry!r} fits {len(matches)} devices")
        if not matches:
            break
        if matches[0] in chosen:
            return [], _says(setting, f"names {entry} twice, which hides every GPU")
        chosen.append(matches[0])
    return chosen, _cut_short(setting, len(chosen))


def _matches(gpus: Sequence[PhysicalGpu], identifier: str) -> list[Visible]:
    """Devices whose UUID begins with ``identifier``; MIG parts by their full UUID or their legacy name."""
    if identifier.startswith("GPU-"):
        return [Visible(gpu) for gpu in gpus if gpu.uuid is not None and gpu.uuid.startswith(identifier)]
    every = [(gpu, part) for gpu in gpus for part in gpu.parts]
    return [Visible(gpu, part) for gpu, part in every if identifier in (part.uuid, _legacy_name(gpu, part))]


def _legacy_name(gpu: PhysicalGpu, part: MigPart) -> str:
    return f"MIG-{gpu.uuid}/{part.gpu_instance}/{part.compute_instance}"


def _leading_integer(text: str) -> int:
    """What C's strtoul makes of it, as CUDA does: ``"1gpu"`` is 1; no digits at all is −1."""
    digits = text[1:] if text[:1] in ("+", "-") else text
    length = 0
    while length < len(digits) and digits[length] in "0123456789":
        length += 1
    if not length:
        return -1
    value = int(digits[:length])
    return -1 if text.startswith("-") else value


def _order_caveat(gpus: Sequence[PhysicalGpu], environ: Mapping[str, str]) -> list[str]:
    # CUDA's default order is "fastest first"; it equals NVML's PCI order whenever all GPUs are the same
    # model.
    if environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID" or len({gpu.name for gpu in gpus}) < 2:
        return []
    return ["GPUs of different models: set CUDA_DEVICE_ORDER=PCI_BUS_ID, or numbers may name another GPU to CUDA"]


def _cut_short(setting: str, kept: int, why: str = "") -> str:
    """What to say when CUDA stops reading the list after ``kept`` entries; empty when it reads all of it."""
    entries = setting.split(",")
    if kept == len(entries):
        return ""
    if not setting.strip():
        return f"{VARIABLE} is empty"
    reason = why or f"{entries[kept].strip()!r} names no GPU here"
    return _says(setting, f"{reason}; {kept} visible before it" if kept else reason)


def _says(setting: str, problem: str) -> str:
    return f"{VARIABLE}={setting}: {problem}"
