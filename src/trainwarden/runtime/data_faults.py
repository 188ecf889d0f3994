"""Whose fault it is that a batch did not come: a sample's or the loader's; and what may be written down about it."""

from __future__ import annotations

import errno
import re
import sysconfig
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, GeneratorType, TracebackType
from typing import Any, Literal

from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader
from torch.utils.data._utils.fetch import _IterableDatasetFetcher, _MapDatasetFetcher
from torch.utils.data._utils.pin_memory import pin_memory

from trainwarden.errors import redact
from trainwarden.guards.oom import is_out_of_memory

Fault = Literal["sample", "stream", "memory", "handles", "worker died", "worker hung", "loader", "program"]
"""``sample``: this sample or batch alone, the next may be well. ``program``: a defect of the code, whatever the data.
The others end what the loader can deliver."""

_PROGRAM = frozenset(
    {"ImportError", "ModuleNotFoundError", "NameError", "NotImplementedError", "ReferenceError"}
    | {"SyntaxError", "IndentationError", "TabError", "SystemError", "UnboundLocalError"}
)
"""What no data can cause: leaving out samples would hide it until the share is full."""

_FROM_DATA: frozenset[CodeType] = frozenset(
    function.__code__
    for function in (
        ExceptionWrapper.reraise,  # as a worker process or the pinning thread sent it
        _MapDatasetFetcher.fetch,
        _IterableDatasetFetcher.fetch,
        pin_memory,
    )
)
"""Where an error must have passed to be one of reading, decoding or collating. What comes out of a ``DataLoader`` by
another way (its sampler, its queues, the signal of a dead worker) is the loader's."""

_CAUGHT = re.compile(r"Caught (\w+) in (?:DataLoader worker process|pin memory thread)")
_PLACE = re.compile(r'^\s+File "([^"\n]+)", line (\d+), in (.+)$', re.MULTILINE)
_ERRNO = re.compile(r"\[Errno (\d+)\]")
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE})
_SAFE = re.compile(
    r"""
      \[Errno\ \d+\]\ [^\n]{1,300}                                          # the system's words, and a path
    | '[\w-]+'\ codec\ can't\ decode\ bytes?\ [^\n]{1,120}
    | (?:Expecting|Extra\ data|Unterminated|Invalid)[^\n]{0,60}:?\ line\ \d+\ column\ \d+\ \(char\ \d+\)
    """,
    re.VERBOSE,
)
"""Messages of which it is known that they quote no data. All others may: ``could not convert string to float: …``."""

_FOREIGN = (
    *(str(Path(sysconfig.get_path(name)).resolve()) for name in ("stdlib", "purelib", "platlib")),
    str(Path(__file__).resolve().parents[1]),
    "<",
)
"""Where code lies that is not the run's own."""


class StreamBrokenError(Exception):
    """A data set's own iterator has ended for good because it raised. Made in worker processes too: one argument."""


@dataclass(frozen=True)
class Cause:
    """Why something was left out, without any of its data: the kind of error, its place in the code, harmless words."""

    kind: str
    place: str | None
    detail: str | None

    def __str__(self) -> str:
        said = f": {self.detail}" if self.detail else ""
        return f"{self.kind}{said}" + (f" at {self.place}" if self.place else "")


def cause_of(error: BaseException) -> Cause:
    """What may be written down about ``error``, raised here or in a worker process."""
    text = _message(error)
    kind = kind_of(error)
    worker = _CAUGHT.search(text)
    if worker is None:
        places = [
            (frame.filename, frame.lineno or 0, frame.name) for frame in traceback.extract_tb(error.__traceback__)
        ]
    else:
        places = [(file, int(line), name) for file, line, name in _PLACE.findall(text)]
    safe = _SAFE.match((text.rsplit(f"{kind}:", 1)[-1] if worker else text).strip())
    return Cause(kind, _innermost(places), redact(safe[0]) if safe else None)


def kind_of(error: BaseException) -> str:
    """The name of the error's class; of one that a worker could not send as it was, the name that it had there."""
    named = _CAUGHT.search(_message(error))
    return named[1] if named else type(error).__name__


def fault_of(error: BaseException, loader: Any) -> Fault:
    """Whose fault ``error`` is, which came out of an iterator of ``loader``."""
    if is_out_of_memory(error) or "Cannot allocate memory" in _last_line(error):
        return "memory"
    text = _message(error)
    number = getattr(error, "errno", None) or next(map(int, _ERRNO.findall(_last_line(error))), None)
    if number in _EXHAUSTED or text.startswith("Too many open files"):
        return "handles"
    if isinstance(loader, DataLoader) and not passed_through_data(error):
        return _fault_of_loader(text, kind_of(error))
    if kind_of(error) in _PROGRAM:
        return "program"
    return "stream" if isinstance(error, StreamBrokenError) else "sample"


def _fault_of_loader(text: str, kind: str) -> Fault:
    if text.startswith("DataLoader worker (pid"):
        return "worker died"
    if text.startswith("DataLoader timed out"):
        return "worker hung"
    return "program" if kind in _PROGRAM else "loader"


def passed_through_data(error: BaseException) -> bool:
    """Whether torch was reading, decoding, collating or pinning when ``error`` was raised."""
    return any(frame.tb_frame.f_code in _FROM_DATA for frame in _frames(error.__traceback__))


def raised_by_sample(end: StopIteration) -> bool:
    """Whether a map-style data set raised ``end``: then it is an error like any other, and no end of an epoch."""
    codes = (ExceptionWrapper.reraise.__code__, _MapDatasetFetcher.fetch.__code__)
    return any(frame.tb_frame.f_code in codes for frame in _frames(end.__traceback__))


def indices_of(error: BaseException) -> list[Any] | None:
    """The indices of the batch that was being read in this process; ``None`` where only a worker knew them."""
    for frame in _frames(error.__traceback__):
        if frame.tb_frame.f_code is _MapDatasetFetcher.fetch.__code__:
            index = frame.tb_frame.f_locals.get("possibly_batched_index")
            return list(index) if isinstance(index, list | tuple | range) else [index]
    return None


def breaks_stream(error: BaseException, iterator: Any) -> bool:
    """Whether a stream (anything but a map-style data set) cannot go on after ``error``, or may not be trusted to.

    An iterator written as a generator is finished once it has raised: asking it again ends the epoch, and what was
    left of it would be lost without a word. In a worker process that cannot be looked at, so there only an error of
    collating is known to have left the stream whole.
    """
    if getattr(iterator, "_num_workers", 0):
        return "self.collate_fn(" not in _message(error)
    fetcher = getattr(iterator, "_dataset_fetcher", None)
    return is_spent(getattr(fetcher, "dataset_iter", iterator))


def is_spent(iterator: Any) -> bool:
    """Whether ``iterator`` is a generator that has returned or raised."""
    return isinstance(iterator, GeneratorType) and iterator.gi_frame is None


def _frames(trace: TracebackType | None) -> list[TracebackType]:
    found = []
    while trace is not None:
        found.append(trace)
        trace = trace.tb_next
    return found


def _message(error: BaseException) -> str:
    return str(error)


def _last_line(error: BaseException) -> str:
    return (_message(error).strip().splitlines() or [""])[-1]


def _innermost(places: list[tuple[str, int, str]]) -> str | None:
    """The deepest place in code of the run's own, else the deepest of all: ``images.py:31 in decode``."""
    own = [place for place in places if not place[0].startswith(_FOREIGN)]
    deepest = (own or places)[-1:]
    return redact(f"{Path(deepest[0][0]).name}:{deepest[0][1]} in {deepest[0][2]}") if deepest else None
