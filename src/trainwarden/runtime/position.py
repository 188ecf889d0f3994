"""Where a run stands in its data: batches over epochs, and the same place again after a resume.

The order of an epoch is decided when its iterator is opened, by random streams. So a position is the epoch, the number
of batches taken, and the state of those streams at the opening: resuming restores them, opens the epoch again, skips
the indices of the batches already taken (without loading their data), and puts the streams back to where they were.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from trainwarden.checkpoint.rng import capture_rng, restore_rng
from trainwarden.errors import DatasetError, InvalidSettingError
from trainwarden.runtime.data_errors import DataErrors, Place
from trainwarden.runtime.data_faults import raised_by_sample
from trainwarden.runtime.unreadable import Partial, reporting


class DataPosition:
    """Yields batches from ``loader`` for ever, epoch after epoch, and knows where it is.

    Args:
        loader: a ``DataLoader`` or any re-iterable. A one-shot iterator is refused (``InvalidSettingError``).
        say: called with a sentence when the way back to a position is not O(1) or not exact.
        errors: what is done about batches that cannot be loaded; ``None`` raises what they raise. A batch that is left
            out counts as taken, so that a resumed run leaves it out at the same place.

    Raises `DatasetError` while iterating when an epoch yields nothing, and `DataLoaderError` as `DataErrors` says.
    """

    def __init__(self, loader: Iterable[Any], *, say: Callable[[str], None], errors: DataErrors | None = None) -> None:
        if isinstance(loader, Iterator):
            raise InvalidSettingError(
                setting="loader",
                value=type(loader).__name__,
                expected="something that can be iterated again, such as a DataLoader or a list",
            )
        self.loader: Iterable[Any] = loader if errors is None else reporting(loader)
        self._source = self.loader
        self.epoch = 0
        self.batch_index = 0
        self._batches_before = 0
        self._errors = errors
        if errors is not None:
            fetching = (DataPosition._start.__code__, DataPosition._next.__code__)
            errors.begin_loader(self.loader, of_user=loader, fetching=fetching)
        self._say = say
        self.leave_out: Callable[[int, int], bool] | None = None
        """Whether the batch of this epoch and index is read and dropped instead of yielded."""
        self.streams_at_opening: dict[str, Any] = {}
        """The random streams when the iterator of this epoch was opened; empty before the first one is."""
        self._resume_from: Mapping[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The position between two batches. Call it only there."""
        state = {
            "epoch": self.epoch,
            "batch_index": self.batch_index,
            "batches": batches_an_epoch(self.loader),
            "streams_at_opening": self.streams_at_opening,
            "streams": capture_streams(self.loader),
            "batches_before": self._batches_before,
        }
        if self._errors is not None:
            state["left_out"] = self._errors.state_dict()
        if _is_stateful(self.loader):
            state["loader"] = self.loader.state_dict()  # type: ignore[attr-defined]
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.epoch, self.batch_index = state["epoch"], state["batch_index"]
        self._restore_left_out(state)
        self._resume_from = state

    def restore_streams(self, state: Mapping[str, Any]) -> None:
        """Puts the random streams back as they were at a saved position, for a run that needs no more batches."""
        restore_streams(self.loader, state["streams"])
        self._restore_left_out(state)

    def _restore_left_out(self, state: Mapping[str, Any]) -> None:
        self._batches_before = state.get("batches_before", 0)
        if self._errors is not None and "left_out" in state:
            self._errors.load_state_dict(state["left_out"])

    def __iter__(self) -> Iterator[Any]:
        while True:
            skipped = self.batch_index if self._resume_from else 0
            iterator = self._open()
            failed = False
            while True:
                if self._errors is not None and (self._errors.ending or self._errors.deaths.noted):
                    self._errors.end(self._place())
                batch = self._next(iterator)
                if type(batch) is _Failure:
                    if self._is_end(batch.error):
                        break
                    self._leave_out(batch.error, iterator)
                    failed = True
                    continue
                failed = False
                if type(batch) is Partial:
                    batch = self._readable_part(batch)
                self.batch_index += 1
                if batch is None or (self.leave_out and self.leave_out(self.epoch, self.batch_index - 1)):
                    continue
                yield batch
            if failed and self._errors is not None:
                self._errors.ended_after_failure(self._place(-1))
            if self.batch_index == 0 and not skipped:
                raise DatasetError(problem=f"an epoch of the {type(self.loader).__name__} yielded no batch")
            self.epoch += 1
            self._batches_before += self.batch_index
            self.batch_index = 0

    # -- batches that cannot be loaded ---------------------------------------------------------------------------

    def _next(self, iterator: Iterator[Any]) -> Any:
        """The next batch, or a `_Failure`."""
        try:
            return next(iterator)
        except Exception as error:  # noqa: BLE001 - boundary: whatever data sets and decoders may raise
            return _Failure(error)

    def _is_end(self, error: Exception) -> bool:
        """Whether the epoch is over; a ``StopIteration`` that a sample raised only looks like it."""
        return isinstance(error, StopIteration) and (self._errors is None or not raised_by_sample(error))

    def _leave_out(self, error: Exception, iterator: Iterator[Any]) -> None:
        """Leaves out the batch that raised ``error``, or raises."""
        if self._errors is None:
            raise error
        self._errors.batch_failed(error, iterator, self._place())
        self.batch_index += 1
        # Its frames hold the loader's iterator in a circle: the workers would live on until the garbage collector runs.
        error.__traceback__ = None

    def _readable_part(self, partial: Partial) -> Any:
        """What is left of a batch in which samples are missing; ``None`` when nothing is."""
        if self._errors is not None:
            self._errors.samples_failed(partial, self._place())
        return partial.batch

    def _place(self, offset: int = 0) -> Place:
        index = self.batch_index + offset
        return Place(self.epoch, index, self._batches_before + index + 1)

    # -- opening an epoch ----------------------------------------------------------------------------------------

    def _open(self) -> Iterator[Any]:
        try:
            iterator = self._start()
        except RuntimeError as error:
            if self._errors is not None:
                self._errors.opening_failed(error, self._place())
            raise
        self._resume_from = None
        if self._errors is not None:
            self._errors.opened(iterator)
        return iterator

    def _start(self) -> Iterator[Any]:
        return self._reopened(self._resume_from) if self._resume_from else self._opened()

    def _opened(self) -> Iterator[Any]:
        _set_epoch(self.loader, self.epoch)
        self.streams_at_opening = capture_streams(self.loader)
        return iter(self._source)

    def _reopened(self, state: Mapping[str, Any]) -> Iterator[Any]:
        if not state["streams_at_opening"]:  # saved before the first batch was asked for
            restore_streams(self.loader, state["streams"])
            return self._opened()
        _set_epoch(self.loader, self.epoch)
        self.streams_at_opening = state["streams_at_opening"]
        restore_streams(self.loader, self.streams_at_opening)
        if _is_stateful(self.loader):
            self.loader.load_state_dict(state["loader"])  # type: ignore[attr-defined]
            iterator = iter(self.loader)
        elif isinstance(self.loader, DataLoader) and _is_map_style(self.loader):
            iterator = self._skip_indices(self.loader)
        elif isinstance(self.loader, Sequence):
            iterator = iter([self.loader[i] for i in range(self.batch_index, len(self.loader))])
        else:
            iterator = self._replay()
        restore_streams(self.loader, state["streams"])
        return iterator

    def _skip_indices(self, loader: DataLoader[Any]) -> Iterator[Any]:
        clone = copy.copy(loader)
        name = "batch_sampler" if loader.batch_sampler is not None else "sampler"
        remaining = _RemainingIndices(getattr(loader, name), self.batch_index)
        if loader.persistent_workers and self.epoch > 0:
            # Persistent workers draw their seed once a run: a later epoch opens without that draw.
            remaining.before = lambda: restore_streams(loader, self.streams_at_opening)
        # DataLoader forbids assigning these after construction; a private copy may.
        vars(clone)[name] = remaining
        vars(clone)["_iterator"] = None
        if loader.persistent_workers:
            self._source = clone
        if loader.num_workers:
            self._say(
                "resumed inside an epoch of a DataLoader with workers: order and samples are the same; random "
                "augmentation inside worker processes is not, unless it derives from the sample index"
            )
        iterator = iter(clone)
        remaining.skip()
        return iterator

    def _replay(self) -> Iterator[Any]:
        self._say(
            f"{type(self.loader).__name__} has neither indices nor state_dict: reading {self.batch_index} batches "
            "again to find the position"
        )
        iterator = iter(self.loader)
        for index in range(self.batch_index):
            batch = self._next(iterator)
            if type(batch) is _Failure:
                if self._is_end(batch.error):
                    break
                if self._errors is None:
                    raise batch.error
                # Left out then, and counted then.
                self._errors.require_going_on(batch.error, iterator, self._place(index - self.batch_index))
        return iterator


@dataclass(frozen=True)
class _Failure:
    """What an iterator raised instead of giving a batch."""

    error: Exception


def rescaled(position: Mapping[str, Any], batches: int | None) -> Mapping[str, Any]:
    """A rank's position where another number of ranks goes on: as large a part of the epoch lies behind it.

    ``batches`` an epoch now. Rounded up, so that no sample is trained twice; up to one batch a rank is left out.
    """
    before = position["batches"]
    if not batches or not before:
        return position
    return {**position, "batch_index": -(-position["batch_index"] * batches // before)}


def batches_an_epoch(loader: Any) -> int | None:
    """As the loader says; ``None`` where it cannot."""
    try:
        return len(loader)
    except (TypeError, NotImplementedError):  # an iterable data set has no length
        return None


class _RemainingIndices:
    """A sampler whose first pass leaves out its first ``count`` entries; later passes are whole.

    The entries are skipped when the first one is asked for, or by `skip`. Not earlier: between opening its sampler and
    asking for the first entry a loader draws its base seed, and may open the sampler twice.
    """

    def __init__(self, sampler: Iterable[Any], count: int) -> None:
        self.before: Callable[[], None] | None = None
        """Called once, before the first pass begins."""
        self._sampler = sampler
        self._count = count
        self._newest: _Entries | None = None

    def skip(self) -> None:
        if self._newest is not None:
            self._newest.begin()

    def begin_pass(self) -> Iterator[Any]:
        count, self._count = self._count, 0
        before, self.before = self.before, None
        if before:
            before()
        entries = iter(self._sampler)
        for _ in itertools.islice(entries, count):
            pass
        return entries

    def __iter__(self) -> Iterator[Any]:
        self._newest = _Entries(self)
        return self._newest

    def __len__(self) -> int:
        return len(self._sampler)  # type: ignore[arg-type]


class _Entries:
    """One pass over a `_RemainingIndices`, begun when its first entry is asked for."""

    def __init__(self, owner: _RemainingIndices) -> None:
        self._owner = owner
        self._entries: Iterator[Any] | None = None

    def begin(self) -> Iterator[Any]:
        if self._entries is None:
            self._entries = self._owner.begin_pass()
        return self._entries

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return next(self.begin())


def describe_loader(loader: Any) -> dict[str, Any]:
    """What of a loader decides which batches come, as the fingerprint keeps it."""
    description: dict[str, Any] = {"type": type(loader).__name__}
    if isinstance(loader, DataLoader):
        description["batch_size"] = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
        description["drop_last"] = bool(loader.drop_last)
        description["sampler"] = type(loader.sampler).__name__
        if _is_map_style(loader):
            description["dataset_rows"] = len(loader.dataset)  # type: ignore[arg-type]
    elif isinstance(loader, Sequence):
        description["batches"] = len(loader)
    return description


def _is_stateful(loader: Any) -> bool:
    return hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")


def _is_map_style(loader: Any) -> bool:
    return isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)


def _set_epoch(loader: Any, epoch: int) -> None:
    sampler, batch_sampler = getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)
    candidates = [loader, getattr(loader, "dataset", None), sampler, batch_sampler]
    candidates.append(getattr(batch_sampler, "sampler", None))
    for target in {id(candidate): candidate for candidate in candidates}.values():
        if callable(getattr(target, "set_epoch", None)):
            target.set_epoch(epoch)


def _generators(loader: Any) -> list[torch.Generator]:
    """The loader's own random generators, each once, in a fixed order."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    owners = [
        loader,
        getattr(loader, "sampler", None),
        batch_sampler,
        getattr(batch_sampler, "sampler", None),
    ]
    found = [getattr(owner, "generator", None) for owner in owners]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


def capture_streams(loader: Any) -> dict[str, Any]:
    """All random streams that may decide the loader's order: the global ones and its own."""
    return {
        "global": capture_rng(),
        "generators": [generator.get_state() for generator in _generators(loader)],
    }


def restore_streams(loader: Any, streams: Mapping[str, Any]) -> None:
    """Puts back what `capture_streams` returned."""
    restore_rng(streams["global"])
    for generator, state in zip(_generators(loader), streams["generators"], strict=True):
        generator.set_state(state)
