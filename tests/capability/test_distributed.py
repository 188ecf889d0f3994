"""Ranks that try each other out: real processes on the CPU, at the world size that the launcher or the GPUs give."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.waiting import LIMIT_S
from trainwarden.capability import Machine, Status, Verdict, child, collective, distributed, require_fsdp_offload
from trainwarden.capability.children import Errand, Report
from trainwarden.capability.collective import Place
from trainwarden.capability.verdict import degraded, supported, unknown, unsupported
from trainwarden.device import HostMemory
from trainwarden.errors import FSDPUnavailableError

from .scripted import GIB, ScriptedMachine

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node-0",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "TORCHELASTIC_RESTART_COUNT": "2",
}

places = st.builds(
    Place,
    rank=st.integers(0, 99),
    world_size=st.integers(1, 100),
    local_rank=st.integers(0, 7),
    backend=st.sampled_from(["nccl", "gloo"]),
    meeting=st.text(),
    hosted=st.booleans(),
    name=st.text(),
    enough_host_memory=st.booleans(),
    deadline_s=st.floats(0.1, 1e4),
)


@given(places)
def test_a_place_survives_the_way_through_the_environment(place: Place) -> None:
    assert Place.from_environ(place.to_environ()) == place


def test_without_a_launcher_there_is_one_rank_for_each_gpu() -> None:
    machine = ScriptedMachine()
    distributed.try_ranks(machine, ranks_here=4, deadline_s=60)
    found = [Place.from_environ(errand.environ) for errand in machine.errands]
    assert [(place.rank, place.local_rank, place.world_size) for place in found] == [(n, n, 4) for n in range(4)]
    assert len({place.meeting for place in found}) == 1


def test_under_a_launcher_a_process_tries_its_own_rank_at_the_true_world_size() -> None:
    machine = ScriptedMachine(environ=TORCHRUN)
    distributed.try_ranks(machine, ranks_here=1, deadline_s=60)
    [place] = [Place.from_environ(errand.environ) for errand in machine.errands]
    assert (place.rank, place.world_size, place.local_rank) == (3, 8, 1)
    assert (place.meeting, place.hosted) == ("tcp:node-0:29500", True)
    assert place.name.startswith("2-")


def test_every_trial_has_keys_of_its_own() -> None:
    machine = ScriptedMachine(environ=TORCHRUN)
    for _ in range(2):
        distributed.try_ranks(machine, ranks_here=1, deadline_s=60)
    first, second = (Place.from_environ(errand.environ).name for errand in machine.errands)
    assert first != second


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_a_launcher_that_leaves_something_out_is_none(name: str) -> None:
    environ = {key: value for key, value in TORCHRUN.items() if key != name}
    assert distributed.launched_ranks(environ) is None
    assert distributed.launched_ranks({**TORCHRUN, name: ""}) is None


def test_a_launcher_that_does_not_say_how_many_ranks_are_here_has_put_all_here() -> None:
    environ = {key: value for key, value in TORCHRUN.items() if key != "LOCAL_WORLD_SIZE"}
    assert distributed.launched_ranks(environ) == (3, 8, 8)


@pytest.mark.parametrize(("environ", "needed"), [({}, 160), (TORCHRUN, 40)])
def test_the_host_needs_memory_for_its_own_ranks_only(environ: dict[str, str], needed: int) -> None:
    assert distributed.host_bytes_needed(10, environ) == needed


def test_the_worst_of_the_ranks_speaks_for_all() -> None:
    ladder = [unsupported("a"), unknown("b"), degraded("c"), supported("d")]
    for least, better in pairwise(ladder):
        assert distributed.worst([better, least, better]) is least


def test_ranks_that_cannot_join_cannot_shard_for_the_same_reason() -> None:
    broken = {"collective": unsupported("no NCCL")}
    tried = distributed.try_ranks(ScriptedMachine(answers=broken), ranks_here=2, deadline_s=60)
    assert tried == {"nccl": broken["collective"], "fsdp": broken["collective"]}


def test_without_cuda_nothing_is_started() -> None:
    machine = ScriptedMachine(library_problem="libcuda.so.1: not found")
    tried = distributed.try_ranks(machine, ranks_here=2, deadline_s=60)
    assert {verdict.status for verdict in tried.values()} == {Status.UNSUPPORTED}
    assert not machine.errands


def test_a_rank_adds_up_and_trains_one_sharded_step(tmp_path: Path) -> None:
    place = Place(0, 1, 0, "gloo", f"file:{tmp_path}/store", enough_host_memory=False, deadline_s=LIMIT_S)
    joined = collective.all_reduce(place)
    assert joined.supported
    assert joined.reason == "an all-reduce over 1 rank (gloo) is right"
    assert joined.evidence["ranks_short_of_host_memory"] == 1
    assert collective.train_sharded(place).reason == "a sharded step with CPU offload over 1 rank (gloo) is right"
    assert not torch.distributed.is_initialized()


def test_a_rank_that_has_joined_nobody_does_not_shard(tmp_path: Path) -> None:
    place = Place(0, 1, 0, "gloo", f"file:{tmp_path}/store")
    assert collective.train_sharded(place).status is Status.UNSUPPORTED


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_a_rank_without_nccl_or_gpu_says_which_is_missing(tmp_path: Path) -> None:
    verdict = collective.all_reduce(Place(0, 1, 0, "nccl", f"file:{tmp_path}/store"))
    assert verdict.status is Status.UNSUPPORTED
    assert "NCCL" in verdict.reason or "CUDA" in verdict.reason


class Rank(ScriptedMachine):
    """One process of a launcher, whose trial really runs; how much memory its host has is scripted."""

    def __init__(self, rank: int, port: int, available_bytes: int) -> None:
        environ = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        memory = HostMemory(64 * GIB, available_bytes, GIB, "machine")
        super().__init__(environ={**environ, "MASTER_PORT": str(port)}, memory=memory)

    def run(self, errands: list[Errand], *, deadline_s: float) -> list[Report]:  # type: ignore[override]
        return Machine.run(self, errands, deadline_s=deadline_s)


def test_launched_ranks_meet_at_the_master_and_all_refuse_when_one_host_is_too_small(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(distributed, "_trials", iter([7, 7]))  # in truth each rank counts in its own process

    def ask(rank: int, available_bytes: int) -> Verdict | FSDPUnavailableError:
        try:
            machine = Rank(rank, port, available_bytes)
            return require_fsdp_offload(parameters=10**9, machine=machine, backend="gloo", deadline_s=LIMIT_S)
        except FSDPUnavailableError as error:
            return error

    with socket.socket() as reserved, ThreadPoolExecutor(2) as threads:
        # Bound, so that nobody else is given this port; not listening, so that the store of rank 0 still can.
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("127.0.0.1", 0))
        port = int(reserved.getsockname()[1])
        large, small = threads.map(ask, (0, 1), (60 * GIB, GIB))
    assert isinstance(large, FSDPUnavailableError)
    assert isinstance(small, FSDPUnavailableError)
    assert "1 of 2 ranks have too little host memory" in large.message
    assert small.details["needed_bytes"] == 8 * 10**9


def test_a_rank_that_never_comes_ends_the_trial_at_the_deadline(tmp_path: Path) -> None:
    place = Place(0, 2, 0, "gloo", f"file:{tmp_path}/store", deadline_s=0.5)
    verdict = child.attempt(lambda: collective.all_reduce(place))
    assert verdict.status is Status.UNSUPPORTED
    assert "trying it failed" in verdict.reason
    assert not torch.distributed.is_initialized()
