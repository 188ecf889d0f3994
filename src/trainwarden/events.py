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
    """``tensor`` is the first one that was not finite: ``loss``, or the parameter of a gradient. ``None``: unknown.

    ``micro_batch`` counts the backward passes of the step from 0; ``samples`` are indices into the data set.
    """

    level: ClassVar[Level] = "warning"
    what: Literal["loss", "gradient"]
    streak: int
    tensor: str | None = None
    kind: Literal["nan", "+inf", "-inf", "inf"] | None = None
    micro_batch: int | None = None
    epoch: int | None = None
    batch_index: int | None = None
    samples: tuple[int, ...] | None = None

    def __str__(self) -> str:
        place = self._place()
        return f"step {self.step} skipped: non-finite {self.what}{place} ({self.streak} in a row); weights untouched"

    def _place(self) -> str:
        named = [f"{self.kind} in {self.tensor}"] if self.tensor and self.tensor != self.what else []
        named += [self.kind] if self.tensor == self.what and self.kind else []
        named += [f"micro-batch {self.micro_batch}"] if self.micro_batch is not None else []
        named += [f"epoch {self.epoch}, batch {self.batch_index}"] if self.batch_index is not None else []
        named += [f"samples {_few(self.samples)}"] if self.samples else []
        return f", {', '.join(named)}" if named else ""


@dataclass(frozen=True, kw_only=True)
class SpikeDetected(Event):
    """The loss or the gradient norm of step ``step`` is far above its usual range."""

    level: ClassVar[Level] = "warning"
    signal: Literal["loss", "grad_norm"]
    value: float
    usual: float
    deviations: float

    def __str__(self) -> str:
        how = f"{self.value:.4g} where {self.usual:.4g} is usual ({self.deviations:.1f} deviations)"
        return f"spike of the {self.signal} at step {self.step}: {how}"


@dataclass(frozen=True, kw_only=True)
class CollapseDetected(Event):
    """A watched representation has degenerated, and the policy is to tell it."""

    level: ClassVar[Level] = "warning"
    representation: str
    criterion: Literal["variance", "effective_rank", "pairwise_distance"]
    value: float
    threshold: float

    def __str__(self) -> str:
        figure = f"{self.criterion} {self.value:.4g} is below {self.threshold:.4g}"
        return f"{self.representation} has collapsed after step {self.step}: {figure}"


@dataclass(frozen=True, kw_only=True)
class RolledBack(Event):
    """The run continues from an earlier checkpoint, and will leave out the batches of some steps."""

    level: ClassVar[Level] = "warning"
    first_step: int
    last_step: int
    learning_rate_factor: float
    reason: str

    def __str__(self) -> str:
        rate = "" if self.learning_rate_factor == 1 else f", learning rates times {self.learning_rate_factor:g}"
        left_out = f"the batches of steps {self.first_step} to {self.last_step} are left out{rate}"
        return f"rolled back to step {self.step}: {left_out} ({self.reason})"


@dataclass(frozen=True, kw_only=True)
class DataSkipped(Event):
    """A sample, or a whole batch, could not be read, decoded or collated and was left out.

    ``index`` is the sample's in its data set; ``count`` and ``share`` are all that was left out so far. ``cause`` names
    the kind of the error and its place, and quotes no data.
    """

    level: ClassVar[Level] = "warning"
    what: Literal["sample", "batch"]
    epoch: int
    batch_index: int
    index: int | str | None
    cause: str
    count: int
    share: float

    def __str__(self) -> str:
        batch = f"batch {self.batch_index} of epoch {self.epoch}"
        which = batch if self.what == "batch" else f"sample {self.index} in {batch}"
        return f"after step {self.step}: {which} left out: {self.cause} ({self.count} so far, {self.share:.2%})"


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
class WentBack(Event):
    """A `Trainer` goes on from an earlier step, in process, and does again what came after it. Nothing is left out."""

    level: ClassVar[Level] = "warning"
    from_step: int
    reason: str

    def __str__(self) -> str:
        return f"went back from step {self.from_step} to step {self.step}, to train on from there ({self.reason})"


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


def _few(numbers: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    return f"{shown}, … ({len(numbers)} in all)" if len(numbers) > 8 else shown


def _jsonable(value: Any) -> Any:
    # JSON has no NaN: strict parsers reject the bare word, and null would hide what happened.
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
