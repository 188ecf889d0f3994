"""A data set without the samples that it cannot read: what a loader makes of it, with a guard and without."""

from __future__ import annotations

import pickle
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

from tests.runtime import bad_data
from tests.runtime.bad_data import BadRows, GeneratorStream, RobustStream, TogetherRows, as_lists, firsts
from trainwarden import skip_unreadable
from trainwarden.runtime.data_faults import Cause, StreamBrokenError
from trainwarden.runtime.unreadable import Partial, Unreadable, reporting

BAD = st.sets(st.integers(0, 15), max_size=16)


def faults(indices: set[int]) -> dict[int, Any]:
    return dict.fromkeys(indices, bad_data.quote_data)


@given(BAD, st.sampled_from([BadRows, TogetherRows]))
def test_a_batch_holds_its_readable_samples_and_says_which_are_missing(bad: set[int], kind: type[BadRows]) -> None:
    loader: Any = reporting(DataLoader(skip_unreadable(kind(16, faults(bad))), batch_size=4))
    batches = list(loader)
    assert len(batches) == 4
    for start, batch in zip(range(0, 16, 4), batches, strict=True):
        kept = [index for index in range(start, start + 4) if index not in bad]
        if len(kept) == 4:
            assert as_lists(batch) == firsts(kept)
            continue
        assert isinstance(batch, Partial)
        assert batch.size == 4
        assert [missing.index for missing in batch.missing] == [i for i in range(start, start + 4) if i in bad]
        assert {missing.cause.kind for missing in batch.missing} == {"ValueError"}
        assert as_lists(batch.batch) == firsts(kept) if kept else batch.batch is None


@given(BAD)
def test_a_stream_that_goes_on_does_the_same(bad: set[int]) -> None:
    loader: Any = reporting(DataLoader(skip_unreadable(RobustStream(17, faults(bad))), batch_size=4))
    kept: list[float] = []
    missing: list[int] = []
    for batch in loader:
        if isinstance(batch, Partial):
            missing += [one.index for one in batch.missing]
            batch = batch.batch
        kept += as_lists(batch) if batch is not None else []
    assert missing == sorted(bad)
    assert kept == firsts([index for index in range(17) if index not in bad])


@pytest.mark.parametrize("kind", [BadRows, TogetherRows, RobustStream])
def test_without_a_guard_a_sample_left_out_is_a_warning(kind: Any) -> None:
    loader: Any = DataLoader(skip_unreadable(kind(8, faults({1, 6}))), batch_size=4)
    with pytest.warns(RuntimeWarning, match="sample [16] is left out, it cannot be read: ValueError at bad_data.py"):
        batches = list(loader)
    expected = [[0, 2, 3, 4], [5, 7]] if kind is RobustStream else [[0, 2, 3], [4, 5, 7]]
    assert [as_lists(batch) for batch in batches] == [firsts(indices) for indices in expected]


def test_a_healthy_data_set_is_read_as_ever() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = [as_lists(batch) for batch in DataLoader(BadRows(10, {}), batch_size=4)]
        wrapped: Any = skip_unreadable(BadRows(10, {}))
        assert [as_lists(batch) for batch in DataLoader(wrapped, batch_size=4)] == plain
        assert [as_lists(batch) for batch in reporting(DataLoader(wrapped, batch_size=4))] == plain


def test_no_sample_is_read_twice_to_find_the_bad_one() -> None:
    read: list[int] = []

    class Counting(BadRows):
        def __getitem__(self, index: int) -> Any:
            read.append(index)
            return super().__getitem__(index)

    list(reporting(DataLoader(skip_unreadable(Counting(8, faults({1, 2}))), batch_size=4)))
    assert read == list(range(8))


def test_a_batch_sampler_of_ones_own_is_used() -> None:
    sampler = BatchSampler(SequentialSampler(range(9)), batch_size=4, drop_last=False)
    loader: Any = reporting(DataLoader(skip_unreadable(BadRows(9, faults({8}))), batch_sampler=sampler))
    batches = list(loader)
    assert (batches[2].batch, batches[2].size) == (None, 1)


def test_without_automatic_batches_a_sample_is_a_batch_and_raises() -> None:
    loader: Any = DataLoader(skip_unreadable(BadRows(4, faults({1}))), batch_size=None)
    assert reporting(loader) is loader
    with pytest.raises(ValueError, match="patient"):
        list(loader)


def test_it_is_the_data_set_in_all_other_respects() -> None:
    class Named(BadRows):
        name = "rows"

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

    inner = Named(5, {})
    wrapped: Any = skip_unreadable(inner)
    wrapped.set_epoch(3)
    assert (len(wrapped), wrapped.name, inner.epoch, wrapped.dataset) == (5, "rows", 3, inner)
    assert torch.equal(wrapped[2][0], inner[2][0])
    assert not hasattr(wrapped, "no_such_thing")
    assert not isinstance(wrapped, IterableDataset)
    stream: Any = skip_unreadable(RobustStream(5, {}))
    assert isinstance(stream, IterableDataset)
    with pytest.raises(TypeError, match="has no len"):
        len(stream)


@pytest.mark.parametrize("kind", [BadRows, RobustStream])
def test_it_can_be_pickled_as_spawned_workers_need_it(kind: Any) -> None:
    loader: Any = reporting(DataLoader(skip_unreadable(kind(4, faults({1}))), batch_size=4))
    dataset, collate = pickle.loads(pickle.dumps((loader.dataset, loader.collate_fn)))
    (partial,) = DataLoader(dataset, batch_size=4, collate_fn=collate)
    assert [missing.index for missing in partial.missing] == [1]
    partial = pickle.loads(pickle.dumps(partial))
    assert as_lists(partial.batch) == firsts([0, 2, 3])


def test_the_loader_that_was_given_stays_as_it_was() -> None:
    given_loader: Any = DataLoader(skip_unreadable(BadRows(8, faults({1}))), batch_size=4, num_workers=1)
    dataset, collate_fn = given_loader.dataset, given_loader.collate_fn
    clone = reporting(given_loader)
    assert clone is not given_loader
    assert (given_loader.dataset, given_loader.collate_fn, dataset.reports) == (dataset, collate_fn, False)


@pytest.mark.parametrize("kind", [BadRows, TogetherRows, RobustStream])
@pytest.mark.parametrize(
    ("fault", "error"), [(bad_data.out_of_memory, MemoryError), (bad_data.defect, NameError)], ids=["memory", "defect"]
)
def test_what_is_no_matter_of_a_sample_is_raised(kind: Any, fault: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        list(reporting(DataLoader(skip_unreadable(kind(4, {1: fault})), batch_size=4)))


def test_a_generator_that_raised_is_not_taken_for_a_stream_that_ends() -> None:
    stream: Any = skip_unreadable(GeneratorStream(8, faults({5})))
    with pytest.raises(
        StreamBrokenError, match="GeneratorStream has ended, it raised ValueError at bad_data.py:.* at sample 5"
    ):
        list(reporting(DataLoader(stream, batch_size=4)))


class ToDevice:
    """A part of a batch that knows how to move itself, as `BatchEncoding` does."""

    moved_to: Any = None

    def to(self, device: Any, non_blocking: bool = False) -> ToDevice:
        self.moved_to = (device, non_blocking)
        return self


def test_what_is_left_of_a_batch_is_moved_as_a_batch_is() -> None:
    """accelerate's loaders call ``to`` on what they are given, torch's pinning thread ``pin_memory``."""
    missing = (Unreadable(3, Cause("ValueError", None, None)),)
    part = ToDevice()
    partial = Partial({"x": torch.ones(2), "names": ["a"], "part": part}, missing, 3).to("meta", non_blocking=True)
    assert partial.batch["x"].device.type == "meta"
    assert part.moved_to == ("meta", True)
    assert (partial.batch["names"], partial.missing, partial.size) == (["a"], missing, 3)
    pinned = Partial(["text"], missing, 2).pin_memory()
    assert (pinned.batch, pinned.missing, pinned.size) == (["text"], missing, 2)
