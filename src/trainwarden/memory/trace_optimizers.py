"""Stand-ins for optimizers that cannot run on fake tensors: they allocate what the real ones allocate, and do no more.

8-bit optimizers read values (``.item()``) or need CUDA kernels. What they keep is known: bitsandbytes
(``optim/optimizer.py``, ``Optimizer2State.init_state``) holds each of Adam's two moments as one byte a parameter and a
float32 scale for each block of 256, tensors below 4,096 elements in float32, and two shared tables of 256 float32.
Its update works in place, without a temporary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from trainwarden.errors import InvalidSettingError
from trainwarden.memory.trace_record import mark_paged

BLOCK = 256
LEAST_8BIT_ELEMENTS = 4096
LEAST_PAGED_ELEMENTS = 100_000
"""bitsandbytes keeps the states of smaller tensors on the device (``get_state_buffer``)."""


class AdamW8bit(torch.optim.Optimizer):
    """The states of bitsandbytes' AdamW in 8 or 32 ``bits``, ``paged`` to host memory or not; Lion has one moment."""

    def __init__(self, params: Iterable[nn.Parameter], *, bits: int = 8, paged: bool = False, moments: int = 2) -> None:
        if bits not in (8, 32) or moments not in (1, 2):
            expected = "bits are 8 or 32, and moments 1 or 2"
            raise InvalidSettingError(setting="bits, moments", value=f"{bits}, {moments}", expected=expected)
        super().__init__(list(params), {})
        self._bits, self._paged, self._moments = bits, paged, moments
        self._tables: list[torch.Tensor] = []

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # noqa: ARG002
        """Makes the states of parameters that have a gradient and no states yet."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and not self.state[parameter]:
                    self.state[parameter] = self._states(parameter)

    def _states(self, parameter: torch.Tensor) -> dict[str, Any]:
        elements = parameter.numel()
        small = self._bits == 32 or elements < LEAST_8BIT_ELEMENTS
        states: dict[str, Any] = {}
        for moment in range(self._moments):
            state = torch.zeros_like(parameter, dtype=torch.float32 if small else torch.uint8)
            states[f"state{moment}"] = mark_paged(state) if self._paged and elements >= LEAST_PAGED_ELEMENTS else state
            if not small:
                states[f"absmax{moment}"] = torch.zeros(-(-elements // BLOCK), dtype=torch.float32)
        if not small:
            self._tables = self._tables or [torch.zeros(256) for _ in range(self._moments)]
            states["tables"] = self._tables
        return states


def adamw_8bit(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Stands for ``bitsandbytes.optim.AdamW8bit``."""
    return AdamW8bit(parameters)


def paged_adamw_8bit(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Stands for ``bitsandbytes.optim.PagedAdamW8bit``: its states count as host memory."""
    return AdamW8bit(parameters, paged=True)


def paged_adamw_32bit(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Stands for ``bitsandbytes.optim.PagedAdamW32bit``: its states count as host memory."""
    return AdamW8bit(parameters, bits=32, paged=True)
