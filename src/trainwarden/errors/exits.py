"""The exit statuses a process of ours may end with: one meaning each, and whether to start it again.

Statuses follow from the error code, never from where an error was caught. 1 and 2 are left to the interpreter
and to argument parsers of others, 126 and above to the shell; 130 and 143 mean a forced second interrupt.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple

Restart = Literal["done", "continue", "again", "never"]
"""What a scheduler does next: nothing is left to do; start again and resume, not counted as a failure; start
again, counted (another node may help); or leave it to a person."""


class ExitMeaning(NamedTuple):
    """One row of the exit table."""

    meaning: str
    restart: Restart


EXIT_STATUSES: Mapping[int, ExitMeaning] = MappingProxyType(
    {
        0: ExitMeaning("success", "done"),
        64: ExitMeaning("usage", "never"),
        65: ExitMeaning("bad data", "never"),
        66: ExitMeaning("missing input", "never"),
        69: ExitMeaning("dependency or device unavailable", "again"),
        70: ExitMeaning("our bug, or an unforeseen failure of the training code", "never"),
        74: ExitMeaning("disk full, I/O, unreadable state", "never"),
        75: ExitMeaning("stopped cleanly or held up for now, resumable", "continue"),
        77: ExitMeaning("authentication", "never"),
        78: ExitMeaning("configuration or preflight refused", "never"),
        80: ExitMeaning("training unstable: NaN, divergence, collapse", "never"),
        81: ExitMeaning("GPU memory exhausted after recovery", "never"),
        82: ExitMeaning("GPU hardware or thermal abort", "again"),
        83: ExitMeaning("a gate failed", "never"),
        84: ExitMeaning("integrity mismatch", "never"),
        85: ExitMeaning("partial success", "never"),
        86: ExitMeaning("stalled", "again"),
        93: ExitMeaning("do not requeue: no progress over repeated attempts", "never"),
    }
)

FORCED_INTERRUPT_STATUSES: Mapping[int, str] = MappingProxyType(
    {130: "forced by a second SIGINT", 143: "forced by a second SIGTERM"}
)
