"""Xid errors: what the driver reports when a GPU, its link or a program on it fails, and what to do then.

Actions follow NVIDIA's catalogue for data-centre GPUs as of late 2025; names follow the driver's
``nverror.h``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

XidAction = Literal["restart_job", "reset_gpu", "reboot_node", "inspect", "record", "support", "unlisted"]
"""What to do: restart the job; reset the GPU first; reboot the machine first; follow the workflow of that Xid
(another Xid or counter decides); keep a record only; ask NVIDIA's support; or the table does not list it."""

_NAMES = {
    13: "graphics engine exception",
    31: "GPU memory page fault",
    32: "DMA engine (PBDMA) error",
    39: "copy engine error",
    43: "GPU stopped processing (channel reset)",
    45: "preemptive removal after an earlier error",
    46: "GPU stopped processing",
    48: "double-bit ECC error",
    61: "internal microcontroller breakpoint",
    62: "internal microcontroller halt",
    63: "page retirement or row remapping recorded",
    64: "page retirement or row remapping failed",
    69: "graphics engine class error",
    74: "NVLink error",
    79: "GPU has fallen off the bus",
    92: "high rate of single-bit ECC errors",
    94: "contained memory error",
    95: "uncontained memory error",
    119: "GPU system processor (GSP) call timed out",
    120: "GPU system processor (GSP) error",
    121: "chip-to-chip link error",
    140: "unrecovered ECC error",
    154: "GPU recovery action changed",
}
_ACTIONS: dict[XidAction, tuple[int, ...]] = {
    "restart_job": (13, 31, 32, 39, 69, 94),
    "reset_gpu": (46, 62, 64, 95, 109, 110, 119, 120, 136, 140, 143, 155, 156, 158),
    "reboot_node": (79, 151),
    "inspect": (45, 48, 74, 144, 145, 146, 147, 148, 149, 150, 154),
    "record": (43, 63, 92, 121, 137, 157),
    "support": (61, 142),
}
_ACTION_OF = {code: action for action, codes in _ACTIONS.items() for code in codes}


@dataclass(frozen=True, slots=True)
class Xid:
    """One Xid event of one device, as the driver delivered it."""

    sequence: int
    """Counts the Xids of one sampler from 1: what a consumer remembers to see each once."""
    code: int
    index: int | None
    """The device as torch numbers it; None when the driver could not say which one."""
    uuid: str | None
    taken_at_s: float

    @property
    def meaning(self) -> str:
        return xid_meaning(self.code)

    @property
    def action(self) -> XidAction:
        return xid_action(self.code)

    def __str__(self) -> str:
        place = "an unidentified GPU" if self.index is None else f"GPU {self.index}"
        return f"Xid {self.code} on {place}: {self.meaning}"


def xid_meaning(code: int) -> str:
    """A short name; for codes without one, where to look."""
    return _NAMES.get(code, "see NVIDIA's Xid catalogue")


def xid_action(code: int) -> XidAction:
    """What to do about this Xid; ``unlisted`` when the table has no entry, which does not mean harmless."""
    return _ACTION_OF.get(code, "unlisted")
