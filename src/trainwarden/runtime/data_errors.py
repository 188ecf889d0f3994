"""What a run does about data that cannot be loaded: leave it out and write that down, or end in good order."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import CodeType
from typing import Any, Literal

from torch.utils.data import DataLoader, IterableDataset

from trainwarden.errors import DataLoaderError, WardenError, redact
from trainwarden.events import DataSkipped, Event
from trainwarden.guards.data import DataLosses, DataPolicy
from trainwarden.runs.error_log import ERRORS_NAME, ErrorLog
from trainwarden.runtime.data_faults import Cause, Fault, breaks_stream, cause_of, fault_of, indices_of, is_spent
from trainwarden.runtime.journal import FollowerJournal, RunJournal
from trainwarden.runtime.ranks import Ranks
from trainwarden.runtime.unreadable import Partial, reports_samples
from trainwarden.runtime.worker_deaths import WorkerDeaths, death_of_worker, dismiss_workers

_KEY = ("rank", "loader", "epoch", "batch", "index")
"""What a record is known by when a resumed run meets it again."""

_PROBLEMS: Mapping[Fault, str] = {
    "stream": "a stream that raised cannot go on, and the rest of its epoch would be lost",
    "memory": "memory ran out while data was loaded",
    "handles": "there are too many open files",
    "worker died": "a worker process of the loader died",
    "worker hung": "the worker processes of the loader delivered nothing in time",
    "loader": "the loader itself failed",
}


@dataclass(frozen=True)
class Place:
    """A batch by where it stands: ``index`` in its epoch, from 0; ``seen`` batches of the loader with it, from 1."""

    epoch: int
    index: int
    seen: int


class DataErrors:
    """What is done about the errors of the loaders of one ``watch``, on one rank.

    Args:
        policy: how much may be left out, and how long workers may be silent.
        run_dir: where ``errors.jsonl`` is written.
        run_id, rank: of this process.
        alone: whether this is the only rank. Otherwise too large a share is no reason to stop between two steps, where
            the others would wait: `leaving` says so, and all leave at the end of the step.
        step: the optimizer steps completed.
        emit: takes a `DataSkipped` for each sample or batch left out.
    """

    def __init__(
        self,
        policy: DataPolicy,
        run_dir: Path,
        *,
        run_id: str,
        rank: int,
        alone: bool,
        step: Callable[[], int],
        emit: Callable[[Event], None],
    ) -> None:
        self.policy = policy
        self.losses = DataLosses()
        self.leaving: DataLoaderError | None = None
        """Why this rank wants to end the run at the next step boundary."""
        self.ending: DataLoaderError | None = None
        """Why no further batch may be asked for."""
        self._earlier = 0
        self._run_id = run_id
        self._rank = rank
        self._alone = alone
        self._step = step
        self._emit = emit
        self._log = ErrorLog(run_dir / ERRORS_NAME, key=_KEY)
        self._loader: Any = None
        self._of_user: Any = None
        self._number = -1
        self._left_out_then = 0
        self._newest = ""
        self._iterator: weakref.ref[Any] | None = None
        self._broken: Fault | None = None
        self.deaths = WorkerDeaths()

    @classmethod
    def of(
        cls,
        policy: DataPolicy | None,
        journal: RunJournal | FollowerJournal,
        ranks: Ranks,
        *,
        step: Callable[[], int],
        emit: Callable[[Event], None],
    ) -> DataErrors | None:
        """For one rank of a run; ``None`` without a policy."""
        if policy is None:
            return None
        alone = ranks.world_size == 1
        return cls(policy, journal.path, run_id=journal.run_id, rank=ranks.rank, alone=alone, step=step, emit=emit)

    @property
    def count(self) -> int:
        """Samples and whole batches that this rank has left out in the whole run."""
        return self._earlier + self.losses.count

    def begin_loader(self, loader: Any, *, of_user: Any, fetching: Iterable[CodeType]) -> None:
        """``loader``, maybe a copy of that of the user, is used from now on; ``fetching`` asks it for batches."""
        self._earlier += self.losses.count
        self.losses = DataLosses()
        self._loader, self._of_user = loader, of_user
        self._number += 1
        self.deaths.fetching = frozenset(fetching)

    def state_dict(self) -> dict[str, Any]:
        return {"losses": asdict(self.losses), "earlier": self._earlier}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.losses = DataLosses(**state["losses"])
        self._earlier = state["earlier"]

    def close(self) -> None:
        """Leaves signals as they were found, and no worker processes behind but the user's own persistent ones."""
        iterator = self._iterator() if self._iterator else None
        kept = iterator is not None and getattr(self._of_user, "_iterator", None) is iterator
        if iterator is not None and (self._broken or not kept):
            dismiss_workers(iterator, broken=self._broken in ("worker died", "worker hung"))
            if kept:
                self._of_user._iterator = None  # or the loader would ask these workers again
        self.deaths.remove()

    def opened(self, iterator: Any) -> None:
        """An epoch was opened: its worker processes are not waited for without end, nor may they break in anywhere."""
        if not getattr(iterator, "_num_workers", 0):
            return
        self._iterator = weakref.ref(iterator)
        self.deaths.install()
        if self.policy.worker_timeout_s is not None and getattr(iterator, "_timeout", None) == 0:
            iterator._timeout = self.policy.worker_timeout_s

    def end(self, place: Place) -> None:
        """Raises `DataLoaderError`, as `ending` says or because a worker died since the last batch."""
        if self.ending is not None:
            raise self.ending
        death = self.deaths.noted
        assert death is not None
        raise self._loader_error("worker died", death, place) from death

    def opening_failed(self, error: RuntimeError, place: Place) -> None:
        """Raises what became of the workers while an epoch was opened; returns for any other error."""
        fault = fault_of(error, self._loader)
        if fault in ("worker died", "worker hung"):
            raise self._loader_error(fault, error, place) from error

    # -- what went wrong -----------------------------------------------------------------------------------------

    def batch_failed(self, error: Exception, iterator: Any, place: Place) -> None:
        """Takes note of a batch that is left out.

        Raises:
            DataLoaderError: the loader cannot go on.
            Exception: ``error`` itself where it is no matter of data.
        """
        self.require_going_on(error, iterator, place)
        cause, losses = cause_of(error), self.losses
        self.losses = replace(losses, seen=place.seen, batches=losses.batches + 1, lost=losses.lost + 1.0)
        self._newest = str(cause)
        self._record("batch", None, cause, place, indices=indices_of(error))
        self._judge(cause, place)

    def require_going_on(self, error: Exception, iterator: Any, place: Place) -> None:
        """Returns when ``error`` is of one batch alone. Raises as `batch_failed`."""
        if isinstance(error, WardenError):
            raise error
        fault = fault_of(error, self._loader)
        if fault == "sample" and not self._goes_on(error, iterator):
            fault = "stream"
        if fault == "program":
            raise error
        if fault == "loader":
            death = self.deaths.noted or death_of_worker(error, iterator)
            if death is not None:
                raise self._loader_error("worker died", death, place) from error
        if fault != "sample":
            raise self._loader_error(fault, error, place) from error

    def samples_failed(self, partial: Partial, place: Place) -> None:
        """Takes note of the samples that are missing in a batch."""
        for missing in partial.missing:
            losses = self.losses
            lost = losses.lost + 1 / partial.size
            self.losses = replace(losses, seen=place.seen, samples=losses.samples + 1, lost=lost)
            self._record("sample", missing.index, missing.cause, place)
        self._judge(partial.missing[-1].cause, place)

    def ended_after_failure(self, place: Place) -> None:
        """An epoch ended right after a batch that failed. Of a stream nobody can say whether anything was left.

        Raises:
            DataLoaderError: the loader is a stream.
        """
        if self._is_stream():
            raise self._error("stream", _problem("stream", self._newest, place), self._newest, place)

    def _is_stream(self) -> bool:
        return not isinstance(self._loader, DataLoader) or isinstance(self._loader.dataset, IterableDataset)

    def _goes_on(self, error: Exception, iterator: Any) -> bool:
        if is_spent(iterator):  # a loader that wraps torch's iterator in a generator
            return False
        # Samples that failed were left out in the data set already: what is left is an error of collating.
        return not self._is_stream() or reports_samples(self._loader) or not breaks_stream(error, iterator)

    def _record(
        self,
        what: Literal["sample", "batch"],
        index: Any,
        cause: Cause,
        place: Place,
        *,
        indices: list[Any] | None = None,
    ) -> None:
        """Writes one line and tells the observers."""
        index = _plain(index)
        record: dict[str, Any] = {
            "run_id": self._run_id,
            "step": self._step(),
            "rank": self._rank,
            "loader": self._number,
            "epoch": place.epoch,
            "batch": place.index,
            "what": what,
            "index": index,
            "code": DataLoaderError.code,
            "cause": str(cause),
        }
        if indices is not None:
            record["indices"] = [_plain(one) for one in indices]
        self._log.append(record)
        self._emit(
            DataSkipped(
                step=self._step(),
                what=what,
                epoch=place.epoch,
                batch_index=place.index,
                index=index,
                cause=str(cause),
                count=self.count,
                share=self.losses.share,
            )
        )

    def _judge(self, cause: Cause, place: Place) -> None:
        """Ends the run when too much was left out: before the next batch, or at the step boundary of all ranks."""
        if not self.policy.exceeded(self.losses):
            return
        if self.leaving is None:
            self.leaving = self._error("sample", f"{self._told()}; the newest: {cause}", str(cause), place)
            self._left_out_then = self.losses.count
        if self._alone or self.losses.count >= self._left_out_then + self.policy.min_count:
            self.ending = self.leaving

    def _told(self) -> str:
        losses = self.losses
        whole, single = f"{losses.batches:,} batches", f"{losses.samples:,} samples"
        what = f"{whole} and {single}" if losses.batches and losses.samples else single if losses.samples else whole
        share = f"{losses.share:.2%}, allowed are {self.policy.max_share:.2%}"
        return f"{what} were left out of {losses.seen:,} batches ({share})"

    def _loader_error(self, fault: Fault, error: BaseException, place: Place) -> DataLoaderError:
        self._broken = fault
        known = fault in ("worker died", "worker hung")  # torch's own words, with no data in them
        cause = redact(str(error).strip().splitlines()[0]) if known else str(cause_of(error))
        return self._error(fault, _problem(fault, cause, place), cause, place)

    def _error(self, fault: Fault, problem: str, cause: str, place: Place) -> DataLoaderError:
        losses = replace(self.losses, seen=place.seen)
        return DataLoaderError(
            problem=problem,
            fault=fault,
            cause=cause,
            batches_seen=losses.seen,
            batches_left_out=losses.batches,
            samples_left_out=losses.samples,
            share=losses.share,
            max_share=self.policy.max_share,
            epoch=place.epoch,
            batch_index=place.index,
            rank=self._rank,
        )


def _problem(fault: Fault, cause: str, place: Place) -> str:
    return f"{_PROBLEMS[fault]} at batch {place.index} of epoch {place.epoch} ({cause})"


def _plain(index: Any) -> int | str | None:
    """An index as JSON holds it."""
    if index is None or isinstance(index, bool | int):
        return index
    return redact(str(index))[:200]
