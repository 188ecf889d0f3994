"""Xids as NVML delivers them: an event set over the GPUs, emptied at each poll. Linux only."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from .binding import TIMEOUT, Nvml, nvml
from .values import Missing, Unknown, Unsupported

_XID_EVENT = 0x8
_WAIT_MS = 1
_MOST_PER_POLL = 64


class XidWatch:
    """Watches the cards with the given UUIDs from now on: NVML does not replay earlier events.

    ``unwatched`` says of which cards no Xid can be heard, and why.
    """

    def __init__(self, uuids: Sequence[str]) -> None:
        self._uuids = tuple(dict.fromkeys(uuids))
        self._library: Nvml | None = None
        self._events: Any = None
        self._by_address: dict[int, str] = {}
        self.unwatched: Mapping[str, Unsupported | Unknown] = {}

    def listen(self) -> Nvml | None:
        """Register with the driver, once for each initialisation of NVML; None when nothing can be heard."""
        if not self._uuids:
            return None
        library = nvml()
        if not isinstance(library, Nvml):
            self.unwatched = dict.fromkeys(self._uuids, library)
            return None
        if library is not self._library:
            self._register(library)
        return library if self._by_address else None

    def drain(self) -> tuple[tuple[int, str | None], ...]:
        """The (Xid, UUID) pairs since the last call; the UUID is None when the driver does not say."""
        library = self.listen()
        if library is None:
            return ()
        found: list[tuple[int, str | None]] = []
        while len(found) < _MOST_PER_POLL:
            event = library.call("nvmlEventSetWait_v2", self._events, _WAIT_MS)
            if isinstance(event, Unsupported | Unknown):
                if event.nvml_code != TIMEOUT:
                    self.unwatched = dict.fromkeys(self._uuids, event)
                break
            if event.eventType & _XID_EVENT:
                found.append((int(event.eventData), self._by_address.get(_address(event.device))))
        return tuple(found)

    def _register(self, library: Nvml) -> None:
        self._library, self._events, self._by_address = library, None, {}
        if not sys.platform.startswith("linux"):
            self.unwatched = dict.fromkeys(self._uuids, Unsupported("NVML delivers Xids on Linux only"))
            return
        events = library.call("nvmlEventSetCreate")
        if isinstance(events, Unsupported | Unknown):
            self.unwatched = dict.fromkeys(self._uuids, events)
            return
        self._events = events
        unwatched: dict[str, Unsupported | Unknown] = {}
        for uuid in self._uuids:
            handle = library.call("nvmlDeviceGetHandleByUUID", uuid)
            outcome = handle
            if not isinstance(handle, Missing):
                outcome = library.call("nvmlDeviceRegisterEvents", handle, _XID_EVENT, events)
            if isinstance(outcome, Unsupported | Unknown):
                unwatched[uuid] = outcome
            else:
                self._by_address[_address(handle)] = uuid
        self.unwatched = unwatched


def _address(handle: Any) -> int:
    return ctypes.cast(handle, ctypes.c_void_p).value or 0
