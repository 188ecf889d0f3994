"""What a prediction says: the peak on one device, when it is reached, by which operation, and what the bytes are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

Phase = Literal["load", "forward", "backward", "optimizer"]
"""``load`` ends when the weights are placed; ``optimizer`` is everything from the last gradient to the next forward."""
Kind = Literal["weights", "gradients", "optimizer_states", "activations", "logits_and_loss", "temporaries"]
"""``weights`` includes buffers, and ``activations`` the batch. ``logits_and_loss`` is what the forward and backward
pass hold outside the stack of blocks after it. ``temporaries`` live within one operation or one phase only."""
Source = Literal["traced", "closed form"]

PHASES: tuple[Phase, ...] = get_args(Phase)
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Memory that one process (rank) needs, in bytes.

    ``peak_bytes`` is what the allocator hands out at the worst moment of two training steps: neither the CUDA
    context nor the allocator's cache is in it. ``breakdown`` has every `Kind` and sums to ``peak_bytes``; ``phases``
    has every `Phase`, and its maximum is ``peak_bytes``. Raises ValueError when they contradict each other.
    """

    peak_bytes: int
    phase: Phase
    """Where the peak is."""
    operation: str | None
    """The operator that raised memory to the peak, such as ``aten.addmm.default in model.layers.3.mlp``."""
    breakdown: Mapping[Kind, int]
    phases: Mapping[Phase, int]
    host_bytes: int
    """Host memory of this process for what is kept off the device (offloading, paged optimizers)."""
    source: Source
    error: float
    """Relative error to be expected of this kind of prediction: 0.01 means ±1 %."""
    notes: tuple[str, ...] = ()
    """What was approximated, and why tracing was not possible where ``source`` is "closed form"."""

    def __post_init__(self) -> None:
        if set(self.breakdown) != set(KINDS) or set(self.phases) != set(PHASES):
            raise ValueError("a prediction states every kind of memory and every phase")
        if sum(self.breakdown.values()) != self.peak_bytes:
            raise ValueError(f"the breakdown sums to {sum(self.breakdown.values())}, not to {self.peak_bytes}")
        if self.phases[self.phase] != self.peak_bytes or max(self.phases.values()) != self.peak_bytes:
            raise ValueError(f"the peak of {self.peak_bytes} is not that of its phase, {self.phase}")
