"""``warden watch``: the devices, the host and a run as they are now, drawn again every second."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from trainwarden.device import (
    HostMemory,
    Missing,
    Sample,
    SensorSilent,
    Value,
    disk_free_bytes,
    host_memory,
)
from trainwarden.errors import WardenError
from trainwarden.report import text
from trainwarden.report.console import no_color
from trainwarden.report.device_panel import DOUBTFUL, FAINT, GRAVE, clean, device_panel
from trainwarden.report.progress import Follower
from trainwarden.report.run_panel import RunView, run_panel, runs_panel
from trainwarden.runs import Ledger, RunRecord, find_run

PERIOD_S = 1.0
_COLUMNS_OF_A_PIPE = 120
_FIRST_PERIOD_S = 0.1
"""While the devices have not answered yet."""
_FULL, _NEARLY_FULL = 0.95, 0.90


@dataclass(frozen=True, kw_only=True)
class View:
    """All that is shown of one moment.

    Attributes:
        run: the run that is watched; ``None`` when none was named.
        running: without one, all runs of the ledger that are running.
        problem: why the ledger cannot be read; empty when it can.
    """

    devices: Sample | SensorSilent
    host: HostMemory
    disk_path: Path
    disk_free_bytes: Value[int]
    now: datetime
    run: RunView | None = None
    running: tuple[RunView, ...] = ()
    problem: str = ""

    @property
    def over(self) -> bool:
        """Whether nothing more will happen: the watched run has ended."""
        return self.run is not None and self.run.over

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable. Readings of a sensor that fell silent stand under ``silence``, never under ``devices``."""
        silent = self.devices if isinstance(self.devices, SensorSilent) else None
        sample = self.devices if isinstance(self.devices, Sample) else None
        host, free = self.host, self.disk_free_bytes
        return {
            "taken_at": self.now.isoformat(timespec="milliseconds"),
            "devices": [reading.to_dict() for reading in sample.readings] if sample else [],
            "devices_note": sample.reason if sample else str(silent),
            "silence": None
            if silent is None
            else {
                "silent_s": silent.silent_s,
                "call": silent.call,
                "last_devices": [reading.to_dict() for reading in silent.last.readings],
            },
            "host": {
                "memory_total_bytes": host.total_bytes,
                "memory_available_bytes": host.available_bytes,
                "memory_limit": host.limit_source,
                "disk_path": str(self.disk_path),
                "disk_free_bytes": {str(free): free.reason} if isinstance(free, Missing) else free,
            },
            "run": None if self.run is None else self.run.to_dict(),
            "running": [run.to_dict() for run in self.running],
            "problem": self.problem,
        }


def console_on(stream: TextIO) -> Console:
    """Where a view is printed: coloured on a terminal unless ``NO_COLOR`` is set, plain and wide elsewhere."""
    terminal = stream.isatty()
    width = None if terminal or "COLUMNS" in os.environ else _COLUMNS_OF_A_PIPE
    return Console(file=stream, force_terminal=terminal, no_color=no_color(), highlight=False, width=width)


def render(view: View, *, width: int, unicode: bool = True) -> RenderableType:
    """One moment as text for ``width`` columns; block characters only where ``unicode`` says that they can be shown."""
    parts: list[RenderableType] = [*device_panel(view.devices, width=width), _host_line(view)]
    if view.problem:
        parts.append(Text(f"runs: {clean(view.problem)}", DOUBTFUL))
    if view.run is not None:
        parts += [Text(), *run_panel(view.run, view.now, width=width, unicode=unicode)]
    elif view.running:
        parts += [Text(), *runs_panel(view.running, width=width)]
    elif not view.problem:
        parts += [Text(), Text("no run is running", FAINT)]
    return Group(*parts)


def print_view(console: Console, view: View, *, unicode: bool = True) -> None:
    """One moment, printed where the cursor is. Lines end where their words do."""
    with console.capture() as captured:
        console.print(render(view, width=console.width, unicode=unicode))
    # Not through rich again, which would take what it has coloured for plain words.
    console.file.write("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))


def _host_line(view: View) -> Text:
    host, free = view.host, view.disk_free_bytes
    used = host.total_bytes - host.available_bytes
    share = used / host.total_bytes if host.total_bytes else 0.0
    style = GRAVE if share > _FULL else DOUBTFUL if share > _NEARLY_FULL else ""
    limit = " of its cgroup" if host.limit_source == "cgroup" else ""
    disk = f"{free} ({free.reason})" if isinstance(free, Missing) else f"{text.size(free)} free"
    return Text.assemble(
        ("host  ", FAINT),
        (f"memory {used / 2**30:.1f}/{host.total_bytes / 2**30:.1f} GiB{limit}", style),
        f"  disk {clean(disk)}",
        " for the run" if view.run is not None else f" at {clean(str(view.disk_path))}",
    )


class Watch:
    """Looks at devices and runs, once or until the watched run has ended.

    Args:
        devices: what a sampler has (`Sampler.latest`), or a sample of now (`snapshot`).
        ledger: where runs are found.
        reference: the run, as it was typed; ``None`` for the devices with a list of what is running.
        sleep: waits so many seconds.
        clock: the time of day, with its zone.

    Raises:
        RunNotFoundError, ConfigurationError, LedgerError: as `trainwarden.runs.find_run`, for ``reference``.
    """

    def __init__(
        self,
        devices: Callable[[], Sample | SensorSilent],
        ledger: Ledger,
        reference: str | None = None,
        *,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._devices = devices
        self._ledger = ledger
        self._sleep = sleep
        self._clock = clock
        self._followers: dict[str, Follower] = {}
        self._run = None if reference is None else find_run(reference, ledger)

    def look(self) -> View:
        """What is so now. A ledger that cannot be read any more is said, not raised."""
        problem = ""
        run: RunView | None = None
        running: tuple[RunView, ...] = ()
        try:
            if self._run is None:
                records = [record for record in self._ledger.rows() if record.status == "running"]
                running = tuple(self._followed(record.run_id, Path(record.path), record) for record in records)
            else:
                record = self._run.record
                self._run = find_run(str(self._run.path) if record is None else record.run_id, self._ledger)
        except WardenError as error:
            problem = str(error)
        if self._run is not None:
            found = self._run
            name = found.record or found.manifest
            run = self._followed(name.run_id if name else text.UNKNOWN, found.path, found.record)
        place = (run.path if run else Path()).absolute()
        return View(
            devices=self._devices(),
            host=host_memory(),
            disk_path=place,
            disk_free_bytes=disk_free_bytes(place),
            now=self._clock(),
            run=run,
            running=running,
            problem=problem,
        )

    def _followed(self, run_id: str, path: Path, record: RunRecord | None) -> RunView:
        follower = self._followers.setdefault(run_id, Follower(path / "events.jsonl"))
        progress = follower.read_on()
        return RunView(run_id=run_id, path=path, record=record, progress=progress, problem=follower.problem)

    def show(self, console: Console, *, unicode: bool = True) -> None:
        """Draw every second until the run has ended, Ctrl-C or SIGTERM; the last view then stays on the terminal."""
        view = None
        try:
            # The alternate screen: nothing of the terminal's content is lost, and a resize cannot tear the picture.
            with _sigterm_as_interrupt(), Live(console=console, screen=True, auto_refresh=False) as live:
                while view is None or not view.over:
                    if view is not None:
                        self._sleep(_FIRST_PERIOD_S if _first(view) else PERIOD_S)
                    view = self.look()
                    hint = Text("\nCtrl-C ends this view, not the run", FAINT)
                    live.update(Group(render(view, width=console.width, unicode=unicode), hint), refresh=True)
        except KeyboardInterrupt:
            pass
        if view is not None:
            print_view(console, view, unicode=unicode)


def _first(view: View) -> bool:
    return isinstance(view.devices, Sample) and view.devices.sequence == 0


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """A terminated view too gives the terminal back. Off the main thread signals are left alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
