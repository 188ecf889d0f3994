"""Data that cannot be loaded is left out and written down; the run ends when it is too much, or nothing more comes."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler, Sampler

from tests.runtime import bad_data
from tests.runtime.bad_data import BadCollate, BadRows, Blocked, GeneratorStream, PidRows, RobustStream
from tests.runtime.loops import Loop
from trainwarden import DataPolicy, Guard, skip_unreadable
from trainwarden.errors import DataLoaderError, DatasetError, failure_text
from trainwarden.events import DataSkipped
from trainwarden.runs import Ledger

FAULTS = {
    "a file that is not there": (bad_data.missing_file, "FileNotFoundError: [Errno 2] No such file or directory"),
    "a corrupt image": (bad_data.corrupt_image, "error at bad_data.py"),
    "broken JSON": (
        bad_data.corrupt_json,
        "JSONDecodeError: Unterminated string starting at: line 1 column 10 (char 9)",
    ),
    "text that is no UTF-8": (
        bad_data.not_utf8,
        "UnicodeDecodeError: 'utf-8' codec can't decode byte 0xff in position",
    ),
    "a value of no use": (bad_data.quote_data, "ValueError at bad_data.py"),
    "the end of samples": (bad_data.end_of_samples, "StopIteration at bad_data.py"),
}


def loop_over(loader: Any, path: Path, *, max_steps: int = 12, **guard_options: Any) -> Loop:
    guard_options.setdefault("checkpoint_every_s", None)
    return Loop(path, max_steps=max_steps, loader=loader, guard_options=guard_options)


def rows_loader(faults: dict[int, Any], *, count: int = 48, wrapped: bool = False, **options: Any) -> DataLoader[Any]:
    data: Any = BadRows(count, faults)
    return DataLoader(skip_unreadable(data) if wrapped else data, batch_size=4, **options)


def records(path: Path) -> list[dict[str, Any]]:
    file = path / "errors.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def batches_of(*kept: range | list[int]) -> list[Any]:
    """The batches that a loader without faults makes of these samples."""
    return [torch.utils.data.default_collate([bad_data.row(index) for index in indices]) for indices in kept]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", FAULTS)
def test_a_batch_that_cannot_be_read_is_left_out_and_the_run_is_that_of_the_others(
    tmp_path: Path, name: str, workers: int
) -> None:
    fault, cause = FAULTS[name]
    loop = loop_over(rows_loader({5: fault}, num_workers=workers), tmp_path / "run", max_steps=11).run()
    others = batches_of(*(range(start, start + 4) for start in range(0, 48, 4) if start != 4))
    expected = loop_over(others, tmp_path / "expected", max_steps=11).run()
    assert torch.equal(loop.weights(), expected.weights())
    assert loop.losses == expected.losses
    (record,) = records(tmp_path / "run")
    assert (record["what"], record["epoch"], record["batch"], record["rank"]) == ("batch", 0, 1, 0)
    assert record["code"] == "RUNTIME_DATALOADER_FAILED"
    assert record.get("indices") == (None if workers else [4, 5, 6, 7])
    assert record["cause"].startswith(cause)
    assert bad_data.SECRET not in (tmp_path / "run" / "errors.jsonl").read_text()
    (event,) = loop.named(DataSkipped)
    assert (event.what, event.batch_index, event.count, event.cause) == ("batch", 1, 1, record["cause"])
    assert "batch 1 of epoch 0 left out" in str(event)
    assert loop.guard.data_skipped == 1
    assert Ledger().rows()[-1].data_skipped == 1


@pytest.mark.parametrize(
    "options",
    [{}, {"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}],
    ids=["in this process", "workers", "persistent workers"],
)
def test_with_skip_unreadable_only_the_samples_are_left_out(tmp_path: Path, options: dict[str, Any]) -> None:
    faults = {5: bad_data.quote_data, 8: bad_data.missing_file, 9: bad_data.corrupt_json, 10: bad_data.corrupt_image}
    faults[11] = bad_data.not_utf8  # of the third batch nothing is left
    loader = rows_loader(faults, count=16, wrapped=True, **options)
    loop = loop_over(loader, tmp_path / "run", max_steps=6, data=DataPolicy(0.5)).run()
    epoch = batches_of(range(4), [4, 6, 7], range(12, 16))
    expected = loop_over(epoch, tmp_path / "expected", max_steps=6).run()
    assert torch.equal(loop.weights(), expected.weights())
    found = [
        (record["what"], record["epoch"], record["batch"], record["index"]) for record in records(tmp_path / "run")
    ]
    assert found == [("sample", epoch, 2 if i > 5 else 1, i) for epoch in (0, 1) for i in (5, 8, 9, 10, 11)]
    assert bad_data.SECRET not in (tmp_path / "run" / "errors.jsonl").read_text()
    assert loop.guard.data_skipped == 10


def test_workers_that_are_spawned_report_their_samples_too(tmp_path: Path) -> None:
    loader = rows_loader({5: bad_data.quote_data}, wrapped=True, num_workers=1, multiprocessing_context="spawn")
    loop_over(loader, tmp_path, max_steps=3).run()
    assert [(r["index"], r["cause"][:10]) for r in records(tmp_path)] == [(5, "ValueError")]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_that_cannot_be_put_together_is_left_out(tmp_path: Path, workers: int) -> None:
    loader = rows_loader({}, count=16, collate_fn=BadCollate(6), num_workers=workers)
    loop = loop_over(loader, tmp_path, max_steps=3).run()
    (record,) = records(tmp_path)
    assert record["batch"] == 1
    assert record["cause"].startswith("RuntimeError at ")
    assert loop.guard.epoch == 0


def test_a_healthy_run_writes_no_file(tmp_path: Path) -> None:
    loop_over(rows_loader({}, wrapped=True), tmp_path).run()
    assert not (tmp_path / "errors.jsonl").exists()
    assert Ledger().rows()[0].data_skipped == 0


# -- too much ------------------------------------------------------------------------------------------------------


def test_above_the_limit_the_run_ends_with_the_counts_and_goes_on_when_more_is_allowed(tmp_path: Path) -> None:
    faults = dict.fromkeys((9, 17, 33), bad_data.quote_data)

    def loop(**policy: Any) -> Loop:
        options = {"max_steps": 12, "data": DataPolicy(min_count=3, **policy)}
        return loop_over(rows_loader(faults), tmp_path / "run", **options)

    with pytest.raises(DataLoaderError) as caught:
        loop().run()
    error = caught.value
    assert (error.fault, error.batches_seen, error.batches_left_out, error.samples_left_out) == ("sample", 9, 3, 0)
    assert error.share == pytest.approx(3 / 9)
    assert error.steps_completed == 6  # what was trained is saved
    assert error.checkpoint_path is not None
    assert "3 batches were left out of 9 batches (33.33%, allowed are 1.00%); the newest: ValueError at" in str(error)
    assert bad_data.SECRET not in failure_text(error)
    assert error.resume_command is not None
    resumed = loop(max_share=0.5).run()
    whole = loop_over(rows_loader(faults), tmp_path / "whole", data=DataPolicy(max_share=0.5)).run()
    assert torch.equal(resumed.weights(), whole.weights())
    assert resumed.guard.data_skipped == whole.guard.data_skipped == 4  # the fourth in the second epoch
    assert [(r["epoch"], r["batch"]) for r in records(tmp_path / "run")] == [(0, 2), (0, 4), (0, 8), (1, 2)]


def test_a_run_that_lost_too_many_batches_may_go_on_sample_by_sample(tmp_path: Path) -> None:
    faults = dict.fromkeys((5, 9, 13, 17), bad_data.quote_data)
    policy = DataPolicy(max_share=0.3, min_count=4)
    with pytest.raises(DataLoaderError):
        loop_over(rows_loader(faults), tmp_path, data=policy).run()
    resumed = loop_over(rows_loader(faults, wrapped=True), tmp_path, data=DataPolicy(max_share=0.5)).run()
    assert resumed.guard.steps_completed == 12
    assert [(r["what"], r["epoch"]) for r in records(tmp_path)] == [("batch", 0)] * 4 + [("sample", 1)] * 3


def test_a_sample_is_its_part_of_a_batch(tmp_path: Path) -> None:
    loader = rows_loader({1: bad_data.quote_data, 6: bad_data.quote_data}, wrapped=True)
    with pytest.raises(DataLoaderError) as caught:
        loop_over(loader, tmp_path, data=DataPolicy(min_count=2)).run()
    assert (caught.value.samples_left_out, caught.value.batches_left_out) == (2, 0)
    assert caught.value.share == pytest.approx(2 / 4 / 2)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_data_set_of_which_nothing_can_be_read_ends_the_run(tmp_path: Path, wrapped: bool) -> None:
    loader = rows_loader(dict.fromkeys(range(8), bad_data.quote_data), count=8, wrapped=wrapped)
    with pytest.raises(DataLoaderError, match=r"100\.00%"):
        loop_over(loader, tmp_path).run()
    assert len(records(tmp_path)) == (12 if wrapped else 10)  # samples are judged once a batch


def test_below_the_limit_and_below_the_count_it_goes_on(tmp_path: Path) -> None:
    faults = dict.fromkeys((9, 17, 25, 33), bad_data.quote_data)
    loop_over(rows_loader(faults), tmp_path / "few", max_steps=8).run()
    loop_over(rows_loader(faults), tmp_path / "allowed", data=DataPolicy(0.5, min_count=1), max_steps=8).run()


# -- what is no matter of data -------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_defect_of_the_program_is_raised_as_it_is(tmp_path: Path, workers: int, wrapped: bool) -> None:
    loader = rows_loader({5: bad_data.defect}, num_workers=workers, wrapped=wrapped)
    with pytest.raises(NameError, match="augmnet"):
        loop_over(loader, tmp_path).run()
    assert not records(tmp_path)


@pytest.mark.parametrize("wrapped", [False, True])
def test_ctrl_c_inside_a_data_set_is_ctrl_c(tmp_path: Path, wrapped: bool) -> None:
    with pytest.raises(KeyboardInterrupt):
        loop_over(rows_loader({5: bad_data.interrupt}, wrapped=wrapped), tmp_path).run()


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("workers", [0, 1])
def test_memory_that_runs_out_in_the_loader_is_no_bad_sample(tmp_path: Path, workers: int, wrapped: bool) -> None:
    loader = rows_loader({5: bad_data.out_of_memory}, num_workers=workers, wrapped=wrapped)
    with pytest.raises(DataLoaderError, match="memory ran out while data was loaded at batch 1") as caught:
        loop_over(loader, tmp_path).run()
    assert caught.value.fault == "memory"
    assert isinstance(caught.value.__cause__, MemoryError)
    assert not records(tmp_path)


def test_an_error_of_ours_stays_what_it_is(tmp_path: Path) -> None:
    def refuse(_index: int) -> None:
        raise DatasetError(problem="the licence does not allow it")

    with pytest.raises(DatasetError):
        loop_over(rows_loader({5: refuse}), tmp_path).run()


def test_without_a_policy_every_error_comes_through(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="patient"):
        loop_over(rows_loader({5: bad_data.quote_data}), tmp_path, data=None).run()


class BrokenSampler(Sampler[int]):
    def __iter__(self) -> Iterator[int]:
        yield from range(10)
        raise ValueError("no more weights")

    def __len__(self) -> int:
        return 48


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sampler_that_fails_is_no_bad_sample(tmp_path: Path, workers: int) -> None:
    loader = DataLoader(BadRows(48, {}), batch_size=4, sampler=BrokenSampler(), num_workers=workers)
    with pytest.raises(DataLoaderError) as caught:
        loop_over(loader, tmp_path).run()
    assert caught.value.fault == "loader"
    assert not records(tmp_path)


# -- workers that die or hang --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("wrapped", "persistent"), [(False, False), (True, True)])
def test_a_worker_that_is_killed_ends_the_run_resumably(tmp_path: Path, wrapped: bool, persistent: bool) -> None:
    faults: dict[int, Any] = {29: bad_data.killed}
    options: dict[str, Any] = {"num_workers": 2, "persistent_workers": persistent, "shuffle": False}
    with pytest.raises(DataLoaderError, match="a worker process of the loader died") as caught:
        loop_over(rows_loader(faults, wrapped=wrapped, **options), tmp_path / "run").run()
    assert caught.value.fault == "worker died"
    assert "is killed by signal" in str(caught.value) or "exited unexpectedly" in str(caught.value)
    assert caught.value.checkpoint_path or caught.value.steps_completed == 0
    resumed = loop_over(rows_loader({}, wrapped=wrapped, **options), tmp_path / "run").run()
    whole = loop_over(rows_loader({}, wrapped=wrapped, **options), tmp_path / "whole").run()
    assert torch.equal(resumed.weights(), whole.weights())
    assert not records(tmp_path / "run")


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_loader_whose_workers_died_can_be_used_again(tmp_path: Path, wrapped: bool) -> None:
    data = BadRows(48, {29: bad_data.killed})
    dataset: Any = skip_unreadable(data) if wrapped else data
    loader: DataLoader[Any] = DataLoader(dataset, batch_size=4, num_workers=1, persistent_workers=True)
    with pytest.raises(DataLoaderError):
        loop_over(loader, tmp_path / "run").run()
    data.faults.clear()
    resumed = loop_over(loader, tmp_path / "run").run()
    whole = loop_over(rows_loader({}), tmp_path / "whole").run()
    assert torch.equal(resumed.weights(), whole.weights())
    loader._iterator = None  # while its workers can still be told to go


def kill_and_wait(pid: int) -> None:
    """Returns when the last thread of the process is gone: then the parent has its signal."""
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


@pytest.mark.parametrize("policy", [DataPolicy(), None], ids=["guarded", "as torch does"])
def test_a_worker_that_dies_during_a_step_does_not_break_into_it(tmp_path: Path, policy: DataPolicy | None) -> None:
    """torch raises from the signal's handler, wherever the main thread is: here, in the middle of user code."""
    loader = DataLoader(PidRows(48, {}), batch_size=4, num_workers=1)
    weight = torch.nn.Parameter(torch.ones(6, 1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    guard = Guard(tmp_path, observers=[], checkpoint_every_s=None, data=policy)
    begun: list[int] = []
    finished: list[int] = []

    def train() -> None:
        with guard.watch(model=torch.nn.ParameterList([weight]), optimizer=optimizer):
            for inputs, pids in guard.batches(loader, max_steps=12):
                begun.append(guard.steps_completed)
                if guard.steps_completed == 1:
                    kill_and_wait(int(pids[0]))
                guard.backward(lambda batch: (batch @ weight).square().mean(), inputs)
                optimizer.step()
                optimizer.zero_grad()
                finished.append(guard.steps_completed)

    with pytest.raises(RuntimeError if policy is None else DataLoaderError) as caught:
        train()
    assert begun == [0, 1]
    if policy is None:
        assert finished == [0]
        return
    assert finished == [0, 1]
    assert isinstance(caught.value, DataLoaderError)
    assert (caught.value.fault, caught.value.steps_completed) == ("worker died", 2)
    assert caught.value.checkpoint_path is not None


@pytest.mark.parametrize(("wrapped", "own_timeout_s"), [(False, 0), (True, 2)])
def test_workers_that_hang_end_the_run_resumably(tmp_path: Path, wrapped: bool, own_timeout_s: int) -> None:
    reader, writer = os.pipe()
    try:
        options: dict[str, Any] = {"num_workers": 1, "timeout": own_timeout_s, "multiprocessing_context": "fork"}
        policy = DataPolicy(worker_timeout_s=600.0 if own_timeout_s else 2.0)
        loader = rows_loader({9: Blocked(reader)}, wrapped=wrapped, **options)
        with pytest.raises(DataLoaderError, match=r"delivered nothing in time .* timed out after 2") as caught:
            loop_over(loader, tmp_path, data=policy).run()
        assert caught.value.fault == "worker hung"
        assert caught.value.resume_command is not None
        assert not records(tmp_path)
    finally:
        os.close(writer)  # the worker reads the end of the pipe, and ends
        os.close(reader)


def test_a_loader_is_waited_for_as_long_as_its_user_says(tmp_path: Path) -> None:
    seen = []

    class Remembering(DataLoader[Any]):
        def __iter__(self) -> Any:
            seen.append(super().__iter__())
            return seen[-1]

    options: dict[str, Any] = {"batch_size": 4, "num_workers": 1}
    for timeout_s, policy in ((0, DataPolicy()), (77, DataPolicy()), (0, DataPolicy(worker_timeout_s=None)), (0, None)):
        loader = Remembering(BadRows(8, {}), timeout=timeout_s, **options)
        loop_over(loader, tmp_path / str(len(seen)), max_steps=1, data=policy).run()
    assert [iterator._timeout for iterator in seen] == [300.0, 77, 0, 0]
    seen.clear()  # while the workers can still be told to go


def test_off_the_main_thread_signals_are_left_alone(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGCHLD)
    loop = loop_over(rows_loader({5: bad_data.quote_data}, num_workers=1), tmp_path, max_steps=3)
    thread = threading.Thread(target=loop.run)
    thread.start()
    thread.join()
    assert loop.guard.steps_completed == 3
    assert signal.getsignal(signal.SIGCHLD) == before


# -- streams -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_that_goes_on_loses_the_bad_sample_alone(tmp_path: Path, workers: int) -> None:
    stream: Any = RobustStream(32, {9: bad_data.quote_data})
    loader = DataLoader(skip_unreadable(stream), batch_size=4, num_workers=workers)
    loop = loop_over(loader, tmp_path / "run", max_steps=8).run()
    (record,) = records(tmp_path / "run")
    # The fifth sample of the second worker; or the tenth of one process.
    assert (record["what"], record["index"], record["batch"]) == ("sample", 4 if workers else 9, 3 if workers else 2)
    assert len(loop.losses) == 8


def test_a_stream_that_goes_on_can_lose_the_whole_batch(tmp_path: Path) -> None:
    loader = DataLoader(RobustStream(32, {9: bad_data.quote_data}), batch_size=4)
    loop_over(loader, tmp_path, max_steps=7).run()
    assert [(record["what"], record["batch"]) for record in records(tmp_path)] == [("batch", 2)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_stream_that_breaks_off_is_not_taken_for_one_that_ends(tmp_path: Path, wrapped: bool, workers: int) -> None:
    """A generator that raised is finished: the next epoch would begin, and the rest of this one be lost in silence."""
    stream: Any = GeneratorStream(32, {9: bad_data.quote_data})
    loader = DataLoader(skip_unreadable(stream) if wrapped else stream, batch_size=4, num_workers=workers)
    with pytest.raises(DataLoaderError, match="a stream that raised cannot go on") as caught:
        loop_over(loader, tmp_path).run()
    assert caught.value.fault == "stream"
    assert bad_data.SECRET not in str(caught.value)
    assert not records(tmp_path)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_stream_whose_batch_cannot_be_put_together_goes_on(tmp_path: Path, wrapped: bool) -> None:
    stream: Any = GeneratorStream(32, {})
    for workers in (0, 1):
        data = skip_unreadable(stream) if wrapped else stream
        loader: Any = DataLoader(data, batch_size=4, num_workers=workers, collate_fn=BadCollate(9))
        loop = loop_over(loader, tmp_path / str(workers), max_steps=7).run()
        assert [(r["what"], r["batch"]) for r in records(tmp_path / str(workers))] == [("batch", 2)]
        assert loop.guard.epoch == 0


class Hidden:
    """An iterator that goes over a generator: that this has ended shows only when it is asked again."""

    def __init__(self) -> None:
        self.samples = iter(GeneratorStream(8, {5: bad_data.quote_data}))

    def __iter__(self) -> Hidden:
        return self

    def __next__(self) -> Any:
        return _batch_of_one(next(self.samples))


class PlainStream:
    """No DataLoader."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __iter__(self) -> Iterator[Any]:
        if self.kind == "hidden generator":
            return Hidden()
        stream = (GeneratorStream if self.kind == "generator" else RobustStream)(8, {5: bad_data.quote_data})
        return (_batch_of_one(sample) for sample in stream) if "gen" in self.kind else _single(stream)


def _batch_of_one(sample: Any) -> Any:
    return [part.unsqueeze(0) for part in sample]


def _single(stream: RobustStream) -> Iterator[Any]:
    rows = stream.rows
    return map(_batch_of_one, map(rows.__getitem__, range(len(rows))))


@pytest.mark.parametrize("kind", ["generator", "hidden generator"])
def test_any_other_stream_that_breaks_off_ends_the_run(tmp_path: Path, kind: str) -> None:
    with pytest.raises(DataLoaderError, match="a stream that raised cannot go on"):
        loop_over(PlainStream(kind), tmp_path).run()


def test_any_other_stream_that_goes_on_goes_on(tmp_path: Path) -> None:
    loop_over(PlainStream("robust"), tmp_path, max_steps=9).run()
    assert [(record["epoch"], record["batch"]) for record in records(tmp_path)] == [(0, 5)]


class Prefetching(DataLoader[Any]):
    """Wraps torch's iterator in a generator, as accelerate's loaders do: an error ends it."""

    def __iter__(self) -> Any:
        yield from super().__iter__()


def test_a_loader_whose_iterator_an_error_ends_needs_samples_to_be_left_out(tmp_path: Path) -> None:
    data: Any = BadRows(48, {9: bad_data.quote_data})
    with pytest.raises(DataLoaderError, match="a stream that raised cannot go on"):
        loop_over(Prefetching(data, batch_size=4), tmp_path / "batches").run()
    loop_over(Prefetching(skip_unreadable(data), batch_size=4), tmp_path / "samples").run()
    assert [record["index"] for record in records(tmp_path / "samples")] == [9]


# -- going on after a resume ---------------------------------------------------------------------------------------

LOADERS: dict[str, Any] = {
    "batches": lambda: DataLoader(
        BadRows(48, {9: bad_data.quote_data, 30: bad_data.quote_data}, noise=True), batch_size=4, shuffle=True
    ),
    "samples": lambda: DataLoader(
        skip_unreadable(BadRows(48, {9: bad_data.quote_data, 30: bad_data.quote_data}, noise=True)),
        batch_size=4,
        shuffle=True,
    ),
    "own generator": lambda: DataLoader(
        skip_unreadable(BadRows(48, {9: bad_data.quote_data})),
        batch_size=4,
        sampler=RandomSampler(range(48), generator=torch.Generator().manual_seed(4)),
    ),
    "workers": lambda: DataLoader(BadRows(48, {9: bad_data.quote_data}), batch_size=4, shuffle=True, num_workers=1),
    "stream": lambda: DataLoader(RobustStream(48, {9: bad_data.quote_data}), batch_size=4),
    "stream, samples": lambda: DataLoader(skip_unreadable(RobustStream(48, {9: bad_data.quote_data})), batch_size=4),
}


class Gone(BaseException):
    """The process is gone, without a word and without a checkpoint."""


@pytest.mark.parametrize("saved_at", [2, 7])
@pytest.mark.parametrize("name", LOADERS)
def test_a_resumed_run_leaves_out_the_same_and_counts_it_once(tmp_path: Path, name: str, saved_at: int) -> None:
    whole = loop_over(LOADERS[name](), tmp_path / "whole", max_steps=20).run()

    def run(after_step: Any) -> Loop:
        # The checkpoint lies before or after the bad batches of the first epoch; the end is behind them.
        loop = loop_over(LOADERS[name](), tmp_path / "run", max_steps=20, checkpoint_every_steps=saved_at, keep_last=9)
        loop.after_step = after_step
        return loop.run()

    def leave(guard: Guard) -> None:
        if guard.steps_completed == 10:
            for step in range(saved_at + 1, 11):  # only the first checkpoint is left
                for folder in (tmp_path / "run" / "checkpoints").glob(f"*{step:08d}*"):
                    folder.rename(tmp_path / folder.name)
            raise Gone

    with pytest.raises(Gone):
        run(leave)
    resumed = run(None)
    assert torch.equal(resumed.weights(), whole.weights())
    assert resumed.guard.data_skipped == whole.guard.data_skipped >= 1
    stable = [{k: v for k, v in record.items() if k not in ("ts", "run_id")} for record in records(tmp_path / "run")]
    expected = [
        {k: v for k, v in record.items() if k not in ("ts", "run_id")} for record in records(tmp_path / "whole")
    ]
    assert stable == expected


def test_a_finished_run_still_says_what_it_left_out(tmp_path: Path) -> None:
    loop_over(rows_loader({5: bad_data.quote_data}), tmp_path, max_steps=3).run()
    again = loop_over(rows_loader({5: bad_data.quote_data}), tmp_path, max_steps=3).run()
    assert again.guard.data_skipped == 1
    assert len(records(tmp_path)) == 1


def test_loaders_used_in_turn_are_judged_each_for_itself(tmp_path: Path) -> None:
    loop = loop_over(None, tmp_path, data=DataPolicy(min_count=2, max_share=0.2))
    torch.manual_seed(11)
    with loop.guard.watch(model=loop.model, optimizer=loop.optimizer):
        for max_steps, faults in ((11, {5: bad_data.quote_data}), (15, {5: bad_data.quote_data})):
            for batch in loop.guard.batches(rows_loader(faults), max_steps=max_steps):
                loop.guard.backward(loop.compute_loss, batch)
                loop.optimizer.step()
                loop.optimizer.zero_grad()
    assert loop.guard.data_skipped == 2
    assert [(record["loader"], record["batch"]) for record in records(tmp_path)] == [(0, 1), (1, 1)]


def test_a_record_that_cannot_be_written_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "errors.jsonl").mkdir()
    loop = loop_over(rows_loader({5: bad_data.quote_data}), tmp_path, max_steps=3).run()
    assert loop.guard.data_skipped == 1
    assert len(loop.named(DataSkipped)) == 1
