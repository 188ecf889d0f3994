"""Every storage's birth and death while a training loop runs on fake tensors: what happened, nothing of what it means.

`Recorder` sits above the fake tensors' own dispatch mode, so it sees exactly the operators that a real run would
execute. Each operator is executed first and its outputs are booked afterwards: inputs and outputs are alive together,
as they are in a kernel. What a kernel allocates for itself is not seen. A storage dies when the last tensor, view or
autograd node that holds it is gone: Python's references and autograd's are the real ones.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from trainwarden.memory.trace_accumulate import counts_when_sole, really_in_place
from trainwarden.memory.trace_casts import copied_bytes
from trainwarden.memory.trace_place import Moment, Whereabouts
from trainwarden.memory.trace_values import NEEDS_VALUES, UNKNOWN, follow_values, from_values, with_known_indices

MAX_EVENTS = 4_000_000
"""Births and deaths, about 0.5 GB of records. Real training steps have a few hundred thousand at most."""


BEGINNING = ""
"""Stands for an operator where a phase begins."""

Label = Literal["weights", "buffers", "batch", "gradients", "optimizer_states"]


@dataclass(slots=True)
class Stored:
    """One storage. ``label`` says what it is, if it is there for longer than a phase."""

    bytes: int
    born: Moment
    call: int
    """Of the operator, counted over the whole run: an operator's outputs are born together."""
    label: Label | None = None
    unit: str = ""
    """The block whose parameter this storage is, or belongs to."""
    owner: int = 0
    """Tells parameters apart: that of a gradient or state is its parameter's."""
    paged: bool = False
    """In host memory, and mapped into the device's address space."""
    died: int | None = None
    """The serial number of the phase in which it died."""


@dataclass(slots=True)
class Record:
    """Births (index + 1) and deaths (−index − 1) of ``storages`` in order, with the operator of each birth."""

    storages: list[Stored] = field(default_factory=list)
    events: list[int] = field(default_factory=list)
    operators: list[str] = field(default_factory=list)
    """Of the storage with the same index."""
    unlike: range = range(0)
    """Events that no training has: while optimizer states were made beforehand."""


PAGED = "_warden_paged"


def is_paged(tensor: torch.Tensor) -> bool:
    """Whether `mark_paged` was called on this tensor."""
    return getattr(tensor, PAGED, False)


def mark_paged(tensor: torch.Tensor) -> torch.Tensor:
    """Says that the real tensor would lie in host memory."""
    setattr(tensor, PAGED, True)
    return tensor


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Books storages into ``record``, each under the `Moment` that ``whereabouts`` states at its birth.

    ``on_cpu`` books the copies that elementwise kernels of the CPU make of operands of other types as well.
    """

    def __init__(self, whereabouts: Whereabouts, *, on_cpu: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        counts_when_sole()
        self.record = Record()
        self._where = whereabouts
        self._on_cpu = on_cpu
        self._call = 0
        self._alive: dict[int, int] = {}
        self._references: dict[int, weakref.ref[Any]] = {}
        self._copies = 0
        """Index of the copies of the operator that is being booked."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args = with_known_indices(func, args)
        out = UNKNOWN if func not in NEEDS_VALUES else from_values(func, args, kwargs)
        if out is UNKNOWN:
            out = func(*args, **(kwargs or {}))
        follow_values(func, args, kwargs, out)
        self._call += 1
        if isinstance(out, torch.Tensor):
            if self._where.phase == "backward" and really_in_place(func, args, out):
                self._move(args[0], out)
            copied = copied_bytes(func, args, out) if self._on_cpu else 0
            if copied:
                self._book_copies(copied, func, args)
            self._book(out, func, args)
            if copied:
                self._bury_copies()
        elif out is not None:
            for leaf in pytree.tree_leaves(out):
                if isinstance(leaf, torch.Tensor):
                    self._book(leaf, func, args)
        return out

    def label(self, tensors: Iterable[torch.Tensor], label: Label, unit: str = "", owner: int = 0) -> None:
        """Says what these tensors' storages are. Those not seen before (placed from outside) are born now."""
        for tensor in tensors:
            stored = self.record.storages[self._index(tensor, "placed")]
            if stored.label is None:
                stored.label, stored.unit, stored.owner = label, unit, owner
                stored.paged = is_paged(tensor)

    def begin_phase(self) -> None:
        """Books nothing, so that what is alive now is seen although the phase may allocate nothing."""
        self._call += 1
        self.record.storages.append(Stored(0, self._where.moment((), self.unit_of), self._call))
        self.record.operators.append(BEGINNING)
        self.record.events.append(len(self.record.storages))

    def unit_of(self, tensor: torch.Tensor) -> str | None:
        """The block that a parameter, its gradient or a state made from it belongs to; ``None`` for other tensors."""
        index = self._alive.get(tensor.untyped_storage()._cdata)
        if index is None:
            return None
        stored = self.record.storages[index]
        if stored.label is None:
            return stored.born.unit if stored.born.phase == "optimizer" else None
        return stored.unit

    def _book(self, tensor: torch.Tensor, func: Any, args: Any) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._alive:
            self._birth(storage, str(func), self._where.moment(args, self.unit_of))

    def _book_copies(self, nbytes: int, func: Any, args: Any) -> None:
        """Born with what the operator returns, so that both are alive at its point of the timeline."""
        record = self.record
        record.storages.append(Stored(nbytes, self._where.moment(args, self.unit_of), self._call))
        record.operators.append(str(func))
        record.events.append(len(record.storages))
        self._copies = len(record.storages) - 1

    def _bury_copies(self) -> None:
        self.record.events.append(-self._copies - 1)
        self.record.storages[self._copies].died = self._where.serial

    def _move(self, old: torch.Tensor, new: torch.Tensor) -> None:
        """Takes ``new`` for what ``old`` was."""
        key, storage = old.untyped_storage()._cdata, new.untyped_storage()
        if key in self._alive and storage._cdata not in self._alive:
            self._references.pop(key)
            self._alive[storage._cdata] = self._alive.pop(key)
            self._references[storage._cdata] = weakref.ref(storage, partial(self._death, storage._cdata))

    def _index(self, tensor: torch.Tensor, operator: str) -> int:
        storage = tensor.untyped_storage()
        index = self._alive.get(storage._cdata)
        return self._birth(storage, operator, self._where.moment((), self.unit_of)) if index is None else index

    def _birth(self, storage: torch.UntypedStorage, operator: str, moment: Moment) -> int:
        record = self.record
        if len(record.events) >= MAX_EVENTS:
            raise RuntimeError(f"more than {MAX_EVENTS} allocations in two steps")
        index, key = len(record.storages), storage._cdata
        record.storages.append(Stored(storage.nbytes(), moment, self._call))
        record.operators.append(operator)
        record.events.append(index + 1)
        self._alive[key] = index
        self._references[key] = weakref.ref(storage, partial(self._death, key))
        return index

    def _death(self, key: int, _: Any) -> None:
        index = self._alive.pop(key)
        del self._references[key]
        self.record.events.append(-index - 1)
        self.record.storages[index].died = self._where.serial
