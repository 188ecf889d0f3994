"""Where a training loop is: its phase, and the module whose forward pass, or the backward of it, is running.

In the forward pass hooks on modules tell. In the backward pass the running autograd node does: nodes are numbered in
the order of their creation, so its number lies in the interval that a module's forward pass took.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from trainwarden.memory.prediction import Phase

UNIT_FREE = ""


class Moment(NamedTuple):
    """``unit`` is the innermost tracked unit (a block of a stack), ``after`` the one that was left last."""

    serial: int
    """Of the phase, counted over all steps; 0 is loading."""
    phase: Phase
    unit: str
    after: str
    module: str
    recomputing: bool


@dataclass(frozen=True)
class _Place:
    unit: str
    after: str
    module: str


_NOWHERE = _Place(UNIT_FREE, UNIT_FREE, "")


class Whereabouts:
    """Follows a model through its steps. ``units`` maps modules' qualified names to the unit they begin."""

    def __init__(self, model: nn.Module, units: Mapping[str, str]) -> None:
        self._names = {id(module): name for name, module in model.named_modules()}
        # By name, as checkpointing may enter a block again without calling it.
        self._units = {id(module): unit_of_name(name, units) for name, module in model.named_modules()}
        self._blocks = {id(module): units[name] for name, module in model.named_modules() if name in units}
        self._stack: list[_Place] = []
        self._after = UNIT_FREE
        self._node_numbers: list[int] = []
        self._node_places: list[_Place] = []
        self._backward_place = _NOWHERE
        self._stepping = UNIT_FREE
        self.serial = 0
        self.phase: Phase = "load"

    def enter(self, phase: Phase) -> None:
        """Begins the next phase."""
        self.phase, self.serial = phase, self.serial + 1
        self._stack.clear()
        self._backward_place, self._stepping = _NOWHERE, UNIT_FREE
        if phase == "forward":
            self._after = UNIT_FREE
            self._node_numbers.clear()
            self._node_places.clear()
            self._note_nodes()

    def moment(self, args: Any, unit_of: Callable[[torch.Tensor], str | None]) -> Moment:
        """The moment of an operator that was called with ``args``."""
        recomputing = self.phase == "backward" and torch.is_grad_enabled()  # only checkpointing enables it there
        place = self._place(args, unit_of)
        return Moment(self.serial, self.phase, place.unit, place.after, place.module, recomputing)

    def _place(self, args: Any, unit_of: Callable[[torch.Tensor], str | None]) -> _Place:
        if self.phase == "optimizer":
            self._stepping = _common_unit(args, unit_of, self._stepping)
            return _Place(self._stepping, UNIT_FREE, "")
        if self._stack:
            return self._stack[-1]
        if self.phase != "backward":
            return _Place(UNIT_FREE, self._after, "")
        node = torch._C._current_autograd_node()
        number = node._sequence_nr() if node is not None else None
        if number is not None and self._node_numbers and number <= torch.autograd._get_sequence_nr():  # type: ignore[attr-defined]
            self._backward_place = self._node_places[max(bisect_right(self._node_numbers, number) - 1, 0)]
        return self._backward_place  # accumulation into a leaf has no number of its own: it follows its producer

    @contextmanager
    def followed(self) -> Iterator[None]:
        """While this is open, module calls are noticed."""
        handles = [
            register_module_forward_pre_hook(self._entered),
            register_module_forward_hook(self._left, always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _entered(self, module: nn.Module, _: Any) -> None:
        name = self._names.get(id(module))
        outer = self._stack[-1] if self._stack else _Place(UNIT_FREE, self._after, "")
        unit = self._units.get(id(module)) or outer.unit
        self._stack.append(_Place(unit, self._after, outer.module if name is None else name))
        self._note_nodes()

    def _left(self, module: nn.Module, _: Any, __: Any) -> None:
        if self._stack:
            self._stack.pop()
        if id(module) in self._blocks:
            self._after = self._blocks[id(module)]
            self._stack = [_Place(place.unit, self._after, place.module) for place in self._stack]
        self._note_nodes()

    def _note_nodes(self) -> None:
        """Autograd nodes created from here on belong to the present place."""
        self._node_numbers.append(torch.autograd._get_sequence_nr())  # type: ignore[attr-defined]
        outside = self._backward_place if self.phase == "backward" else _Place(UNIT_FREE, self._after, "")
        self._node_places.append(self._stack[-1] if self._stack else outside)


def unit_of_name(name: str, units: Mapping[str, str]) -> str:
    """The unit that a module or parameter of this qualified name lies in; empty if in none."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        if (unit := units.get(".".join(parts[:end]))) is not None:
            return unit
    return UNIT_FREE


def _common_unit(args: Any, unit_of: Callable[[torch.Tensor], str | None], last: str) -> str:
    """The unit whose parameter, gradient or state an optimizer's operator works on; empty for a list of them.

    An operator on none of these prepares the next one, and counts as part of the last unit.
    """
    if any(isinstance(arg, list | tuple) and arg and isinstance(arg[0], torch.Tensor) for arg in args):
        return UNIT_FREE
    units = (unit_of(arg) for arg in args if isinstance(arg, torch.Tensor))
    return next((unit for unit in units if unit is not None), last)
