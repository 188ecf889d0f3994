"""How a `Trainer` goes back in process, and on, where a loop of one's own ends with an error that a restart resumes.

The run leaves ``watch`` and enters it again with the same objects, into which the newest verified checkpoint is loaded.
Until there is one, training begins again from the values that it began with, kept on the host. What was learned about
memory stays, so the second time is done with the smaller plan.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from trainwarden import device as hardware
from trainwarden.capability.distributed import launched_ranks
from trainwarden.checkpoint.rng import capture_rng, restore_rng
from trainwarden.errors import GPUMemoryError, RestartNeededError, RollbackNeededError, WardenError
from trainwarden.events import WentBack
from trainwarden.runtime import Guard
from trainwarden.runtime.optimizer_step import PHASE as OPTIMIZER_STEP
from trainwarden.runtime.phases import CLIPPING
from trainwarden.runtime.ranks import Ranks
from trainwarden.runtime.release import release_memory
from trainwarden.runtime.sharded import local

T = TypeVar("T")


@dataclass(frozen=True)
class ReturnPolicy:
    """``max_without_progress``: how often the same step may send the run back before its error ends it.

    ``host_share``: of the available host memory, what the values that training begins with may take, over all ranks of
    this machine.
    """

    max_without_progress: int = 3
    host_share: float = 0.1


@dataclass
class Progress:
    """How far the run had come when it failed, and how often it has failed there or before."""

    furthest_step: int = -1
    tries: int = 0

    def may_try(self, policy: ReturnPolicy, failed_after_step: int) -> bool:
        """Counts a failure after so many completed steps."""
        if failed_after_step > self.furthest_step:
            self.furthest_step, self.tries = failed_after_step, 0
        self.tries += 1
        return self.tries <= policy.max_without_progress


def why_back(error: WardenError) -> str | None:
    """What sends the run back; ``None`` for an error that would come again, or of which the guard takes care itself.

    After a failed update the weights may be half updated; after a failed pass over sharded weights its gradients are
    gone. In both cases everything from the last checkpoint on is done again, and fits this time.
    """
    update = isinstance(error, GPUMemoryError) and error.details.get("phase") in (OPTIMIZER_STEP, CLIPPING)
    return error.message if update or isinstance(error, RestartNeededError) else None


@dataclass
class Beginning:
    """What a training begins with: copies on the host of what it changes, and the random streams."""

    tensors: list[tuple[Tensor, Tensor]]
    states: list[tuple[Any, Any]]
    streams: dict[str, Any] = field(default_factory=capture_rng)

    @classmethod
    def keep(cls, model: nn.Module, others: Sequence[Any], room_bytes: float) -> Beginning | None:
        """``None`` where the trained parameters and the buffers take more than ``room_bytes``."""
        live = [local(p) for p in model.parameters() if p.requires_grad]
        live += list(model.buffers())
        if sum(tensor.nbytes for tensor in live) > room_bytes:
            return None
        kept = [(tensor, tensor.detach().to("cpu", copy=True)) for tensor in live]
        return cls(kept, [(other, copy.deepcopy(other.state_dict())) for other in others])

    def restore(self) -> None:
        with torch.no_grad():
            for tensor, kept in self.tensors:
                tensor.copy_(kept)
        for other, state in self.states:
            other.load_state_dict(copy.deepcopy(state))
        restore_rng(self.streams)


class WayBack:
    """Goes back when it must, between the attempts of one training.

    ``others`` are the watched objects besides model and optimizer. ``may_return``: whether memory that runs out may
    send it back, because all ranks then end with the same error and none waits for another.
    """

    def __init__(
        self,
        guard: Guard,
        ranks: Ranks,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        others: Sequence[Any],
        *,
        may_return: bool,
        policy: ReturnPolicy = ReturnPolicy(),
    ) -> None:
        self.count = 0
        """How often the run has gone back."""
        self._guard = guard
        self._ranks = ranks
        self._model = model
        self._optimizer = optimizer
        self._others = others
        self._may_return = may_return
        self._policy = policy
        self._progress = Progress()
        self._beginning: Beginning | None = None
        self._began = False
        self._stop: str | None = None
        self._said: tuple[int, str] | None = None
        # A schedule moves them, and a run that is continued has to ask for what it asked for at first.
        self._asked = [_without_parameters(group) for group in optimizer.param_groups]

    def through(self, attempt: Callable[[], T]) -> T:
        """What ``attempt`` returns, tried again from the last checkpoint after each error that this helps against.

        Raises what ``attempt`` raises where it does not help, or has helped too often without the run coming further.
        """
        while True:
            try:
                return attempt()
            except WardenError as error:
                if not self._helps(error):
                    raise
            # Only here: the traceback of the error held the frames that failed, and they their memory.
            self._go_back()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside ``watch``, around everything that may fail."""
        if self._said is not None:
            (from_step, reason), self._said = self._said, None
            self._guard.emit(WentBack(step=self._guard.steps_completed, from_step=from_step, reason=reason))
        if not self._began and self._may_return and self._guard.newest_checkpoint is None:
            launched = launched_ranks(os.environ)
            room = self._policy.host_share * hardware.host_memory().available_bytes / (launched[2] if launched else 1)
            self._beginning = Beginning.keep(self._model, [self._optimizer, *self._others], room)
        self._began = True
        try:
            yield
        except WardenError:
            self._stop = self._guard.stop_requested
            raise

    def at_boundary(self) -> None:
        """Between two steps: with a checkpoint nothing else has to be kept."""
        if self._beginning is not None and self._guard.newest_checkpoint is not None:
            self._beginning = None

    def _helps(self, error: WardenError) -> bool:
        """Whether all ranks go back. Collective where they end together."""
        if isinstance(error, RollbackNeededError):  # the guard says it, puts everything back itself, and counts
            return self._all(self._stop is None)
        reason = why_back(error) if self._may_return else None
        if reason is None:
            return False
        known = self._guard.newest_checkpoint is not None or self._beginning is not None
        allowed = self._progress.may_try(self._policy, self._guard.steps_completed)
        if not self._all(allowed and known and self._stop is None):
            return False
        self._said = self._guard.steps_completed, reason
        return True

    def _all(self, willing: bool) -> bool:
        return all(self._ranks.gather(willing))

    def _go_back(self) -> None:
        self.count += 1
        self._optimizer.zero_grad()
        release_memory()
        if self._said is None:
            return
        for group, asked in zip(self._optimizer.param_groups, self._asked, strict=True):
            group.update(copy.deepcopy(asked))
        if self._guard.newest_checkpoint is None and self._beginning is not None:
            self._beginning.restore()
        self._guard.go_back()


def _without_parameters(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: copy.deepcopy(value) for key, value in group.items() if key != "params"}
