"""``Guard.evaluate``: means over rows that are not trained on. It changes nothing but its own batch size."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trainwarden.checkpoint.rng import capture_rng, restore_rng
from trainwarden.errors import InvalidSettingError, SplitRefusedError
from trainwarden.guards.oom import part_sizes
from trainwarden.runtime import split as splitting
from trainwarden.runtime.phases import SWITCHED_OFF
from trainwarden.runtime.probe_split import gather_evidence
from trainwarden.runtime.release import release_memory
from trainwarden.runtime.shortage import Shortage, attempted, more_memory

PHASE = "evaluation"

Score = Tensor | float
Evaluate = Callable[[Any], Score | Mapping[str, Score]]


class Evaluation:
    """The evaluations of one guard: the rows that fit are remembered from one to the next.

    ``on_shrink`` is told ``(from_rows, to_rows, reason)``.
    """

    def __init__(
        self,
        *,
        recover: bool,
        split: splitting.Split | None,
        verify: bool,
        on_shrink: Callable[[int, int, str], None],
    ) -> None:
        self.limit: int | None = None
        """Rows that are evaluated at a time at most; ``None``: whole batches."""
        self._recover = recover
        self._split = split
        self._verified = not verify
        self._on_shrink = on_shrink
        self._released = False
        self._refusal_of_retry: str | None = None

    def run(
        self,
        fn: Evaluate,
        loader: Iterable[Any],
        weight: splitting.Weight | None,
        models: Sequence[nn.Module],
        *,
        refusal: str | None = None,
    ) -> float | dict[str, float]:
        """See `Guard.evaluate`. ``refusal`` says why nothing of this evaluation may be done twice."""
        means = _Means()
        self._released = False
        self._refusal_of_retry = SWITCHED_OFF if not self._recover else refusal
        state = capture_rng()
        try:
            with torch.no_grad(), _evaluating(models):
                for batch in loader:
                    self._add(means, fn, batch, weight, models)
        finally:
            restore_rng(state)
        return means.read()

    def _add(
        self,
        means: _Means,
        fn: Evaluate,
        batch: Any,
        weight: splitting.Weight | None,
        models: Sequence[nn.Module],
    ) -> None:
        parts = deque(self._cut(batch, weight, None))
        while parts:
            part = parts.popleft()
            share = self._weigh(part, weight)
            if share == 0:  # without targets there is no mean
                continue
            scores, shortage = attempted(PHASE, lambda part=part: fn(part))  # type: ignore[misc]
            if shortage is not None:
                self._shrink(part, shortage)
                release_memory()
                parts = deque(piece for one in (part, *parts) for piece in self._cut(one, weight, shortage))
                continue
            assert scores is not None
            if self.limit is not None and not self._verified:
                self._verify(fn, part, weight, models)
            means.add(scores, share)

    # -- smaller parts -------------------------------------------------------------------------------------------

    def _shrink(self, part: Any, shortage: Shortage) -> None:
        """The first time in an evaluation, releasing what training has cached is tried alone."""
        if self._refusal_of_retry is not None:
            raise shortage.error(self._refusal_of_retry)
        if not self._released:
            self._released = True
            return
        rows = self._rows(part, shortage)
        if rows <= 1:
            more = more_memory(shortage)
            raise shortage.error("one row does not fit", micro_batch_size=rows, would_fit=more)
        self.limit = -(-rows // 2)
        self._on_shrink(rows, self.limit, shortage.memory.text)

    def _cut(self, batch: Any, weight: splitting.Weight | None, shortage: Shortage | None) -> Sequence[Any]:
        if self.limit is None or self._rows(batch, shortage) <= self.limit:
            return [batch]
        if self._split is not None:
            return self._split(batch, self.limit)
        place = splitting.ignored_target_place(batch) if weight is None else None
        if place is not None:
            problem = f"{place} holds ignored targets (-100), so a mean over tokens is wanted; pass weight="
            raise self._refusal(problem, shortage)
        return splitting.split_rows(batch, part_sizes(self._rows(batch, shortage), self.limit))

    def _rows(self, batch: Any, shortage: Shortage | None) -> int:
        if self._split is not None:
            return len(self._split(batch, 1))
        try:
            return splitting.rows(batch)
        except splitting.CannotSplitError as error:
            raise self._refusal(f"{error}; pass split= to Guard", shortage) from error

    def _weigh(self, batch: Any, weight: splitting.Weight | None) -> float:
        if weight is not None:
            return float(weight(batch))
        if self._split is not None:
            return float(len(self._split(batch, 1)))
        try:
            return float(splitting.rows(batch))
        except splitting.CannotSplitError as error:
            expected = f"what a batch counts for, since its rows cannot be counted: {error}"
            raise InvalidSettingError(setting="evaluate(weight=)", value=None, expected=expected) from error

    def _verify(self, fn: Evaluate, part: Any, weight: splitting.Weight | None, models: Sequence[nn.Module]) -> None:
        """Refuses scores that the weighted halves of a part do not add up to, once, where memory allows it."""
        rows = self._rows(part, None)
        if rows < 2:
            return
        half = -(-rows // 2)
        halves = self._split(part, half) if self._split else splitting.split_rows(part, part_sizes(rows, half))
        weights = [self._weigh(one, weight) for one in halves]
        shares = [each / sum(weights) for each in weights]
        for name in _named(fn(part)):

            def score(batch: Any, name: str = name) -> Tensor:
                return torch.as_tensor(_named(fn(batch))[name])

            evidence, shortage = attempted(PHASE, lambda: gather_evidence(score, part, halves, shares, models))
            if shortage is not None or evidence is None:
                release_memory()
                return
            if not evidence.consistent:
                what = f"{name or 'the score'} of {rows} rows is {evidence.whole[0]:.6g}"
                problem = f"{what}, but its weighted halves give {evidence.parts[0]:.6g}: it is no mean over rows"
                raise self._refusal(f"{problem}{' as weight= counts them' if weight else ''}", None)
        self._verified = True

    def _refusal(self, problem: str, shortage: Shortage | None) -> SplitRefusedError:
        reason = shortage.memory.text if shortage else "an earlier evaluation ran out of memory"
        error = SplitRefusedError(problem=problem, micro_batch_size=self.limit, out_of_memory=reason)
        error.__cause__ = shortage.cause if shortage else None
        return error


class _Means:
    """Weighted sums in double precision, on the device of the scores until they are read."""

    def __init__(self) -> None:
        self._sums: dict[str, Any] = {}
        self._weight = 0.0
        self._single = True

    def add(self, scores: Score | Mapping[str, Score], weight: float) -> None:
        named = {name: _wide(name, value) for name, value in _named(scores).items()}
        if self._weight and set(named) != set(self._sums):
            raise TypeError(f"evaluate: fn returned {sorted(named)} for one batch and {sorted(self._sums)} before")
        self._single = not isinstance(scores, Mapping)
        self._weight += weight
        for name, value in named.items():
            self._sums[name] = self._sums.get(name, 0.0) + value * weight

    def read(self) -> float | dict[str, float]:
        """NaN when nothing was weighed."""
        means = {name: float(total) / self._weight for name, total in self._sums.items()}
        return means.get("", float("nan")) if self._single else means


def _named(scores: Score | Mapping[str, Score]) -> Mapping[str, Score]:
    return scores if isinstance(scores, Mapping) else {"": scores}


def _wide(name: str, value: Score) -> Tensor | float:
    if not isinstance(value, Tensor):
        return float(value)
    if value.numel() != 1:
        raise TypeError(f"evaluate: fn must return scalars, but {name or 'it'} is of shape {tuple(value.shape)}")
    wide = torch.float32 if value.device.type == "mps" else torch.float64  # MPS has no float64
    return value.detach().reshape(()).to(wide)


@contextmanager
def _evaluating(models: Iterable[nn.Module]) -> Iterator[None]:
    """All modules in evaluation mode; afterwards each is in the mode that it had: some may have been frozen."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
