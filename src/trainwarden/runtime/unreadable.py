"""Leaving out the samples that cannot be read, instead of the batches that they are in."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Dataset, IterableDataset

from trainwarden.errors import WardenError
from trainwarden.runtime.data_faults import Cause, StreamBrokenError, cause_of, fault_of, is_spent

T = TypeVar("T")


def skip_unreadable(dataset: Dataset[T]) -> Dataset[T]:
    """``dataset`` without the samples that it cannot read: a batch then holds those of its samples that can be read.

    ::

        loader = DataLoader(trainwarden.skip_unreadable(dataset), batch_size=8, num_workers=4)
        for batch in guard.batches(loader, max_steps=200): ...

    Under a guard each sample left out travels to the main process with its batch, is recorded in the run's
    ``errors.jsonl`` with its index and counts towards the share that may be left out; a batch of which no sample can
    be read is left out whole. Such batches are smaller, not filled up: the order of all other samples stays as it is.
    Without a guard each sample left out is a warning.

    Works with automatic batching (a ``batch_size`` or a ``batch_sampler``), in worker processes of any start method,
    for map-style data sets (``__getitems__`` is used where there is one) and for iterable ones whose iterator can go
    on after an error. One that is written as a generator cannot, and ends the run with `DataLoaderError`: catch the
    error inside that generator. Out of memory, defects of the program (``NameError``, ``ImportError``) and errors of
    trainwarden are raised as ever.

    Args:
        dataset: map-style or iterable; it stays reachable as ``.dataset``, and its other attributes as they were.

    Returns:
        A data set of the same kind and length, picklable if ``dataset`` is.
    """
    if isinstance(dataset, IterableDataset):
        return _ReadableStream(dataset)
    return _ReadableRows(dataset)


@dataclass(frozen=True)
class Unreadable:
    """In place of a sample that could not be read. ``index`` is its place in the data set, or in the stream."""

    index: Any
    cause: Cause


@dataclass(frozen=True)
class Partial:
    """A batch of which samples are missing. ``batch`` is ``None`` when none is left of the ``size`` there should be."""

    batch: Any
    missing: tuple[Unreadable, ...]
    size: int

    def pin_memory(self) -> Partial:
        """What torch's pinning thread calls: it would not look inside."""
        from torch.utils.data._utils.pin_memory import pin_memory

        return Partial(pin_memory(self.batch), self.missing, self.size)  # type: ignore[no-untyped-call]

    def to(self, *args: Any, **kwargs: Any) -> Partial:
        """What accelerate's loaders call to move a batch to the device."""
        moved = tree_map(lambda part: part.to(*args, **kwargs) if hasattr(part, "to") else part, self.batch)
        return Partial(moved, self.missing, self.size)


class _Readable:
    """What both kinds have in common. ``reports``: unreadable samples are handed on as `Unreadable`."""

    dataset: Any
    reports = False

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "dataset":  # unpickling and copying ask before there is a data set
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.dataset, name)

    def _left_out(self, index: Any, cause: Cause) -> None:
        warnings.warn(f"sample {index!r} is left out, it cannot be read: {cause}", RuntimeWarning, stacklevel=4)


class _ReadableRows(_Readable, Dataset[Any]):
    """A map-style data set."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getitem__(self, index: Any) -> Any:
        """One sample, or what reading it raises: without automatic batching a sample is the whole batch."""
        return self.dataset[index]

    def __getitems__(self, indices: Sequence[Any]) -> list[Any]:
        if getattr(self.dataset, "__getitems__", None) is None:
            return self._one_by_one(indices, lambda index: self.dataset[index])
        samples = _tried(lambda: list(self.dataset.__getitems__(indices)))
        if isinstance(samples, Cause):
            # Which of them it is shows only when each is read for itself.
            return self._one_by_one(indices, lambda index: self.dataset.__getitems__([index])[0])
        return samples  # type: ignore[no-any-return]

    def _one_by_one(self, indices: Sequence[Any], read: Callable[[Any], Any]) -> list[Any]:
        samples: list[Any] = []

        def read_on() -> None:
            for index in indices[len(samples) :]:
                samples.append(read(index))

        missing = 0
        while len(samples) < len(indices):
            cause = _tried(read_on)
            if cause is not None:
                samples.append(Unreadable(indices[len(samples)], cause))
                missing += 1
        return samples if self.reports or not missing else list(self._readable(samples))

    def _readable(self, samples: list[Any]) -> Iterator[Any]:
        for sample in samples:
            if isinstance(sample, Unreadable):
                self._left_out(sample.index, sample.cause)
            else:
                yield sample


class _ReadableStream(_Readable, IterableDataset[Any]):
    """An iterable data set. Samples are numbered as this process reads them."""

    def __init__(self, dataset: IterableDataset[Any]) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[Any]:
        return _ReadableIterator(self, iter(self.dataset))


class _ReadableIterator:
    """No generator: an error that passes through it does not end it."""

    def __init__(self, owner: _ReadableStream, samples: Iterator[Any]) -> None:
        self._owner = owner
        self._samples = samples
        self._number = 0
        self._after_error = False

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        while True:
            sample = _tried(self._next)
            if isinstance(sample, _End):
                if self._after_error:
                    raise StreamBrokenError(f"{type(self._owner.dataset).__name__} ended right after an error")
                raise StopIteration
            number, self._number = self._number, self._number + 1
            self._after_error = isinstance(sample, Cause)
            if not isinstance(sample, Cause):
                return sample
            if is_spent(self._samples):
                name = type(self._owner.dataset).__name__
                raise StreamBrokenError(f"the generator of {name} has ended, it raised {sample} at sample {number}")
            if self._owner.reports:
                return Unreadable(number, sample)
            self._owner._left_out(number, sample)

    def _next(self) -> Any:
        return next(self._samples, _END)


class _End:
    pass


_END = _End()


class _ReportingCollate:
    """Collates the samples that are there, and hands on what is known of the others."""

    def __init__(self, collate_fn: Callable[[list[Any]], Any]) -> None:
        self._collate_fn = collate_fn

    def __call__(self, samples: list[Any]) -> Any:
        missing = tuple(sample for sample in samples if isinstance(sample, Unreadable))
        if not missing:
            return self._collate_fn(samples)
        rest = [sample for sample in samples if not isinstance(sample, Unreadable)]
        return Partial(self._collate_fn(rest) if rest else None, missing, len(samples))


def reporting(loader: Any) -> Any:
    """A copy of a ``DataLoader`` over a `skip_unreadable` data set that yields `Partial`; any other loader as it is."""
    if not isinstance(loader, DataLoader) or not reports_samples(loader) or loader.batch_sampler is None:
        return loader
    clone = copy.copy(loader)
    dataset = copy.copy(cast(_Readable, loader.dataset))
    dataset.reports = True
    # DataLoader forbids assigning these after construction; a private copy may.
    vars(clone)["dataset"] = dataset
    vars(clone)["_iterator"] = None
    clone.collate_fn = _ReportingCollate(loader.collate_fn)
    return clone


def reports_samples(loader: Any) -> bool:
    """Whether what cannot be read is found sample by sample."""
    return isinstance(getattr(loader, "dataset", None), _Readable)


def _tried(read: Callable[[], Any]) -> Any:
    """What ``read()`` returns, or why a sample could not be read. Everything else that it raises is raised."""
    try:
        return read()
    except WardenError:
        raise
    except Exception as error:  # boundary: whatever a data set or a decoder may raise
        if fault_of(error, None) != "sample":
            raise
        return cause_of(error)
