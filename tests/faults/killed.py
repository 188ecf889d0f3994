"""Run by test_kill in a process of its own: ``killed.py RUN_DIR CALL`` trains and kills itself at that call.

A CALL of 0 never comes. Prints the number of calls that were made and the weights, as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from tests.runtime.loops import Loop, Rows

MAX_STEPS = 24


def main(run_dir: str, kill_at_call: int) -> None:
    loop = Loop(
        Path(run_dir),
        max_steps=MAX_STEPS,
        dropout=0.2,
        loader=DataLoader(Rows(40, noise=True), batch_size=8, shuffle=True),
        guard_options={"checkpoint_every_steps": 2},
    )
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        if event == "c_call":
            calls += 1
            if calls == kill_at_call:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(count)
    loop.run()
    sys.setprofile(None)
    print(json.dumps({"calls": calls, "weights": loop.weights().tolist()}), flush=True)
    os._exit(0)  # the run has ended; taking the interpreter apart takes as long as the run


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
