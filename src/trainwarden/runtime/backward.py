"""The only re-executable unit of a step: forward and backward of one batch, in smaller parts when memory runs out.

How an out-of-memory error travels: ``_attempt`` catches it, keeps its text and drops its traceback, because the failed
frames pin the activations; outside the ``except`` block memory is released, gradients and random state are put back,
the failed part is cut smaller, and the loop goes on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from trainwarden.checkpoint.rng import capture_rng, restore_rng
from trainwarden.errors import GPUMemoryError, RestartNeededError, SplitRefusedError, WardenError
from trainwarden.guards.ladder import REMEDIES, AnyRemedy, Remedy, Rung, Trouble, next_rung
from trainwarden.guards.memory_plan import Size
from trainwarden.guards.oom import OOMPolicy, is_out_of_memory, part_sizes
from trainwarden.runtime import split as splitting
from trainwarden.runtime.exchange import GradientExchange, lone_replicas, silenced
from trainwarden.runtime.fsdp import ShardedPasses
from trainwarden.runtime.meter import meter_of
from trainwarden.runtime.plan import MicroBatchPlan as MicroBatchPlan
from trainwarden.runtime.probe_split import SplitEvidence, batch_statistics_layer, gather_evidence
from trainwarden.runtime.release import release_memory
from trainwarden.runtime.shortage import Shortage, more_memory

ComputeLoss = Callable[[Any], torch.Tensor]

UNKNOWN = torch.tensor(float("nan"))
"""A loss or norm of a rank that ran out of memory and leaves soon with all others. Made now: then may be too late."""
_NO_LOSS = torch.tensor(0.0)


@dataclass(slots=True)
class _Part:
    """A micro-batch still to be done. ``share``: its weight in the batch's mean, ``None`` for the whole batch as it is.

    ``leaves`` limits the backward pass to the parameters that an earlier, failed backward of these rows did not reach.
    """

    batch: Any
    share: float | None = None
    leaves: list[torch.Tensor] | None = None
    size: Size | None = None


_NOTHING = nullcontext()


def _settle_alone(_recovered: bool, error: WardenError | None) -> None:
    if error is not None:
        raise error


def _say_nothing(*_: Any) -> None:
    pass


class SplitBackward:
    """Runs ``compute_loss(batch)`` and its backward pass, whole or in weighted parts.

    ``leaves()`` yields the parameters whose gradients accumulate, ``scale(loss)`` is the ``GradScaler``'s. With an
    ``exchange`` the gradients are averaged over ranks, and ``settle(recovered, error)`` is then called on every rank:
    it raises what makes all of them leave. ``on_shrink`` and ``on_grow`` are told ``(from_rows, to_rows, reason)``,
    ``on_remedy`` ``(remedy, reason)``. ``remedies`` are the user's own, tried when shrinking has come to its end.
    ``lockstep(parts)``: the largest number of parts of any rank, where all take part in every forward pass (a sharded
    model). Nothing can be tried again then: the plan shrinks, and `RestartNeededError` is raised.
    """

    def __init__(
        self,
        policy: OOMPolicy,
        plan: MicroBatchPlan,
        *,
        models: Sequence[nn.Module],
        leaves: Callable[[], Sequence[torch.Tensor]],
        scale: Callable[[torch.Tensor], torch.Tensor],
        split: splitting.Split | None,
        verify: bool,
        on_shrink: Callable[[int, int, str], None],
        exchange: GradientExchange | None = None,
        settle: Callable[[bool, WardenError | None], None] = _settle_alone,
        on_grow: Callable[[int, int, str], None] = _say_nothing,
        on_remedy: Callable[[AnyRemedy, str], None] = _say_nothing,
        remedies: Mapping[Remedy, Callable[[], None]] | None = None,
        lockstep: Callable[[int], int] | None = None,
    ) -> None:
        self.policy = policy
        self._may_grow = policy.may_shrink(2, 0)  # a larger size that fails can be recovered
        self._sharded = ShardedPasses(models)
        self._lockstep = lockstep if self._sharded.can_repeat else lockstep or (lambda parts: parts)
        self.plan = plan
        if plan.meter is None:
            plan.meter = meter_of(leaves())
        self._models = models
        self._leaves = leaves
        self._scale = scale
        self._split = split
        self._verify = verify
        self._on_shrink = on_shrink
        self._exchange = exchange
        self._lone = lone_replicas(models)
        self._settle = settle
        self._on_grow = on_grow
        self._on_remedy = on_remedy
        self._remedies = dict(remedies or {})
        self._remedies_applied: list[str] = []
        self._shrink_wanted = False
        self._foretold = False
        self._checked_ahead = False
        self.loss_of_ranks: torch.Tensor | None = None
        """Sum of all ranks' losses up to the last synchronised `run`: not finite when one of them is not."""
        self._losses_ahead: torch.Tensor | None = None
        self._failure_ahead: WardenError | None = None

    def shrink_ahead(self) -> None:
        """The next batch is to be run in smaller parts, before memory runs out."""
        self._shrink_wanted = True

    def run(self, compute_loss: ComputeLoss, batch: Any, weight: splitting.Weight | None) -> torch.Tensor:
        """The detached loss of the whole batch, its gradients added to those already there.

        Raises:
            GPUMemoryError: it does not fit in ``max_shrinks`` shrinks or at one row.
            SplitRefusedError: a split is needed and would change what is trained.
        """
        if self._exchange is None:
            if self._lone:
                with silenced(self._lone):
                    return self._run_parts(compute_loss, batch, weight, None)
            if not self._sharded.present:
                return self._run_parts(compute_loss, batch, weight, None)
            with self._sharded.gradients_set_aside(self._leaves()):
                return self._run_parts(self._sharded.from_rest(compute_loss), batch, weight, None)
        wanted = self._exchange.wanted
        with self._exchange.held():
            if wanted:
                return self._run_in_step(self._exchange, compute_loss, batch, weight)
            return self._run_ahead(compute_loss, batch, weight)

    def _run_ahead(self, compute_loss: ComputeLoss, batch: Any, weight: splitting.Weight | None) -> torch.Tensor:
        """`run` of an accumulation window before the call in which the ranks meet, and judge all its losses together.

        A rank that fails here cannot leave alone, because the others will wait for it: its failure is kept until then,
        and the loss that it returns is NaN.
        """
        if self._failure_ahead is None:
            try:
                loss = self._run_parts(compute_loss, batch, weight, None)
                self._losses_ahead = loss if self._losses_ahead is None else self._losses_ahead + loss
                self.loss_of_ranks = torch.zeros_like(loss)
                return loss
            except WardenError as error:
                self._failure_ahead = error
        self.loss_of_ranks = _NO_LOSS
        return UNKNOWN

    def _run_in_step(
        self, exchange: GradientExchange, compute_loss: ComputeLoss, batch: Any, weight: splitting.Weight | None
    ) -> torch.Tensor:
        """`run` on one of several ranks: the gradients are averaged, and all go on or leave together."""
        failure, self._failure_ahead = self._failure_ahead, None
        ahead, self._losses_ahead = self._losses_ahead, None
        total: torch.Tensor | None = None
        exchange.begin()
        if failure is None:
            try:
                total = self._run_parts(compute_loss, batch, weight, exchange)
            except WardenError as error:
                failure = error
        self.loss_of_ranks = exchange.finish(total if total is None or ahead is None else total + ahead)
        self._settle(self.plan.shrinks_this_step > 0, failure)
        assert total is not None
        return total

    def _run_parts(
        self,
        compute_loss: ComputeLoss,
        batch: Any,
        weight: splitting.Weight | None,
        exchange: GradientExchange | None,
    ) -> torch.Tensor:
        fresh = True
        for leaf in self._leaves():
            if leaf.grad is not None:
                fresh = False
                break
        start = capture_rng(reuse_numpy=True) if self.policy.enabled else {}
        parts = self._first_parts(compute_loss, batch, weight)
        if self._lockstep is not None:
            # Every rank has to run as many forward passes; those too many here count for nothing.
            parts.extend([replace(parts[-1], share=0.0)] * (self._lockstep(len(parts)) - len(parts)))
        total: torch.Tensor | None = None
        while parts:
            part = parts.popleft()
            sending = exchange if not parts else None
            from_start = fresh and not sending and not (exchange and exchange.begun_sending)  # a failure begins again
            before = [] if from_start else self._gradient_marks()
            rng = start if total is None or from_start else capture_rng()
            self.plan.begin_attempt(part.size)
            with sending.sending() if sending else _NOTHING:
                loss, failure = self._attempt(compute_loss, part)
            if failure is None:
                total = loss if total is None else _add(total, loss)
                self._note_fit(part)
                continue
            self._climb(part, failure)
            if self._lockstep is not None:
                raise self._restart_needed(failure)
            release_memory()
            if fresh and not (exchange and exchange.begun_sending):
                # Nothing worth keeping: the whole batch once more, from clean gradients.
                restore_rng(start)
                self._drop_gradients()
                if exchange:
                    exchange.forget()
                part, total = _Part(batch, size=self._counted(batch, failure)), None
                parts.clear()
            else:
                restore_rng(rng)
                part.leaves = self._unreached(part, before, sending)
            cut = self._cut(compute_loss, part, weight, failure) if self._too_large(part) else [part]
            parts = deque([*cut, *self._recut(parts, weight, failure)])
        assert total is not None
        return total

    def _first_parts(self, compute_loss: ComputeLoss, batch: Any, weight: splitting.Weight | None) -> deque[_Part]:
        """The batch whole, or in the parts that the plan wants, before anything is tried."""
        if len(self.plan.remedies) > len(self._remedies_applied):
            self._apply_remedies_again()
        if self._shrink_wanted:
            parts = self._cut_ahead(compute_loss, batch, weight)
            if parts is not None:
                return parts
        size = self._size(batch)
        whole = _Part(batch, None, None, size)
        choice = self.plan.choose(size, may_grow=self._may_grow and self.plan.shrinks_this_step == 0)
        if choice.rows is None or size is None or size.rows <= choice.rows:
            return deque((whole,))
        if self.plan.has_failed:
            return self._cut(compute_loss, whole, weight, None)
        try:
            parts = self._cut(compute_loss, whole, weight, None)
        except SplitRefusedError:  # nothing has failed yet, and a prediction is no need
            return deque([whole])
        if not self._foretold:
            self._foretold = True
            self._on_shrink(size.rows, choice.rows, choice.reason)
        return parts

    # -- one attempt ---------------------------------------------------------------------------------------------

    def _attempt(self, compute_loss: ComputeLoss, part: _Part) -> tuple[torch.Tensor | None, Shortage | None]:
        phase = "forward"
        try:
            if part.leaves == []:  # a backward that had reached every leaf is done
                with torch.no_grad():
                    loss = compute_loss(part.batch)
            else:
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
            return None, Shortage.of(phase, error)

    # -- what a failure leaves behind ----------------------------------------------------------------------------

    def _gradient_marks(self) -> list[tuple[torch.Tensor, torch.Tensor | None, int]]:
        """Each leaf with its gradient and that tensor's version, which every accumulation raises."""
        return [(leaf, leaf.grad, leaf.grad._version if leaf.grad is not None else 0) for leaf in self._leaves()]

    def _unreached(
        self,
        part: _Part,
        marks: list[tuple[torch.Tensor, torch.Tensor | None, int]],
        sending: GradientExchange | None,
    ) -> list[torch.Tensor]:
        """The leaves that the failed backward has still to reach.

        A gradient that was absent before is dropped, so its leaf counts as unreached, unless it may be on its way to
        the other ranks. One that has grown already holds this part's whole contribution (a leaf accumulates once per
        backward) and is left alone.
        """
        wanted = None if part.leaves is None else {id(leaf) for leaf in part.leaves}
        remaining = []
        for leaf, gradient, version in marks:
            if sending and sending.is_complete(leaf):
                continue
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

    # -- the ladder: release, shrink, the user's remedies ----------------------------------------------------------

    def _climb(self, part: _Part, failure: Shortage) -> None:
        """Takes the next rung of the ladder, announced; raises when there is none.

        Shrinking lowers the plan's limit for this step and later ones.
        """
        policy, plan = self.policy, self.plan
        size = self._counted(part.batch, failure) if policy.enabled else Size(1)
        left: tuple[Remedy, ...] = tuple(r for r in REMEDIES if r in self._remedies and r not in plan.remedies)
        rung = next_rung(
            policy,
            Trouble(
                rows=size.rows,
                memory=failure.memory,
                shrinks_this_step=plan.shrinks_this_step,
                released=plan.released or self._lockstep is not None,  # a restart releases everything anyway
                remedies=left,
            ),
        )
        if rung.action == "give_up":
            raise self._out_of_memory(part, failure, rung.reason)
        cause = f"out of memory in {failure.phase}: {failure.memory.text}"
        if rung.action == "release":
            plan.note_release()
            self._on_remedy("release_cache", f"{cause}; {rung.reason}")
        elif rung.action == "shrink":
            choice = plan.note_failure(size, failure.memory)
            self._on_shrink(size.rows, choice.rows or size.rows, f"{cause}; {choice.reason}")
        else:
            self._apply_remedy(rung, size, cause)

    def _apply_remedy(self, rung: Rung, size: Size, cause: str) -> None:
        assert rung.remedy is not None
        release_memory()
        self._remedies[rung.remedy]()
        self._remedies_applied.append(rung.remedy)
        self.plan.note_remedy(rung.remedy, size)
        self._on_remedy(rung.remedy, f"{cause}; {rung.reason}")

    def _apply_remedies_again(self) -> None:
        """Those that the run needed before it was resumed."""
        for remedy in REMEDIES:
            if remedy in self.plan.remedies and remedy not in self._remedies_applied and remedy in self._remedies:
                self._remedies[remedy]()
                self._on_remedy(remedy, "it was needed before the resume")
        self._remedies_applied = list(self.plan.remedies)

    def _note_fit(self, part: _Part) -> None:
        rows = self.plan.note_fit(part.size)
        if rows is not None and part.size is not None:
            self._on_grow(rows, part.size.rows, self.plan.choice.reason)

    # -- smaller parts -------------------------------------------------------------------------------------------

    def _too_large(self, part: _Part) -> bool:
        """Whether the plan wants this part in smaller ones."""
        return self.plan.limit is not None and part.size is not None and part.size.rows > self.plan.limit

    def _recut(
        self,
        parts: Iterable[_Part],
        weight: splitting.Weight | None,
        failure: Shortage,
    ) -> list[_Part]:
        """The parts not begun yet, cut down to the new limit where they are above it."""
        recut: list[_Part] = []
        for part in parts:
            recut.extend(self._divide(part, weight, failure) if self._too_large(part) else [part])
        return recut

    def _cut(
        self,
        compute_loss: ComputeLoss,
        part: _Part,
        weight: splitting.Weight | None,
        failure: Shortage | None,
    ) -> deque[_Part]:
        if weight is None and self._split is None:
            self._refuse_ignored_targets(part.batch, failure)
        pieces = self._divide(part, weight, failure)
        if not self._verify or self.plan.verified:
            return deque(pieces)
        if failure or self.plan.has_failed:
            whole_first = (part, pieces[0])  # the second fits where the first does not
            self.plan.verified = self._check_split(compute_loss, whole_first, weight, failure)
        elif not self._checked_ahead:
            # Nothing has failed yet, and nothing is to fail in a check: a piece is weaker evidence, and fits.
            self._checked_ahead = self._check_split(compute_loss, (pieces[0],), weight, None)
        return deque(pieces)

    def _cut_ahead(self, compute_loss: ComputeLoss, batch: Any, weight: splitting.Weight | None) -> deque[_Part] | None:
        """The batch in parts of half the present size; ``None`` where that cannot or must not be."""
        self._shrink_wanted = False
        state = self.plan.state_dict()
        try:
            size = self._counted(batch, None)
            rows = min(size.rows, self.plan.limit or size.rows)
            if not self.policy.may_shrink(rows, 0):
                return None
            choice = self.plan.precaution(size)
            parts = self._cut(compute_loss, _Part(batch, size=size), weight, None)
        except SplitRefusedError:
            self.plan.load_state_dict(state)
            return None
        self._on_shrink(rows, choice.rows or rows, choice.reason)
        return parts

    def _divide(self, part: _Part, weight: splitting.Weight | None, failure: Shortage | None) -> list[_Part]:
        """The part in pieces of at most the plan's limit, each with its share of the batch's mean."""
        assert self.plan.limit is not None
        size = part.size or self._counted(part.batch, failure)
        sizes = part_sizes(size.rows, self.plan.limit, self.plan.used)
        batches = self._pieces(part.batch, sizes, failure)
        self.plan.used.update(sizes)
        share = 1.0 if part.share is None else part.share
        return [
            _Part(batch, share * fraction, part.leaves, self._size_of_piece(batch, size.length))
            for batch, fraction in zip(batches, self._fractions(batches, weight, failure), strict=True)
            if fraction != 0.0  # a part without targets has no mean, and no weight in the whole
        ] or [_Part(part.batch, share, part.leaves, size)]

    def _pieces(self, batch: Any, sizes: Sequence[int], failure: Shortage | None) -> Sequence[Any]:
        if self._split is not None:
            return self._split(batch, max(sizes))
        try:
            return splitting.split_rows(batch, sizes)
        except splitting.CannotSplitError as error:
            raise self._refusal(str(error), failure) from _cause(failure)

    def _fractions(
        self, batches: Sequence[Any], weight: splitting.Weight | None, failure: Shortage | None
    ) -> list[float]:
        try:
            weights = [float(weight(batch)) if weight else float(self._rows(batch, failure)) for batch in batches]
        except splitting.CannotSplitError as error:
            raise self._refusal(str(error), failure) from _cause(failure)
        total = sum(weights)
        return [value / total if total else 0.0 for value in weights]

    def _rows(self, batch: Any, failure: Shortage | None) -> int:
        if self._split is not None:
            return len(self._split(batch, 1))
        try:
            return splitting.rows(batch)
        except splitting.CannotSplitError as error:
            raise self._refusal(f"{error}; pass split= to Guard", failure) from _cause(failure)

    def _size(self, batch: Any) -> Size | None:
        """Rows and length of a batch about to run; ``None`` where they cannot be told cheaply."""
        if self._split is None:
            return splitting.size(batch)
        # Counting the rows of a foreign batch means splitting it: only once that has become necessary.
        return self._counted(batch, None) if self.plan.has_failed else None

    def _counted(self, batch: Any, failure: Shortage | None) -> Size:
        """Rows and length of a batch that is to be split. Raises SplitRefusedError where it has no rows."""
        rows = self._rows(batch, failure)
        measured = splitting.size(batch)
        return Size(rows, max(1, measured.tokens // rows) if measured and rows else 1)

    def _size_of_piece(self, batch: Any, length: int) -> Size:
        return Size(self._rows(batch, None), length)

    # -- what must not be split ----------------------------------------------------------------------------------

    def _refuse_ignored_targets(self, batch: Any, failure: Shortage | None) -> None:
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
        candidates: Sequence[_Part],
        weight: splitting.Weight | None,
        failure: Shortage | None,
    ) -> bool:
        """Refuses a loss that does not split, judged by the first candidate that fits.

        False: undecided, since not even a forward pass fits.
        """
        layer = batch_statistics_layer(self._models)
        if layer is not None:
            problem = f"layer {layer} normalises over the batch, so smaller parts train something else"
            raise self._refusal(problem, failure) from _cause(failure)
        state = capture_rng()
        try:
            for whole in candidates:
                rows = self._rows(whole.batch, failure)
                if rows < 2:
                    return False
                limit = min(self.plan.limit or rows, -(-rows // 2))
                batches = self._pieces(whole.batch, part_sizes(rows, limit), failure)
                shares = self._fractions(batches, weight, failure)
                evidence = self._evidence(compute_loss, whole.batch, batches, shares)
                if evidence is not None:
                    break
                release_memory()
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

    def _refusal(self, problem: str, failure: Shortage | None) -> SplitRefusedError:
        cause = failure.memory.text if failure else "the run learned earlier that the whole batch does not fit"
        return SplitRefusedError(problem=problem, micro_batch_size=self.plan.limit, out_of_memory=cause)

    def _restart_needed(self, failure: Shortage) -> RestartNeededError:
        error = RestartNeededError(
            phase=failure.phase, micro_batch_size=self.plan.limit or 1, problem=failure.memory.text
        )
        error.__cause__ = failure.cause
        return error

    def _out_of_memory(self, part: _Part, failure: Shortage, why: str) -> GPUMemoryError:
        try:
            size: int | None = self._rows(part.batch, None)
        except SplitRefusedError:
            size = None
        return failure.error(
            why,
            micro_batch_size=size,
            shrinks=self.plan.shrinks_this_step,
            would_fit=self._would_fit(part) or more_memory(failure),
        )

    def _would_fit(self, part: _Part) -> str | None:
        size = splitting.size(part.batch)
        rows = self.plan.bounds.fitting_tokens(size.length) // size.length if size is not None else 0
        return f"a micro-batch of {rows} rows of this length" if rows else None


def _cause(failure: Shortage | None) -> BaseException | None:
    return failure.cause if failure else None


def _add(total: torch.Tensor, loss: torch.Tensor | None) -> torch.Tensor:
    return total if loss is None else total + loss


def _check_loss(loss: Any) -> None:
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        shape = tuple(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__
        raise TypeError(f"compute_loss must return one mean loss as a scalar tensor, not {shape}")
