"""Whether the ranks of a run can talk to each other, and shard a model with its states on the host."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Mapping, Sequence

from trainwarden.capability.accelerator import without_gpu
from trainwarden.capability.children import Errand
from trainwarden.capability.collective import Place
from trainwarden.capability.machine import Machine
from trainwarden.capability.verdict import Status, Verdict, supported, unsupported

OFFLOAD_BYTES_PER_PARAMETER = 16
"""On the host with CPU offload: float32 weight, gradient and two AdamW states."""
TASKS = ("collective", "sharded")

_trials = itertools.count()


def launched_ranks(environ: Mapping[str, str]) -> tuple[int, int, int] | None:
    """(rank, world size, ranks on this machine) where a launcher such as torchrun has started this process.

    A launcher that does not say how many ranks share this machine is taken to have put all of them here.
    """
    said = [environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "MASTER_PORT")]
    if not all(text.isdecimal() for text in said) or not environ.get("MASTER_ADDR"):
        return None
    rank, world_size = int(said[0]), int(said[1])
    local = environ.get("LOCAL_WORLD_SIZE", "")
    return rank, world_size, int(local) if local.isdecimal() and int(local) > 0 else world_size


def places(
    machine: Machine, folder: str, *, ranks_here: int, deadline_s: float, backend: str, enough_host_memory: bool = True
) -> list[Place]:
    """Where each rank that this process answers for stands in the trial.

    Under a launcher that is this process's own rank: the others do the same at the same time. Otherwise
    ``ranks_here`` ranks on this machine, one a GPU, meeting in a file in ``folder``.
    """
    environ = machine.environ
    launched = launched_ranks(environ)
    trial = next(_trials)  # the same on every rank, for all of them try in the same order
    if launched is None:
        meeting = f"file:{folder}/store"
        return [
            Place(rank, ranks_here, rank, backend, meeting, False, str(trial), enough_host_memory, deadline_s)
            for rank in range(ranks_here)
        ]
    rank, world_size, _ = launched
    local = environ.get("LOCAL_RANK", "")
    return [
        Place(
            rank=rank,
            world_size=world_size,
            local_rank=int(local) if local.isdecimal() else 0,
            backend=backend,
            meeting=f"tcp:{environ['MASTER_ADDR']}:{environ['MASTER_PORT']}",
            hosted=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" or machine.in_process_group(),
            name=f"{environ.get('TORCHELASTIC_RESTART_COUNT', '0')}-{trial}",
            enough_host_memory=enough_host_memory,
            deadline_s=deadline_s,
        )
    ]


def try_ranks(
    machine: Machine, *, ranks_here: int, deadline_s: float, backend: str = "nccl", enough_host_memory: bool = True
) -> dict[str, Verdict]:
    """Verdicts on ``nccl`` and ``fsdp`` at the true world size; the worst of the ranks speaks for all."""
    impossible = without_gpu(machine)
    if impossible is not None and backend == "nccl":
        return {"nccl": impossible, "fsdp": impossible}
    with tempfile.TemporaryDirectory(prefix="warden-meeting-", ignore_cleanup_errors=True) as folder:
        ranks = places(
            machine,
            folder,
            ranks_here=ranks_here,
            deadline_s=deadline_s / 2,  # so that a rank which waits in vain can still say so itself
            backend=backend,
            enough_host_memory=enough_host_memory,
        )
        reports = machine.run([Errand(TASKS, place.to_environ()) for place in ranks], deadline_s=deadline_s)
    collective, sharded = (worst([report.verdicts[task] for report in reports]) for task in TASKS)
    return {"nccl": collective, "fsdp": sharded if collective.supported else collective}


def worst(verdicts: Sequence[Verdict]) -> Verdict:
    """The least good of them; unsupported counts before unknown, for the others then only waited in vain."""
    order = (Status.UNSUPPORTED, Status.UNKNOWN, Status.DEGRADED, Status.SUPPORTED)
    return min(verdicts, key=lambda verdict: order.index(verdict.status))


def offload(fsdp: Verdict, available_bytes: int) -> Verdict:
    """FSDP with CPU offload, and how large a model the memory of this host can hold."""
    if not fsdp.supported:
        return fsdp
    billions = available_bytes / OFFLOAD_BYTES_PER_PARAMETER / 1e9
    reason = (
        f"{fsdp.reason}; {available_bytes / 2**30:.1f} GiB of host memory hold about {billions:.1f} billion "
        f"parameters at {OFFLOAD_BYTES_PER_PARAMETER} bytes each"
    )
    return supported(reason, **{**fsdp.evidence, "host_available_bytes": available_bytes})


def host_bytes_needed(parameters: int, environ: Mapping[str, str]) -> int:
    """Host memory that the ranks of this machine need together, in bytes."""
    _, world_size, ranks_here = launched_ranks(environ) or (0, 1, 1)
    share = min(1.0, ranks_here / max(1, world_size))
    return int(parameters * OFFLOAD_BYTES_PER_PARAMETER * share)


def short_of_memory(nccl: Verdict, needed_bytes: int | None, available_bytes: int) -> Verdict | None:
    """The common verdict of all ranks on their hosts' memory; None when every host has enough."""
    short = int(nccl.evidence.get("ranks_short_of_host_memory", 0))
    if short == 0:
        return None
    here = "" if needed_bytes is None else f"; here {needed_bytes} bytes are needed and {available_bytes} are free"
    reason = f"{short} of {nccl.evidence.get('world_size')} ranks have too little host memory{here}"
    return unsupported(reason, "add host memory or ranks, or use a smaller model or mode='lora'")
