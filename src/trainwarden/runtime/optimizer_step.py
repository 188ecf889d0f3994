"""``optimizer.step()`` that survives running out of memory: what it has not done yet is done in smaller parts.

A step that fails has usually changed something: states exist for some parameters, moments are updated, weights are
decayed. Nothing is copied beforehand to undo that. Instead the step is *finished*: the version counters of parameters,
gradients and states, read before the step, tell how many operations each has received (`replay`), and the rest is done
part by part, each with the temporaries of a part only. No operation is done twice, so the result is bit-identical.

This needs an optimizer that treats each parameter by itself and keeps everything in tensors: those of torch that do.
Any other ends with `GPUMemoryError`, and `OptimizerStep.torn` then tells that the weights may be half updated.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from trainwarden.runtime.phases import SWITCHED_OFF
from trainwarden.runtime.release import release_memory
from trainwarden.runtime.replay import (
    Applied,
    CannotReplayError,
    Journal,
    Replay,
    counters_tell,
    lasting_tensors,
    raised_counters,
    share_memory,
    state_tensors,
)
from trainwarden.runtime.separable import (
    body_of,
    runs_one_kernel_a_group,
    step_counters,
    take_back_decay,
    why_not_now,
    why_not_separable,
    without_states,
    works_on_lists,
)
from trainwarden.runtime.sharded import is_sharded
from trainwarden.runtime.shortage import Shortage, attempted, more_memory, shortage_of

PHASE = "optimizer step"

Manner = Literal["kernels", "counters", "journal"]
"""What tells how far a step came: the order of its fused kernels, version counters, or a journal of its operations."""

MAX_TRIES = 3
"""How often one parameter alone is tried: memory that others held for a moment may come back."""


class OptimizerStep:
    """Runs one optimizer's step, and finishes it when memory runs out.

    ``step`` is the instance's own; ``on_finished(parts, reason)`` is told of every step that had to be.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        step: Callable[..., Any],
        *,
        recover: bool,
        on_finished: Callable[[int, str], None],
    ) -> None:
        self.torn = False
        """Whether an update is half applied, or may be: such weights must not be saved. No later step mends them."""
        self.part_bytes: int | None = None
        """Bytes of parameters that are updated at a time since a whole step did not fit; ``None``: all."""
        self._torn_before = False
        self._composition: list[Any] = []
        self._lists = False
        self._found_manner: Manner | None = None
        self._optimizer = optimizer
        self._step = step
        self._recover = recover
        self._on_finished = on_finished
        self._refusal = why_not_separable(optimizer, step)
        self._body = body_of(type(optimizer))
        # Hooks of the user run around the body, once, however many parts it takes.
        self._hooked_body = torch.optim.Optimizer.profile_hook_step(self._guarded_body)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """What ``step(*args, **kwargs)`` returns.

        Raises `GPUMemoryError` when memory ran out and the step could not be finished; see ``torn``.
        """
        refusal = self._refusal
        if args or kwargs.get("closure") is not None:
            refusal = "a closure runs inside the step, where it cannot be run again"
        elif not self._recover:
            refusal = SWITCHED_OFF
        step = self._step if refusal else self._step_in_hooks
        self._torn_before, self.torn = self.torn, True
        try:
            result = step(*args, **kwargs)
        except (RuntimeError, MemoryError) as error:
            shortage = shortage_of(PHASE, error)
            raise shortage.error(refusal or "in a hook of the optimizer") from shortage.cause
        self.torn = self._torn_before
        return result

    # -- separable optimizers ------------------------------------------------------------------------------------

    def _step_in_hooks(self, **kwargs: Any) -> Any:
        self._optimizer._opt_called = True  # type: ignore[attr-defined]  # as the scheduler's wrapper would
        return self._hooked_body(self._optimizer, **kwargs)

    def _guarded_body(self, _optimizer: torch.optim.Optimizer, **kwargs: Any) -> Any:
        optimizer = self._optimizer
        fresh = without_states(optimizer)
        # SGD keeps the buffers that it makes where a failure loses them. Parameter by parameter, nothing else has
        # changed by the time they are made.
        single = bool(fresh) and isinstance(optimizer, torch.optim.SGD)
        lists = self._works_on_lists()
        if single or self.part_bytes is not None or (fresh and lists):
            return self._finish(_Work(optimizer, _to_update(optimizer), fresh, single=single), kwargs)
        manner = self._manner(kwargs) if lists else "counters"
        if manner == "kernels":
            self._fused_body(kwargs)
            return None
        parameters = _to_update(optimizer)
        journal = Journal() if manner == "journal" else None
        before = {} if journal else {id(t): t._version for t in lasting_tensors(optimizer, parameters)}
        with journal or nullcontext():
            result, shortage = attempted(PHASE, lambda: self._body(optimizer, **kwargs))
        if shortage is None:
            return result
        if journal is not None:
            applied = journal.applied(lasting_tensors(optimizer, parameters))
        else:
            applied = raised_counters(optimizer, parameters, before)
            if applied and share_memory(lasting_tensors(optimizer, parameters)):
                raise shortage.error("parameters that share memory share the counters that tell how far it came")
        return self._finish(_Work(optimizer, parameters, fresh, applied), kwargs, shortage)

    def _fused_body(self, kwargs: Mapping[str, Any]) -> None:
        """A step of one kernel a group, taken group by group, so that it is known which kernels have run.

        Before a kernel its group's step counters are raised, and nothing after it allocates: a group that fails with
        raised counters lacks its kernel alone.
        """
        optimizer = self._optimizer
        groups, counters = optimizer.param_groups, step_counters(optimizer)
        index, before = 0, 0
        try:
            for index, group in enumerate(groups):
                optimizer.param_groups = [group]
                before = counters[index]._version if index in counters else 0
                self._body(optimizer, **kwargs)
            return
        except (RuntimeError, MemoryError) as error:
            shortage = shortage_of(PHASE, error)
        finally:
            optimizer.param_groups = groups
        work = _Work(optimizer, _to_update(optimizer), [])
        for finished in groups[:index]:
            work.done(finished["params"])
        if index in counters and counters[index]._version > before:
            held = [p for p in groups[index]["params"] if p.grad is not None]
            work.applied.update({id(optimizer.state[p]["step"]): 1 for p in held})
        self._finish(work, kwargs, shortage)

    def _works_on_lists(self) -> bool:
        groups = self._optimizer.param_groups
        composition = [(group.get("fused"), group.get("foreach"), len(group["params"])) for group in groups]
        if composition != self._composition:
            self._composition, self._found_manner = composition, None
            self._lists = any(works_on_lists(group) for group in groups)
        return self._lists

    def _manner(self, kwargs: Mapping[str, Any]) -> Manner:
        """What tells how far a step on lists came: cheapest first."""
        if _get_current_dispatch_mode() is not None:  # under one, lists that are worked on one by one count nothing
            return "journal"
        if self._found_manner is None:
            self._found_manner = self._find_manner(kwargs)
        return self._found_manner

    def _find_manner(self, kwargs: Mapping[str, Any]) -> Manner:
        groups = self._optimizer.param_groups
        if any(is_sharded(p) for group in groups for p in group["params"]):
            return "journal"
        if runs_one_kernel_a_group(self._optimizer):
            return "kernels"
        probed = all(group["params"] for group in groups)
        return "counters" if probed and counters_tell(self._optimizer, lambda o: self._body(o, **kwargs)) else "journal"

    # -- finishing -----------------------------------------------------------------------------------------------

    def _finish(self, work: _Work, kwargs: Mapping[str, Any], shortage: Shortage | None = None) -> None:
        """Does what is left of the step, in parts that are halved as often as memory runs out again."""
        first, count, failures = shortage, 0, 0
        if shortage is not None:
            self._prepare_retry(work, shortage, failures)
        parts = deque(work.parts(self.part_bytes))
        while parts:
            part = parts.popleft()
            try:
                shortage = self._run_part(work, part, kwargs)
            except CannotReplayError as error:
                assert first is not None  # nothing was ahead before the first shortage
                raise first.error(str(error)) from first.cause
            if shortage is None:
                count, failures = count + 1, 0
                continue
            first = first or shortage
            failures += len(part) == 1
            self._prepare_retry(work, shortage, failures)
            if len(part) > 1:
                self.part_bytes = max(1, bytes_of(part) // 2)
                parts = deque(work.parts(self.part_bytes))
            else:
                parts.appendleft(part)
        if first is not None:
            self._on_finished(count, first.memory.text)

    def _prepare_retry(self, work: _Work, shortage: Shortage, failures: int) -> None:
        """``failures`` of one parameter alone, one after the other. Raises `GPUMemoryError` where it makes no sense."""
        work.forget_untouched_states()
        why = why_not_now(self._optimizer, work.parameters)
        if failures == MAX_TRIES:
            why = "one parameter at a time does not fit either"
        if why is not None:
            self.torn = self._torn_before or work.begun
            raise shortage.error(why, would_fit=_would_fit(self._optimizer, shortage))
        release_memory()

    def _run_part(self, work: _Work, part: list[Tensor], kwargs: Mapping[str, Any]) -> Shortage | None:
        take_back_decay(self._optimizer, part, work.applied)
        with _only(self._optimizer, part), Replay(self._optimizer, part, work.applied):
            shortage = attempted(PHASE, lambda: self._body(self._optimizer, **kwargs))[1]
        if shortage is None:
            work.done(part)
        return shortage


@dataclass
class _Work:
    """What one step has to do. ``fresh``: the parameters without states before it; ``single``: one at a time."""

    optimizer: torch.optim.Optimizer
    parameters: list[Tensor]
    fresh: list[Tensor]
    applied: Applied = field(default_factory=dict)
    single: bool = False

    def __post_init__(self) -> None:
        self._left = {id(p) for p in self.parameters}

    @property
    def begun(self) -> bool:
        """Whether any parameter, gradient or state is no longer what it was before the step."""
        return bool(self.applied) or len(self._left) < len(self.parameters)

    def done(self, part: Sequence[Tensor]) -> None:
        self._left.difference_update(map(id, part))

    def parts(self, part_bytes: int | None) -> Iterator[list[Tensor]]:
        """What is left, in order, in parts of at most ``part_bytes``, or of one parameter, each within one group."""
        for group in self.optimizer.param_groups:
            part: list[Tensor] = []
            for parameter in group["params"]:
                if id(parameter) not in self._left:
                    continue
                full = part_bytes is not None and bytes_of([*part, parameter]) > part_bytes
                if part and (full or self.single):
                    yield part
                    part = []
                part.append(parameter)
            if part:
                yield part

    def forget_untouched_states(self) -> None:
        """Drops states that this step made and did not use yet: they may be incomplete, and will be made again."""
        state = self.optimizer.state
        for parameter in self.fresh:
            if id(parameter) not in self._left:
                continue
            tensors = (parameter, *state_tensors(state, parameter))
            if not any(self.applied.get(id(tensor)) for tensor in tensors):
                state.pop(parameter, None)


def _to_update(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def bytes_of(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@contextmanager
def _only(optimizer: torch.optim.Optimizer, part: Sequence[Tensor]) -> Iterator[None]:
    """The optimizer with the parameters of ``part`` alone."""
    chosen = set(map(id, part))
    everything = [group["params"] for group in optimizer.param_groups]
    try:
        for group, parameters in zip(optimizer.param_groups, everything, strict=True):
            group["params"] = [p for p in parameters if id(p) in chosen]
        yield
    finally:
        for group, parameters in zip(optimizer.param_groups, everything, strict=True):
            group["params"] = parameters


def _would_fit(optimizer: torch.optim.Optimizer, shortage: Shortage) -> str:
    fused = any(group.get("fused") for group in optimizer.param_groups)
    other = "an optimizer with less state" if fused else "fused=True, which needs no temporaries"
    more = more_memory(shortage)
    return f"{more}, or {other}" if more else other
