"""How the ranks of a sharded run learn that one of them had to leave while they wait for it inside a collective.

The rank that leaves says so in the process group's store. A thread of every other rank looks there: if its own rank has
not ended by itself a while later, it aborts the process group, which ends an NCCL collective with an error; gloo's
cannot be ended, so then the process ends, with the typed error as its last words and that error's exit status.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from trainwarden.errors import RankLostError, WardenError, exit_status, failure_text

GRACE_S = 10.0
"""From the word that a rank has left until its peers are made to leave: a collective notices most ends by itself."""
POLL_S = 0.5

_watches = itertools.count()


class Lifeline:
    """Works between `start` and `close`.

    ``add_context(error)`` fills in what the run knows; ``leave(error)`` ends the process when nothing else does.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        *,
        add_context: Callable[[WardenError], object],
        grace_s: float | None = None,
        leave: Callable[[WardenError], None] | None = None,
    ) -> None:
        self._rank = rank
        self._world_size = world_size
        self._grace_s = GRACE_S if grace_s is None else grace_s
        self._add_context = add_context
        self._leave = leave or _leave_process
        self._store: Any = dist.distributed_c10d._get_default_store()
        self._key = f"warden/left/{next(_watches)}"  # ranks watch in the same order
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="warden-lifeline", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._closing.set()

    def tell(self, error: BaseException) -> None:
        """This rank leaves: its peers must not wait for it."""
        code = error.code if isinstance(error, WardenError) else type(error).__name__
        words = json.dumps({"rank": self._rank, "code": code})
        try:
            self._store.set(self._key, words)
        except RuntimeError:  # the store went with another rank: everybody is leaving already
            return

    def heard(self) -> str | None:
        """Which rank left and why, in words, if one has said so."""
        try:
            if not self._store.check([self._key]):
                return None
            left = json.loads(self._store.get(self._key))
        except RuntimeError:
            return None
        return f"rank {left['rank']} ended with {left['code']}"

    def _watch(self) -> None:
        while not self._closing.wait(POLL_S):
            heard = self.heard()
            if heard is None:
                continue
            if self._closing.wait(self._grace_s):
                return
            dist.group.WORLD.abort()  # type: ignore[union-attr]
            if not self._closing.wait(self._grace_s):
                error = RankLostError(rank=self._rank, world_size=self._world_size, problem=heard)
                self._add_context(error)
                self._leave(error)
            return


def _leave_process(error: WardenError) -> None:
    sys.stderr.write(failure_text(error) + "\n")
    sys.stderr.flush()
    os._exit(exit_status(error))
