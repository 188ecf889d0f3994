"""Two ranks of a sharded run in processes of their own: one fails and stays alive, the other waits in a collective."""

from __future__ import annotations

import datetime
import sys
import time

import torch
import torch.distributed as dist

from tests.distributed.loops import Plan, Strike
from tests.distributed.sharded import train_sharded
from trainwarden.runtime import lifeline


def main(rank: int, store: str, run_dir: str) -> None:
    torch.set_num_threads(1)
    lifeline.GRACE_S = 1.0
    timeout = datetime.timedelta(seconds=600)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timeout)
    plan = Plan(run_dir, strikes=(Strike(1, step=3, phase="forward", layer=2),))
    try:
        train_sharded(rank, world_size=2, plan=plan)
    except Exception as error:  # noqa: BLE001 - said to the test, then the process lives on
        print(type(error).__name__, flush=True)
        time.sleep(600)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
