"""The only re-executable unit of a step: forward and backward of one batch, in smaller parts when memory runs out.

How an out-of-memory error travels: ``_attempt`` catches it, keeps its text and drops its traceback, because the failed
frames pin the activations; outside the ``except`` block memory is released, gradients and random state are put back,
the failed part is cut smaller, and the loop goes on.
"""

from __future__ import annotations

import gc
import sys
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from trainwarden.checkpoint.rng import capture_rng, restore_rng
from trainwarden.errors import GPUMemoryError, SplitRefusedError
from trainwarden.guards.oom import MemoryFailure, OOMPolicy, is_out_of_memory, part_sizes
from trainwarden.runtime import split as splitting
from trainwarden.runtime.probe_split import SplitEvidence, batch_statistics_layer, gather_evidence

ComputeLoss = Callable[[Any], torch.Tensor]


@dataclass
class _Part:
    """A micro-batch still to be done. ``share``: its weight in the batch's mean, ``None`` for the whole batch as it is.

    ``leaves`` limits the backward pass to the parameters that an earlier, failed backward of these rows did not reach.
    """

    batch: Any
    share: float | None = None
    leaves: list[torch.Tensor] | None = None


@dataclass
class _Failure:
    """An out-of-memory error without its traceback."""

    phase: str
    memory: MemoryFailure
    cause: BaseException


@dataclass
class MicroBatchPlan:
    """How large a micro-batch may be, learned from failures; kept over checkpoints.

    ``limit`` is the largest number of rows to try (``None``: whole batches), ``used`` the sizes already run,
    ``shrinks`` all shrinks of the run, ``verified`` whether the loss was seen to split into weighted parts.
    """

    limit: int | None = None
    used: set[int] = field(default_factory=set)
    shrinks: int = 0
    verified: bool = False
    shrinks_this_step: int = 0

    def state_dict(self) -> dict[str, Any]:
        return {
            "limit": self.limit,
            "used": sorted(self.used),
            "shrinks": self.shrinks,
            "verified": self.verified,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.limit, self.used = state["limit"], set(state["used"])
        self.shrinks, self.verified = state["shrinks"], state["verified"]


class SplitBackward:
    """Runs ``compute_loss(batch)`` and its backward pass, whole or in weighted parts.

    ``leaves()`` yields the parameters whose gradients accumulate, ``scale(loss)`` is the ``GradScaler``'s,
    ``on_shrink`` is told ``(from_rows, to_rows, reason)``.
    """

    def __init__(
        self,
        policy: OOMPolicy,
        plan: MicroBatchPlan,
        *,
        models: Sequence[nn.Module],
        leaves: Callable[[], Iterable[torch.Tensor]],
        scale: Callable[[torch.Tensor], torch.Tensor],
        split: splitting.Split | None,
        verify: bool,
        on_shrink: Callable[[int, int, str], None],
    ) -> None:
        self.policy = policy
        self.plan = plan
        self._models = models
        self._leaves = leaves
        self._scale = scale
        self._split = split
        self._verify = verify
        self._on_shrink = on_shrink
        self._shrink_wanted = False

    def shrink_ahead(self) -> None:
        """The next batch is to be run in smaller parts, before memory runs out."""
        self._shrink_wanted = True

    def run(self, compute_loss: ComputeLoss, batch: Any, weight: splitting.Weight | None) -> torch.Tensor:
        """The detached loss of the whole batch, its gradients added to those already there.

        Raises:
            GPUMemoryError: it does not fit in ``max_shrinks`` shrinks or at one row.
            SplitRefusedError: a split is needed and would change what is trained.
        """
        parts = deque([_Part(batch)])
        fresh = all(leaf.grad is None for leaf in self._leaves())
        start = capture_rng(reuse_numpy=True) if self.policy.enabled else {}
        if self._shrink_wanted:
            parts = self._cut_ahead(compute_loss, batch, weight) or parts
        elif self.plan.limit is not None and self._rows(batch, None) > self.plan.limit:
            parts = self._cut(compute_loss, _Part(batch, 1.0), weight, None)
        total: torch.Tensor | None = None
        while parts:
            part = parts.popleft()
            before = [] if fresh else self._gradient_marks()
            rng = start if fresh or total is None else capture_rng()
            loss, failure = self._attempt(compute_loss, part)
            if failure is None:
                total = loss if total is None else _add(total, loss)
                continue
            failed_rows = self._shrink(part, failure)
            _release_memory()
            restore_rng(rng)
            if fresh:  # nothing worth keeping: the whole batch once more, from clean gradients
                self._drop_gradients()
                part, total = _Part(batch), None
                parts.clear()
            else:
                part.leaves = self._unreached(part, before)
            cut = self._cut(compute_loss, part, weight, failure)
            parts = deque([*cut, *self._recut(parts, weight, failure, failed_rows)])
        assert total is not None
        return total

    # -- one attempt ---------------------------------------------------------------------------------------------

    def _attempt(self, compute_loss: ComputeLoss, part: _Part) -> tuple[torch.Tensor | None, _Failure | None]:
        phase = "forward"
        try:
            with torch.set_grad_enabled(part.leaves != []):  # a backward that had reached every leaf is done
                loss = compute_loss(part.batch)
            _check_loss(loss)
            if part.share is not None:
                loss = loss * part.share
            phase = "backward"
            if part.leaves != []:
                self._scale(loss).backward(inputs=part.leaves)  # type: ignore[no-untyped-call]
            return loss.detach(), None
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            # The traceback holds the frames of the failed attempt, and they hold its activations.
            error.__traceback__ = error.__context__ = None
            return None, _Failure(phase, MemoryFailure.from_exception(error), error)

    # -- what a failure leaves behind ----------------------------------------------------------------------------

    def _gradient_marks(self) -> list[tuple[torch.Tensor, torch.Tensor | None, int]]:
        """Each leaf with its gradient and that tensor's version, which every accumulation raises."""
        return [(leaf, leaf.grad, leaf.grad._version if leaf.grad is not None else 0) for leaf in self._leaves()]

    def _unreached(self, part: _Part, marks: list[tuple[torch.Tensor, torch.Tensor | None, int]]) -> list[torch.Tensor]:
        """The leaves that the failed backward has still to reach.

        A gradient that was absent before is dropped, so its leaf counts as unreached. One that has grown already holds
        this part's whole contribution (a leaf accumulates once per backward) and is left alone.
        """
        wanted = None if part.leaves is None else {id(leaf) for leaf in part.leaves}
        remaining = []
        for leaf, gradient, version in marks:
            if gradient is None:
                leaf.grad = None
            elif leaf.grad is not gradient or gradient._version != version:
                continue
            if wanted is None or id(leaf) in wanted:
                remaining.append(leaf)
        return remaining

    def _drop_gradients(self) -> None:
        for leaf in self._leaves():
            leaf.grad = None

    # -- smaller parts -------------------------------------------------------------------------------------------

    def _shrink(self, part: _Part, failure: _Failure) -> int:
        """Lowers the limit for this and later steps; returns the rows that failed."""
        if not self.policy.enabled:
            raise self._out_of_memory(part, failure, "recovery is switched off (oom_recovery=False)")
        failed_rows = self._rows(part.batch, failure)
        limit = self.policy.next_limit(failed_rows, self.plan.shrinks_this_step)
        if limit is None:
            why = "one row does not fit" if failed_rows <= 1 else "max_shrinks is used up"
            raise self._out_of_memory(part, failure, why)
        self.plan.limit = limit
        self.plan.shrinks += 1
        self.plan.shrinks_this_step += 1
        self._on_shrink(failed_rows, limit, f"out of memory in {failure.phase}: {failure.memory.text}")
        return failed_rows

    def _recut(
        self,
        parts: Iterable[_Part],
        weight: splitting.Weight | None,
        failure: _Failure,
        failed_rows: int,
    ) -> list[_Part]:
        """The parts not begun yet, cut down to the new limit where they are above it."""
        recut: list[_Part] = []
        for part in parts:
            too_large = self._rows(part.batch, failure) > (self.plan.limit or failed_rows)
            recut.extend(self._divide(part, weight, failure) if too_large else [part])
        return recut

    def _cut(
        self,
        compute_loss: ComputeLoss,
        part: _Part,
        weight: splitting.Weight | None,
        failure: _Failure | None,
    ) -> deque[_Part]:
        if weight is None and self._split is None:
            self._refuse_ignored_targets(part.batch, failure)
        pieces = self._divide(part, weight, failure)
        if self._verify and not self.plan.verified:
            self.plan.verified = self._check_split(compute_loss, pieces, part, weight, failure)
        return deque(pieces)

    def _cut_ahead(self, compute_loss: ComputeLoss, batch: Any, weight: splitting.Weight | None) -> deque[_Part] | None:
        """The batch in parts of half the present size; ``None`` where that cannot or must not be."""
        self._shrink_wanted = False
        limit_before = self.plan.limit
        try:
            rows = min(self._rows(batch, None), limit_before or sys.maxsize)
            limit = self.policy.next_limit(rows, 0)
            if limit is None:
                return None
            self.plan.limit = limit
            parts = self._cut(compute_loss, _Part(batch, 1.0), weight, None)
        except SplitRefusedError:
            self.plan.limit = limit_before
            return None
        self.plan.shrinks += 1
        self._on_shrink(rows, limit, "the device's memory is nearly full")
        return parts

    def _divide(self, part: _Part, weight: splitting.Weight | None, failure: _Failure | None) -> list[_Part]:
        """The part in pieces of at most the plan's limit, each with its share of the batch's mean."""
        assert self.plan.limit is not None
        rows = self._rows(part.batch, failure)
        sizes = part_sizes(rows, self.plan.limit, self.plan.used)
        batches = self._pieces(part.batch, sizes, failure)
        self.plan.used.update(sizes)
        share = 1.0 if part.share is None else part.share
        return [
            _Part(batch, share * fraction, part.leaves)
            for batch, fraction in zip(batches, self._fractions(batches, weight, failure), strict=True)
            if fraction != 0.0  # a part without targets has no mean, and no weight in the whole
        ] or [_Part(part.batch, share, part.leaves)]

    def _pieces(self, batch: Any, sizes: Sequence[int], failure: _Failure | None) -> Sequence[Any]:
        if self._split is not None:
            return self._split(batch, max(sizes))
        try:
            return splitting.split_rows(batch, sizes)
        except splitting.CannotSplitError as error:
            raise self._refusal(str(error), failure) from _cause(failure)

    def _fractions(
        self, batches: Sequence[Any], weight: splitting.Weight | None, failure: _Failure | None
    ) -> list[float]:
        try:
            weights = [float(weight(batch)) if weight else float(self._rows(batch, failure)) for batch in batches]
        except splitting.CannotSplitError as error:
            raise self._refusal(str(error), failure) from _cause(failure)
        total = sum(weights)
        return [value / total if total else 0.0 for value in weights]

    def _rows(self, batch: Any, failure: _Failure | None) -> int:
        if self._split is not None:
            return len(self._split(batch, 1))
        try:
            return splitting.rows(batch)
        except splitting.CannotSplitError as error:
            raise self._refusal(f"{error}; pass split= to Guard", failure) from _cause(failure)

    # -- what must not be split ----------------------------------------------------------------------------------

    def _refuse_ignored_targets(self, batch: Any, failure: _Failure | None) -> None:
        place = splitting.ignored_target_place(batch)
        if place is not None:
            problem = (
                f"{place} holds ignored targets (-100), so the loss is a mean over tokens, not rows; "
                "pass weight=trainwarden.target_tokens (or weight=trainwarden.rows if it is a mean over rows)"
            )
            raise self._refusal(problem, failure) from _cause(failure)

    def _check_split(
        self,
        compute_loss: ComputeLoss,
        pieces: Sequence[_Part],
        part: _Part,
        weight: splitting.Weight | None,
        failure: _Failure | None,
    ) -> bool:
        """Refuses a loss that does not split; False: undecided, since not even a forward pass fits."""
        layer = batch_statistics_layer(self._models)
        if layer is not None:
            problem = f"layer {layer} normalises over the batch, so smaller parts train something else"
            raise self._refusal(problem, failure) from _cause(failure)
        state = capture_rng()
        try:
            for whole in (part, pieces[0]):  # the second fits where the first does not
                rows = self._rows(whole.batch, failure)
                if rows < 2:
                    return False
                limit = min(self.plan.limit or rows, -(-rows // 2))
                batches = self._pieces(whole.batch, part_sizes(rows, limit), failure)
                shares = self._fractions(batches, weight, failure)
                evidence = self._evidence(compute_loss, whole.batch, batches, shares)
                if evidence is not None:
                    break
                _release_memory()
            else:
                return False
        finally:
            restore_rng(state)
        if not evidence.consistent:
            problem = (
                f"the loss of {rows} rows is {evidence.whole[0]:.6g}, but its {len(batches)} weighted parts give "
                f"{evidence.parts[0]:.6g}: it is summed, contrastive, or a mean over something else than "
                f"{'weight= says' if weight else 'rows (pass weight=)'}"
            )
            raise self._refusal(problem, failure) from _cause(failure)
        return True

    def _evidence(
        self, compute_loss: ComputeLoss, whole: Any, parts: Sequence[Any], shares: Sequence[float]
    ) -> SplitEvidence | None:
        try:
            return gather_evidence(compute_loss, whole, parts, shares, self._models)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        return None

    # -- errors --------------------------------------------------------------------------------------------------

    def _refusal(self, problem: str, failure: _Failure | None) -> SplitRefusedError:
        cause = failure.memory.text if failure else "the run learned earlier that the whole batch does not fit"
        return SplitRefusedError(problem=problem, micro_batch_size=self.plan.limit, out_of_memory=cause)

    def _out_of_memory(self, part: _Part, failure: _Failure, why: str) -> GPUMemoryError:
        try:
            size: int | None = self._rows(part.batch, None)
        except SplitRefusedError:
            size = None
        error = GPUMemoryError(
            phase=failure.phase,
            micro_batch_size=size,
            shrinks=self.plan.shrinks_this_step,
            requested_bytes=failure.memory.requested_bytes,
            free_bytes=failure.memory.free_bytes,
            problem=f"{why}: {failure.memory.text}",
        )
        error.__cause__ = failure.cause
        return error


def _cause(failure: _Failure | None) -> BaseException | None:
    return failure.cause if failure else None


def _add(total: torch.Tensor, loss: torch.Tensor | None) -> torch.Tensor:
    return total if loss is None else total + loss


def _check_loss(loss: Any) -> None:
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        shape = tuple(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__
        raise TypeError(f"compute_loss must return one mean loss as a scalar tensor, not {shape}")


def _release_memory() -> None:
    """Returns what the failed attempt held. Only useful once its traceback is gone."""
    gc.collect()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()
