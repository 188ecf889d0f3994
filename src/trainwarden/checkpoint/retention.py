"""Which checkpoints may go. A pure decision: it looks at names and asks whether a checkpoint verifies."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from .layout import Slot


def removable(
    slots: Iterable[Slot], *, newest: Slot, keep_last: int, is_verified: Callable[[Slot], bool]
) -> list[Slot]:
    """The slots to remove now that `newest` was written and verified, oldest first.

    Kept are `newest` and the newest verified checkpoint of each of the last `keep_last` steps that have one.
    A slot goes once a later one of the same step is kept, or once `keep_last` kept ones are all newer:
    damaged ones too. `is_verified` is asked from the newest down and only as far as needed, since it may
    have to read a checkpoint.
    """
    ordered = sorted({*slots, newest}, reverse=True)
    kept: list[Slot] = []
    for slot in ordered:
        if len(kept) == keep_last:
            break
        if all(slot.step != other.step for other in kept) and (slot == newest or is_verified(slot)):
            kept.append(slot)
    enough = len(kept) == keep_last
    kept_or_new = {*kept, newest}
    return [
        slot
        for slot in reversed(ordered)
        if slot not in kept_or_new
        and (
            any(slot.step == other.step and slot < other for other in kept_or_new)
            or (enough and slot < min(kept_or_new))
        )
    ]
