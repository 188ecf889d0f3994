"""What is tried when memory runs out, in which order: release, shrink, the user's own remedies, give up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trainwarden.guards.oom import MemoryFailure, OOMPolicy

Remedy = Literal["enable_checkpointing", "offload_optimizer"]
AnyRemedy = Literal["release_cache", Remedy]
REMEDIES: tuple[Remedy, ...] = ("enable_checkpointing", "offload_optimizer")
"""What only the user's code can do; first what costs less: a second forward pass, then transfers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trouble:
    """One failure: ``rows`` did not fit. ``remedies`` are those of the user's that have not been applied yet."""

    rows: int
    memory: MemoryFailure
    shrinks_this_step: int = 0
    released: bool = False
    """Whether the cache was returned for this batch already."""
    remedies: tuple[Remedy, ...] = ()


@dataclass(frozen=True, slots=True)
class Rung:
    """What to do, and why. ``remedy`` names the user's remedy, for that action alone."""

    action: Literal["release", "shrink", "remedy", "give_up"]
    reason: str
    remedy: Remedy | None = None


def next_rung(policy: OOMPolicy, trouble: Trouble) -> Rung:
    """The cheapest remedy that may help."""
    if not policy.enabled:
        return Rung("give_up", "recovery is switched off (oom_recovery=False)")
    if not trouble.released and release_may_help(trouble.memory):
        return Rung("release", "what was free and what the allocator held unused would have been enough")
    if policy.may_shrink(trouble.rows, trouble.shrinks_this_step):
        return Rung("shrink", f"{trouble.rows} rows do not fit")
    why = "one row does not fit" if trouble.rows <= 1 else "max_shrinks is used up"
    if trouble.remedies:
        return Rung("remedy", why, trouble.remedies[0])
    return Rung("give_up", why)


def release_may_help(memory: MemoryFailure) -> bool:
    """Whether memory was there but in pieces: free plus reserved but unused was at least what was requested."""
    if memory.requested_bytes is None or memory.free_bytes is None or memory.unused_bytes is None:
        return False
    return memory.free_bytes + memory.unused_bytes >= memory.requested_bytes
