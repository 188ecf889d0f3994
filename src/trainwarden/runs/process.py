"""Which process a number means: a pid together with what tells it from a later process of the same pid."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ProcessIdentity:
    """A process as the ledger remembers it.

    Attributes:
        pid: process id.
        start: when it started, as an opaque token; the kernel's tick count since boot together with the boot
            id where ``/proc`` has them (a wall clock may be set back), the creation time elsewhere.
        host: node name of the machine; a home directory may be shared by several.
    """

    pid: int
    start: str
    host: str

    @classmethod
    def current(cls) -> ProcessIdentity:
        """The calling process."""
        pid = os.getpid()
        return cls(pid=pid, start=_start_token(pid) or "", host=platform.node())

    def is_alive(self) -> bool | None:
        """Whether this very process still runs; ``None`` where that cannot be known: on another machine."""
        if self.host != platform.node():
            return None
        return _start_token(self.pid) == self.start


def _start_token(pid: int) -> str | None:
    """The token of a live process; ``None`` when no process has this pid or only its zombie is left."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except (FileNotFoundError, ProcessLookupError):
        return None if Path("/proc/self/stat").exists() else _creation_time(pid)
    except OSError:
        return _creation_time(pid)
    # The second field is the command's name in parentheses and may itself hold spaces and parentheses.
    fields = stat.rpartition(")")[2].split()
    state, start_ticks = fields[0], fields[19]
    return None if state in "ZX" else f"{boot}:{start_ticks}"


def _creation_time(pid: int) -> str | None:
    import psutil  # only where there is no /proc, and not at import time

    try:
        return f"{psutil.Process(pid).create_time():.2f}"
    except psutil.Error:
        return None
