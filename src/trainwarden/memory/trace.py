"""The memory of two training steps, found by running them on fake tensors: no GPU, no weights, no values.

What is traced is the model, the loop and the optimizer that will really run, with the libraries that are really
installed. Against torch's CPU allocator the peak is right to the byte but for what kernels allocate for themselves
(`benchmarks/memory_prediction.py`). Optimizer states appear in the first step, so that the second has the peak: it is
the one that is traced, with the states made beforehand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from trainwarden.memory.prediction import Prediction
from trainwarden.memory.trace_depth import DEEP, SHALLOW, Stack, cut, find_stacks
from trainwarden.memory.trace_extend import NotLinearError, Shallow, extend
from trainwarden.memory.trace_loop import TrainingLoop, default_loss
from trainwarden.memory.trace_record import Record
from trainwarden.memory.trace_replay import Prices
from trainwarden.memory.trace_run import DeviceType, record_steps
from trainwarden.memory.trace_shards import Sharding, host_bytes, peak_note, prices_of

__all__ = ["CannotTraceError", "TrainingLoop", "default_loss", "trace"]

Depth = Literal["auto", "full"]

ERROR: Mapping[DeviceType, float] = {"cpu": 0.01, "cuda": 0.02}
"""Of a traced peak. Measured on the CPU (benchmarks/memory_prediction.py); on CUDA what its kernels add is unseen."""
SHARDED_ERROR = 0.1
"""Of a peak whose shards were reckoned from an unsharded trace."""

GRANULE_BYTES: Mapping[DeviceType, int] = {"cpu": 1, "cuda": 512}
"""torch's CUDA allocator rounds every request up to 512 bytes; the CPU's hands out what is asked for."""


class CannotTraceError(Exception):
    """The model could not be followed on fake tensors; ``reason`` says why, in one sentence."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def trace(
    build_model: Callable[[], nn.Module],
    example_batch: Any,
    loop: TrainingLoop,
    *,
    device_type: DeviceType = "cuda",
    shards: int = 1,
    cpu_offload: bool = False,
    depth: Depth = "auto",
) -> Prediction:
    """Predicts the peak of two training steps of ``loop`` on ``example_batch``, a micro-batch.

    ``build_model`` is called under ``torch.device("meta")`` and may wrap what it builds (peft). 4-bit weights are not
    quantised but packed with `trainwarden.memory.trace_packed.pack_linears`. The batch is any nesting of tensors; meta
    tensors will do unless the model looks at their values. ``device_type`` is the device to predict for: its
    allocator's granules, and its default variants of optimizers. ``shards`` ranks with FSDP2, ``cpu_offload`` as its
    ``CPUOffloadPolicy`` (see `trainwarden.memory.trace_shards`). ``depth="auto"`` traces deep stacks of equal blocks
    shallow, if that can be checked; "full" never does.

    Raises CannotTraceError for models that fake tensors cannot follow. CUDA is not touched.
    """
    sharding = Sharding(shards, cpu_offload)
    notes: tuple[str, ...] = ()
    for attempt in _attempts(depth):
        try:
            with torch.device("meta"):
                model = build_model()
            return _Tracer(model, example_batch, loop, device_type, sharding, notes).run(attempt)
        except Exception as error:  # boundary: models raise what they like, at missing values or at missing blocks
            notes = (f"traced whole: {reason_of(error)}",)
            if attempt == "full":
                raise CannotTraceError(reason_of(error)) from error
    raise AssertionError("the last attempt returns or raises")


def _attempts(depth: Depth) -> tuple[Depth, ...]:
    return ("auto", "full") if depth == "auto" else ("full",)


class _Tracer:
    """Traces one model as deep as needed."""

    def __init__(
        self,
        model: nn.Module,
        batch: Any,
        loop: TrainingLoop,
        device_type: DeviceType,
        sharding: Sharding,
        notes: tuple[str, ...],
    ) -> None:
        self._model, self._batch, self._loop = model, batch, loop
        self._device_type, self._sharding = device_type, sharding
        self._stacks = find_stacks(model)
        self._full = {stack.path: stack.depth for stack in self._stacks}
        self._notes = list(notes)
        self._judge_masks = True
        if sharding.active:
            self._notes.append(peak_note(sharding))
        if loop.autocast is not None and device_type == "cuda":
            self._notes.append("autocast was traced by the CPU's rules; CUDA's compute a few operators more in float32")

    def run(self, depth: Depth) -> Prediction:
        deep = [stack for stack in self._stacks if stack.depth >= DEEP]
        equal = [stack for stack in deep if not stack.difference]
        if depth == "auto":
            self._notes.extend(f"traced whole: {s.path}: {s.difference}" for s in deep if s.difference)
            if equal and (prediction := self._shallow(equal)):
                return prediction
        trace = Shallow(self._record({}), self._full)
        return self._prediction(trace, {})

    def _shallow(self, stacks: list[Stack]) -> Prediction | None:
        """From shallow traces; ``None``, with the reason in the notes, if they are of no use."""
        depths = {stack.path: SHALLOW for stack in stacks}
        try:
            base = Shallow(self._record(depths), self._full | depths)
            deeper = {}
            for stack in stacks:
                one_more = depths | {stack.path: SHALLOW + 1}
                deeper[stack.path] = Shallow(self._record(one_more), self._full | one_more)
            prediction = self._prediction(base, deeper)
        except NotLinearError as error:
            self._notes.append(f"traced whole: {error}")
            return None
        return prediction

    def _record(self, depths: Mapping[str, int]) -> Record:
        with cut(depths, self._stacks):
            units = {unit: unit for stack in self._stacks for unit in stack.units}
            try:
                return self._steps(units)
            except DataDependentOutputException:
                if not self._judge_masks:
                    raise
                self._judge_masks = False
                record = self._steps(units)
                self._notes.append("attention masks are counted whole, as the batch has no values to judge them by")
                return record

    def _steps(self, units: Mapping[str, str]) -> Record:
        return record_steps(
            self._model,
            self._batch,
            self._loop,
            units=units,
            device_type=self._device_type,
            judge_masks=self._judge_masks,
        )

    def _prediction(self, base: Shallow, deeper: Mapping[str, Shallow]) -> Prediction:
        peaks = extend(base, deeper, self._full, self._prices)
        host = host_bytes(base.record, self._sharding)
        for path, trace in deeper.items():
            more = self._full[path] - base.depths[path]
            host += more * (host_bytes(trace.record, self._sharding) - host_bytes(base.record, self._sharding))
        if deeper:
            depths = ", ".join(f"{self._full[path]} blocks of {path}" for path in deeper)
            self._notes.append(f"{depths} extended from traces of {SHALLOW} and {SHALLOW + 1}")
        return Prediction(
            peak_bytes=peaks.phases[peaks.phase],
            phase=peaks.phase,
            operation=peaks.operation,
            breakdown=peaks.kinds,
            phases=peaks.phases,
            host_bytes=host,
            source="traced",
            error=SHARDED_ERROR if self._sharding.active else ERROR[self._device_type],
            notes=tuple(self._notes),
        )

    def _prices(self, record: Record) -> Prices:
        return prices_of(record, self._sharding, GRANULE_BYTES[self._device_type])


def reason_of(error: Exception) -> str:
    """Why a trace failed, in one sentence: data-dependent code is told apart from other failures."""
    text = " ".join(str(error).split())[:300]
    if isinstance(error, DataDependentOutputException):
        return f"the model looks at values, which fake tensors do not have ({error.func})"
    if isinstance(error, DynamicOutputShapeException):
        return f"a tensor's shape depends on values, which fake tensors do not have ({error.func})"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
