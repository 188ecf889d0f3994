"""What a run tells the world while it goes: frozen events, and observers that are any callable taking one.

Every event prints as one plain sentence and serialises to one flat JSON object, so that a console, a log file and a
test can all listen to the same thing. Observers are called on the training thread: one that does slow work must hand
it to a thread of its own.
"""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

Level = Literal["debug", "info", "notice", "warning", "error"]
LEVELS: tuple[Level, ...] = ("debug", "info", "notice", "warning", "error")


@dataclass(frozen=True, kw_only=True)
class Event:
    """Base of all events. ``step`` counts completed optimizer steps at the moment of the event."""

    level: ClassVar[Level] = "info"
    step: int

    @property
    def name(self) -> str:
        """The snake-case name of the kind, as it stands in the event log (``micro_batch_shrunk``)."""
        return re.sub(r"(?<!^)(?=[A-Z])", "_", type(self).__name__).lower()


@dataclass(frozen=True, kw_only=True)
class RunStarted(Event):
    run_id: str
    run_dir: str

    def __str__(self) -> str:
        return f"run {self.run_id} started in {self.run_dir}"


@dataclass(frozen=True, kw_only=True)
class Resumed(Event):
    level: ClassVar[Level] = "notice"
    run_id: str
    checkpoint_path: str
    epoch: int
    batch_index: int

    def __str__(self) -> str:
        place = f"step {self.step}, epoch {self.epoch}, batch {self.batch_index}"
        return f"run {self.run_id} continues after {place} from {self.checkpoint_path}"


@dataclass(frozen=True, kw_only=True)
class RunFinished(Event):
    status: Literal["finished", "stopped", "failed"]
    steps_skipped: int
    checkpoint_path: str | None
    code: str | None = None

    def __str__(self) -> str:
        ending = f" with {self.code}" if self.code else ""
        return f"run {self.status}{ending} after {self.step} steps ({self.steps_skipped} skipped)"


@dataclass(frozen=True, kw_only=True)
class StepCompleted(Event):
    """An optimizer step lies behind, ``step_s`` seconds after the last one or after the run began.

    Carries no loss: reading one would synchronise the device.
    """

    level: ClassVar[Level] = "debug"
    epoch: int
    step_s: float

    def __str__(self) -> str:
        return f"step {self.step} completed in {self.step_s:.3f} s"


@dataclass(frozen=True, kw_only=True)
class StepSkipped(Event):
    level: ClassVar[Level] = "warning"
    what: Literal["loss", "gradient"]
    streak: int

    def __str__(self) -> str:
        return f"step {self.step} skipped: non-finite {self.what} ({self.streak} in a row); weights untouched"


@dataclass(frozen=True, kw_only=True)
class MicroBatchShrunk(Event):
    level: ClassVar[Level] = "warning"
    from_size: int
    to_size: int
    reason: str

    def __str__(self) -> str:
        sizes = f"micro-batch {self.from_size} -> {self.to_size}"
        return f"after step {self.step}: {sizes}, same effective batch ({self.reason})"


@dataclass(frozen=True, kw_only=True)
class MicroBatchGrown(Event):
    """A larger micro-batch than was known to fit was tried, and fits."""

    level: ClassVar[Level] = "notice"
    from_size: int
    to_size: int
    reason: str

    def __str__(self) -> str:
        return f"after step {self.step}: micro-batch {self.from_size} -> {self.to_size} fits ({self.reason})"


@dataclass(frozen=True, kw_only=True)
class MemoryRemedyApplied(Event):
    """Something else than a smaller micro-batch was done about memory that ran out; the batch is tried again."""

    level: ClassVar[Level] = "warning"
    remedy: Literal["release_cache", "enable_checkpointing", "offload_optimizer"]
    reason: str

    def __str__(self) -> str:
        return f"after step {self.step}: {self.remedy.replace('_', ' ')} and try again ({self.reason})"


@dataclass(frozen=True, kw_only=True)
class OptimizerStepFinished(Event):
    """An optimizer step ran out of memory and was finished, each parameter updated once, in ``parts`` parts."""

    level: ClassVar[Level] = "warning"
    parts: int
    reason: str

    def __str__(self) -> str:
        how = "after memory was released" if self.parts == 1 else f"in {self.parts} parts"
        return f"after step {self.step}: optimizer step finished {how}, same update ({self.reason})"


@dataclass(frozen=True, kw_only=True)
class EvaluationShrunk(Event):
    level: ClassVar[Level] = "warning"
    from_size: int
    to_size: int
    reason: str

    def __str__(self) -> str:
        return f"evaluation after step {self.step}: {self.from_size} -> {self.to_size} rows at a time ({self.reason})"


@dataclass(frozen=True, kw_only=True)
class CheckpointSaved(Event):
    path: str
    save_s: float

    def __str__(self) -> str:
        return f"checkpoint of step {self.step} written and verified in {self.save_s:.2f} s: {self.path}"


@dataclass(frozen=True, kw_only=True)
class CheckpointRejected(Event):
    level: ClassVar[Level] = "warning"
    path: str
    reason: str

    def __str__(self) -> str:
        return f"checkpoint {self.path} is not valid ({self.reason}); trying the one before it"


@dataclass(frozen=True, kw_only=True)
class CheckpointFailed(Event):
    level: ClassVar[Level] = "error"
    code: str
    reason: str
    failures: int

    def __str__(self) -> str:
        return f"no checkpoint at step {self.step} [{self.code}]: {self.reason} (failure {self.failures} in a row)"


@dataclass(frozen=True, kw_only=True)
class StopRequested(Event):
    """Served at a step boundary; the person who asked was told when the signal came."""

    reason: str

    def __str__(self) -> str:
        return f"stopping after step {self.step} on {self.reason}"


@dataclass(frozen=True, kw_only=True)
class Notice(Event):
    """Something a person should know once: an automatic choice with its reason, a limitation, an advice."""

    level: ClassVar[Level] = "notice"
    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, kw_only=True)
class MetricsLogged(Event):
    """One log line of a `Trainer`. ``None`` means *unknown*, never zero.

    ``loss`` is the mean over the logged window without skipped steps, NaN when every step in it was skipped.
    """

    max_steps: int
    loss: float
    grad_norm: float | None
    learning_rate: float
    tokens_per_s: float
    memory_bytes: int | None
    temperature_c: float | None
    steps_skipped: int
    shrinks: int

    def __str__(self) -> str:
        fields = [
            f"step {self.step}/{self.max_steps}",
            f"loss {self.loss:.4f}",
            f"grad_norm {'unknown' if self.grad_norm is None else f'{self.grad_norm:.3f}'}",
            f"lr {self.learning_rate:.2e}",
            f"{self.tokens_per_s:,.0f} tokens/s",
            f"memory {'unknown' if self.memory_bytes is None else f'{self.memory_bytes / 2**30:.2f} GiB'}",
        ]
        if self.temperature_c is not None:
            fields.append(f"{self.temperature_c:.0f} °C")
        if self.steps_skipped:
            fields.append(f"skipped {self.steps_skipped}")
        if self.shrinks:
            fields.append(f"shrinks {self.shrinks}")
        return "  ".join(fields)


@dataclass(frozen=True, kw_only=True)
class Evaluated(Event):
    loss: float
    rows: int

    def __str__(self) -> str:
        return f"evaluation after step {self.step}: loss {self.loss:.4f} over {self.rows} rows"


@dataclass(frozen=True, kw_only=True)
class DeviceHot(Event):
    """A device runs warm for longer than a spike. ``headroom_c`` is its distance to its own limit."""

    level: ClassVar[Level] = "warning"
    device: int
    temperature_c: float | None
    headroom_c: float | None
    reason: str

    def __str__(self) -> str:
        return f"GPU {self.device} is getting hot after step {self.step}: {self.reason}"


@dataclass(frozen=True, kw_only=True)
class ThermalPause(Event):
    level: ClassVar[Level] = "warning"
    device: int
    temperature_c: float | None
    headroom_c: float | None
    reason: str
    resume_headroom_c: float

    def __str__(self) -> str:
        return (
            f"training pauses after step {self.step}: GPU {self.device} is too hot ({self.reason}); "
            f"it continues once {self.resume_headroom_c:.0f} °C of headroom are back"
        )


@dataclass(frozen=True, kw_only=True)
class ThermalResume(Event):
    level: ClassVar[Level] = "notice"
    device: int
    temperature_c: float | None
    headroom_c: float | None
    paused_s: float

    def __str__(self) -> str:
        now = "" if self.temperature_c is None else f" at {self.temperature_c:.0f} °C"
        return f"training continues after step {self.step}: GPU {self.device} has cooled{now} ({self.paused_s:.0f} s)"


@dataclass(frozen=True, kw_only=True)
class MemoryPressure(Event):
    """The device as a whole is nearly full, and not by this process. ``foreign_*`` name the largest other process."""

    level: ClassVar[Level] = "warning"
    device: int
    used_bytes: int
    total_bytes: int
    foreign_pid: int | None
    foreign_bytes: int | None
    action: Literal["release_cache", "shrink"]

    def __str__(self) -> str:
        share = f"{self.used_bytes / self.total_bytes:.0%} of the memory of GPU {self.device}"
        who = "another process" if self.foreign_pid is None else f"process {self.foreign_pid}"
        held = "" if self.foreign_bytes is None else f" with {self.foreign_bytes / 2**30:.1f} GiB"
        then = "returning cached memory" if self.action == "release_cache" else "shrinking the micro-batch"
        return f"{share} is in use after step {self.step}, some of it by {who}{held}: {then}"


@dataclass(frozen=True, kw_only=True)
class DeviceUnhealthy(Event):
    """The driver reports damage. ``action`` is what a person or a scheduler should do about it."""

    level: ClassVar[Level] = "warning"
    device: int | None
    condition: str
    action: str
    xid: int | None
    problem: str

    def __str__(self) -> str:
        place = "a GPU" if self.device is None else f"GPU {self.device}"
        return f"{place} is not healthy: {self.problem} (needed: {self.action.replace('_', ' ')})"


@dataclass(frozen=True, kw_only=True)
class SensorsSilent(Event):
    """Nothing can be read: of one device, or of all (``device`` is ``None``). The hardware is unknown, not healthy."""

    level: ClassVar[Level] = "warning"
    device: int | None
    reason: str

    def __str__(self) -> str:
        whose = "the GPUs" if self.device is None else f"GPU {self.device}"
        return f"the state of {whose} is unknown after step {self.step}: {self.reason}"


@dataclass(frozen=True, kw_only=True)
class SensorsBack(Event):
    level: ClassVar[Level] = "notice"
    device: int | None
    silent_s: float

    def __str__(self) -> str:
        whose = "the GPUs" if self.device is None else f"GPU {self.device}"
        return f"the sensors of {whose} can be read again after {self.silent_s:.0f} s"


Observer = Callable[[Event], None]


def to_dict(event: Event) -> dict[str, Any]:
    """The event as a flat JSON-serialisable object; NaN and infinity stay visible, as ``"nan"`` and ``"inf"``."""
    fields = {field.name: getattr(event, field.name) for field in dataclasses.fields(event)}
    return {"event": event.name, "level": event.level, **{k: _jsonable(v) for k, v in fields.items()}}


def announce(event: Event) -> None:
    """The default observer: what a person should notice, one line each, on stderr."""
    if LEVELS.index(event.level) >= LEVELS.index("notice"):
        print(f"warden: {event}", file=sys.stderr, flush=True)


def _jsonable(value: Any) -> Any:
    # JSON has no NaN: strict parsers reject the bare word, and null would hide what happened.
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
