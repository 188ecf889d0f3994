"""Data sets with faults that really happen, of classes that worker processes can load."""

from __future__ import annotations

import json
import os
import signal
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset, default_collate, get_worker_info

Sample = tuple[torch.Tensor, torch.Tensor]

SECRET = "patient 4711 has a rare disease"


def row(index: int) -> Sample:
    generator = torch.Generator().manual_seed(1000 + index)
    return torch.randn(6, generator=generator), torch.randn(1, generator=generator)


def as_lists(batch: Any) -> list[float]:
    """The first input of each sample: which samples a batch holds, in their order."""
    return [float(value) for value in batch[0][:, 0]]


def firsts(indices: Sequence[int]) -> list[float]:
    return [float(row(index)[0][0]) for index in indices]


def quote_data(_index: int) -> None:
    float(SECRET)


def missing_file(index: int) -> None:
    Path(f"no-such-folder/{index}.jpg").read_bytes()


def corrupt_image(_index: int) -> None:
    zlib.decompress(zlib.compress(b"pixels " * 50)[:-9] + b"corrupted")


def corrupt_json(_index: int) -> None:
    json.loads('{"text": "' + SECRET)


def not_utf8(_index: int) -> None:
    (SECRET.encode() + b"\xff").decode("utf-8")


def end_of_samples(_index: int) -> None:
    raise StopIteration


def out_of_memory(_index: int) -> None:
    raise MemoryError


def defect(_index: int) -> None:
    raise NameError("name 'augmnet' is not defined")


def interrupt(_index: int) -> None:
    raise KeyboardInterrupt


def killed(_index: int) -> None:
    """As the host's out-of-memory killer does it."""
    os.kill(os.getpid(), signal.SIGKILL)


class Blocked:
    """Waits for a byte that never comes, as a read from a lost file server does."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __call__(self, _index: int) -> None:
        os.read(self.fd, 1)


Fault = Callable[[int], None]


class BadRows(Dataset[Sample]):
    """``faults`` strike where these indices are read. ``noise`` draws from the global random stream."""

    def __init__(self, count: int, faults: Mapping[int, Fault], *, noise: bool = False) -> None:
        self.count = count
        self.faults = dict(faults)
        self.noise = noise

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        inputs, targets = row(index)
        if self.noise:
            inputs = inputs + torch.randn(())
        if index in self.faults:
            self.faults[index](index)
        return inputs, targets


class TogetherRows(BadRows):
    """Reads a whole batch at once, as a data base does, and fails as a whole."""

    def __getitems__(self, indices: list[int]) -> list[Sample]:
        return [self[index] for index in indices]


class PidRows(BadRows):
    """Each sample's target is the process that read it."""

    def __getitem__(self, index: int) -> Sample:
        return super().__getitem__(index)[0], torch.tensor([float(os.getpid())])


class GeneratorStream(IterableDataset[Sample]):
    """Its iterator is a generator, so an error ends it."""

    def __init__(self, count: int, faults: Mapping[int, Fault]) -> None:
        self.rows = BadRows(count, faults)

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        start, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for index in range(start, len(self.rows), step):
            yield self.rows[index]


class RobustStream(GeneratorStream):
    """Its iterator goes on after an error."""

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        start, step = (worker.id, worker.num_workers) if worker else (0, 1)
        return map(self.rows.__getitem__, range(start, len(self.rows), step))


class BadCollate:
    """Cannot put together a batch that holds sample ``index``."""

    def __init__(self, index: int) -> None:
        self.value = float(row(index)[0][0])

    def __call__(self, samples: list[Sample]) -> Any:
        if any(float(inputs[0]) == self.value for inputs, _ in samples):
            samples = [(inputs[: 1 + place], targets) for place, (inputs, targets) in enumerate(samples)]
        return default_collate(samples)
