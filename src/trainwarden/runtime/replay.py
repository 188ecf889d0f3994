"""Doing an interrupted optimizer step again without doing anything twice.

An optimizer step is a fixed sequence of tensor operations, and only those that write in place leave a trace: on the
parameters, on their states, and (Nesterov momentum, gradient scaling) on the gradients. Once it is known how many such
operations each of these tensors has received, the same step can be run again with exactly those left out: what it
computes besides is computed anew from values that are what they were. An operation that would read a value which is
already ahead, and whose result would reach a tensor, is refused before it is done: a replay is exact or it is none.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Applied = dict[int, int]
"""In-place operations that a tensor has received in this step, by its ``id``. Absent: none."""


class CannotReplayError(Exception):
    """What is left of the step depends on values that have been overwritten."""


class Journal(TorchDispatchMode):
    """Counts the operations of a step that write whole lists of tensors at once.

    Such kernels need not raise the version counters of what they write: torch's fused ones do not. Only identities are
    kept, so that temporaries die when they would; what is counted therefore holds for tensors that outlive the step.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._written: list[list[int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for position, name in _written_arguments(func):
            value = args[position] if position < len(args) else (kwargs or {}).get(name)
            self._note(value if isinstance(value, list) else [value])
        return result

    def _note(self, tensors: Sequence[Any]) -> None:
        self._written.append(list(map(id, tensors)))
        bases = [tensor._base for tensor in tensors if isinstance(tensor, Tensor)]
        if bases and bases[0] is not None:  # complex parameters are written through real views
            self._written.append(list(map(id, bases)))

    def applied(self, lasting: Iterable[Tensor]) -> Applied:
        """The counts of ``lasting``, which have been there since before the step."""
        counts = Counter(itertools.chain.from_iterable(self._written))
        return {id(tensor): counts[id(tensor)] for tensor in lasting if id(tensor) in counts}


class Replay(TorchDispatchMode):
    """One pass of a step over ``parameters``, leaving out what ``applied`` says is done, and adding what it does.

    Raises `CannotReplayError` from within the pass, before anything wrong is done.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor], applied: Applied) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._state = optimizer.state
        self._applied = applied
        self._passed: Applied = {}
        self._owners: dict[int, int] = {}
        self._stateless: list[Tensor] = []
        self._stale: set[int] = set()
        for parameter in parameters:
            self._own(parameter, parameter)
            if parameter.grad is not None:
                self._own(parameter.grad, parameter)
            self._stateless.append(parameter)
        self._find_states()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        written, read = _operands(func, args, kwargs)
        targets = self._lasting(written)
        ahead = {self._owners[key] for key in map(self._key, read) if key is not None and self._is_ahead(key)}
        if not targets:
            if not _makes_view(func):
                self._stale |= ahead
            return func(*args, **kwargs)
        done = [self._is_ahead(key) for key in targets]
        if not all(done):
            owners = {self._owners[key] for key in targets}
            if any(done) or ahead or owners & self._stale:
                raise CannotReplayError(f"what is left ({func}) needs a value that the step has overwritten")
            result = func(*args, **kwargs)
            for key in targets:
                self._applied[key] = self._applied.get(key, 0) + 1
        else:
            result = written[0] if func._schema.returns else None
        for key in targets:
            self._passed[key] = self._passed.get(key, 0) + 1
        return result

    def _lasting(self, written: Sequence[Tensor]) -> list[int]:
        """The written tensors that outlive the step; temporaries are none of our business."""
        keys = [self._key(tensor) for tensor in written]
        if None in keys and self._stateless:
            self._find_states()
            keys = [self._key(tensor) for tensor in written]
        return [key for key in keys if key is not None]

    def _key(self, tensor: Tensor) -> int | None:
        if id(tensor) in self._owners:
            return id(tensor)
        base = tensor._base  # complex parameters are written through real views
        return id(base) if base is not None and id(base) in self._owners else None

    def _is_ahead(self, key: int) -> bool:
        return self._applied.get(key, 0) > self._passed.get(key, 0)

    def _own(self, tensor: Tensor, parameter: Tensor) -> None:
        self._owners[id(tensor)] = id(parameter)

    def _find_states(self) -> None:
        """States may be made during the pass, all of a group before its first operation."""
        found = [parameter for parameter in self._stateless if self._state.get(parameter)]
        for parameter in found:
            for tensor in state_tensors(self._state, parameter):
                self._own(tensor, parameter)
        if found:
            known = set(map(id, found))
            self._stateless = [parameter for parameter in self._stateless if id(parameter) not in known]


def state_tensors(state: Mapping[Any, Any], parameter: Tensor) -> Iterator[Tensor]:
    """The tensors that an optimizer keeps of a parameter."""
    for value in (state.get(parameter) or {}).values():
        if isinstance(value, Tensor):
            yield value


def lasting_tensors(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor]) -> Iterator[Tensor]:
    """Everything that a step changes for good, as it is there now."""
    for parameter in parameters:
        yield parameter
        if parameter.grad is not None:
            yield parameter.grad
        yield from state_tensors(optimizer.state, parameter)


def raised_counters(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor], before: Applied) -> Applied:
    """By how much version counters have been raised; a state that was not there began at 0."""
    now = {id(tensor): tensor._version for tensor in lasting_tensors(optimizer, parameters)}
    return {key: count - before.get(key, 0) for key, count in now.items() if count > before.get(key, 0)}


def share_memory(tensors: Iterable[Tensor]) -> bool:
    seen = [tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()]
    return len(set(seen)) < len(seen)


def counters_tell(optimizer: torch.optim.Optimizer, body: Callable[[torch.optim.Optimizer], Any]) -> bool:
    """Whether every operation of this optimizer's step raises the version counter of what it writes.

    Where torch works on lists that depends on the kernel, so it is tried: a copy of the optimizer, with one parameter
    of four elements for each group, takes two steps that are counted in both ways.
    """
    replica = object.__new__(type(optimizer))
    vars(replica).update(vars(optimizer))
    parameters = []
    replica.param_groups, replica.state = [], defaultdict(dict)
    for group in optimizer.param_groups:
        kind = group["params"][0]
        parameter = torch.ones((2, 2), dtype=kind.dtype, device=kind.device)
        parameter.grad = torch.ones_like(parameter)
        parameters.append(parameter)
        replica.param_groups.append({**group, "params": [parameter]})
    body(replica)
    before = {id(tensor): tensor._version for tensor in lasting_tensors(replica, parameters)}
    body(replica)
    raised = raised_counters(replica, parameters, before)
    with Journal() as journal:
        body(replica)
    noted = journal.applied(lasting_tensors(replica, parameters))
    return bool(raised == noted)


@functools.cache
def _written_arguments(func: Any) -> tuple[tuple[int, str], ...]:
    """Position and name of each argument that an operator writes."""
    return tuple(
        (position, argument.name)
        for position, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


@functools.cache
def _makes_view(func: Any) -> bool:
    """Whether the result shows an argument's own memory: nothing is read until something reads the view."""
    return any(result.alias_info is not None for result in func._schema.returns)


def _operands(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors that an operator writes, and those that it only reads, each once."""
    places = _written_arguments(func)
    written: dict[int, Tensor] = {}
    read: dict[int, Tensor] = {}
    for place, value in itertools.chain(enumerate(args), kwargs.items()):
        into = written if any(place in names for names in places) else read
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(item, Tensor):
                into[id(item)] = item
    return list(written.values()), [tensor for key, tensor in read.items() if key not in written]
