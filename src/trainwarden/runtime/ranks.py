"""The processes of one run, and how they agree: one vote a step over a CPU group, and rank 0 speaking for all.

Nothing rank-wide (stop, checkpoint, pause, shrink, end) is done because one rank wants it; a rank sets a bit, and all
act on the bits that came out of the vote. A rank that is gone is a typed error on all others, never a wait for ever.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntFlag
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from trainwarden.errors import RankLostError, WardenError
from trainwarden.guards.oom import is_out_of_memory

T = TypeVar("T")

DEFAULT_DEADLINE_S = 1800.0
"""Longer than a checkpoint or the recovery of one rank should keep the others waiting; torch's own for gloo."""


class Wish(IntFlag):
    """What a rank asks all to do; the vote is the bitwise or."""

    NOTHING = 0
    STOP = 1
    SAVE = 2
    ATTEND = 4
    """A device asks for a pause or an end."""
    RECOVERED = 8
    """Memory ran out in this step, and the rank finished it with smaller parts."""
    FAILED = 16
    """This rank could not finish the backward pass: all leave before the optimizer steps."""
    LEAVE = 32
    """This rank has reason to end the run at the step boundary, after a checkpoint."""


class Ranks(Protocol):
    """What the guard needs from the processes of a run. Every method is called by all ranks at the same point."""

    rank: int
    world_size: int

    def vote(self, wishes: Wish) -> Wish:
        """The wishes of all ranks together."""

    def largest(self, count: int) -> int:
        """The largest of the ranks' counts."""

    def gather(self, value: T) -> list[T]:
        """The value of every rank, in order of rank, on every rank. Values are pickled: small, and from our own job."""

    def lead(self, do: Callable[[], T]) -> T:
        """What ``do`` returns on rank 0, where alone it is called; what it raises is raised on all ranks."""

    def close(self) -> None:
        """Gives the group back. Not collective."""


class Alone:
    """One process: every vote is unanimous."""

    rank = 0
    world_size = 1

    def vote(self, wishes: Wish) -> Wish:
        return wishes

    def largest(self, count: int) -> int:
        return count

    def gather(self, value: T) -> list[T]:
        return [value]

    def lead(self, do: Callable[[], T]) -> T:
        return do()

    def close(self) -> None:
        pass


class ProcessRanks:
    """The ranks of the default process group, talking over a gloo group of their own.

    Creating it is collective. ``deadline_s``: how long a rank is waited for.

    Raises `RankLostError`, from every method, when a rank is gone or silent for longer than the deadline.
    """

    def __init__(self, deadline_s: float = DEFAULT_DEADLINE_S) -> None:
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self._deadline_s = deadline_s
        with reachable("meet"):
            self._group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=deadline_s))

    def vote(self, wishes: Wish) -> Wish:
        bits = torch.tensor([int(wishes)], dtype=torch.int64)
        with reachable("vote"):
            dist.all_reduce(bits, op=dist.ReduceOp.BOR, group=self._group)
        return Wish(int(bits[0]))

    def largest(self, count: int) -> int:
        counts = torch.tensor([count], dtype=torch.int64)
        with reachable("count"):
            dist.all_reduce(counts, op=dist.ReduceOp.MAX, group=self._group)
        return int(counts[0])

    def gather(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.world_size
        with reachable("gather"):
            dist.all_gather_object(values, value, group=self._group)
        return values

    def lead(self, do: Callable[[], T]) -> T:
        if self.rank != 0:
            value, error = self._hear()
            if error is not None:
                raise error
            heard: T = value
            return heard
        outcome: tuple[T | None, WardenError | None]
        outcome = None, RankLostError(rank=0, world_size=self.world_size, problem="rank 0 ended with a foreign error")
        try:
            result = do()
            outcome = result, None
        except WardenError as failure:
            outcome = None, failure
            raise
        finally:
            self._say(outcome)
        return result

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group(self._group)

    def _say(self, outcome: Any) -> None:
        with reachable("tell"):
            dist.broadcast_object_list([outcome], src=0, group=self._group)

    def _hear(self) -> Any:
        heard: list[Any] = [None]
        with reachable("listen"):
            dist.broadcast_object_list(heard, src=0, group=self._group)
        return heard[0]


@contextmanager
def reachable(doing: str, *, is_failure: Callable[[RuntimeError], bool] = lambda _error: True) -> Iterator[None]:
    """Makes a `RankLostError` of a collective that fails inside: connection closed, reset, or the deadline.

    ``is_failure`` tells it from other errors where not everything inside is a collective.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_failure(error):
            raise
        raise rank_lost(error, doing) from error


def rank_lost(error: BaseException, doing: str) -> RankLostError:
    """The typed error of a collective that failed because another rank is gone or silent."""
    first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return RankLostError(rank=dist.get_rank(), world_size=dist.get_world_size(), problem=f"{doing}: {first_line}")


_LOST = (
    "gloo/transport",
    "Connection closed by peer",
    "Connection reset by peer",
    "NCCL",
    "Timed out waiting",
    "pair closure",
)


def is_rank_failure(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone or silent: by type, then by gloo's and NCCL's words."""
    if not isinstance(error, RuntimeError) or is_out_of_memory(error):
        return False
    return isinstance(error, dist.DistError) or any(text in str(error) for text in _LOST)


def current_ranks(deadline_s: float = DEFAULT_DEADLINE_S) -> Ranks:
    """The ranks of this process's run: those of the default process group, else itself alone.

    Collective when there is a process group.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return ProcessRanks(deadline_s)
    return Alone()


def leave_together(ranks: Ranks, error: WardenError | None) -> WardenError | None:
    """The error with which all ranks leave, or ``None``: their own where they have one, else the lowest rank's.

    Collective.
    """
    found = [one for one in ranks.gather(error) if one is not None]
    return error or next(iter(found), None)
