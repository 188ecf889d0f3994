"""One rank's share of a sharded training, beside what FSDP2 really allocates on two ranks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.memory.networks import Stacked, ids, parameter_bytes
from trainwarden.memory.prediction import Prediction
from trainwarden.memory.trace import TrainingLoop, trace
from trainwarden.memory.trace_loop import run_steps
from trainwarden.memory.trace_shards import Sharding, peak_note

LOOP = TrainingLoop(make_optimizer=lambda p: torch.optim.AdamW(p, foreach=False))
WEIGHTS = parameter_bytes(Stacked(width=128, depth=4))
ROOT = sum(parameter_bytes(m) for m in (Stacked(width=128).embedding, Stacked(width=128).head))
BLOCK = (WEIGHTS - ROOT) // 4


@cache
def of_stack(**options: Any) -> Prediction:
    return trace(lambda: Stacked(width=128, depth=4), ids(), LOOP, device_type="cpu", **options)


def test_one_rank_without_offloading_is_the_whole_model() -> None:
    assert of_stack(shards=1) == of_stack()
    assert not Sharding(1).active


@pytest.mark.parametrize("shards", [2, 8])
def test_weights_gradients_and_states_are_divided(shards: int) -> None:
    whole, rank = of_stack(), of_stack(shards=shards)
    assert rank.phases["load"] == pytest.approx(whole.phases["load"] / shards, rel=0.02)
    assert rank.phases["optimizer"] == pytest.approx(whole.phases["optimizer"] / shards, rel=0.05)


def test_parameters_outside_the_blocks_and_three_blocks_are_whole_in_the_forward_pass() -> None:
    found = of_stack(shards=1000)
    assert found.phases["forward"] == pytest.approx(ROOT + 3 * BLOCK, rel=0.25)
    assert found.breakdown["weights"] > ROOT


def test_more_ranks_never_need_more() -> None:
    peaks = [of_stack(shards=n).peak_bytes for n in (2, 4, 16)]
    assert peaks == sorted(peaks, reverse=True)


def test_activations_are_not_divided() -> None:
    def peak(shards: int) -> int:
        return trace(
            lambda: Stacked(width=128, depth=4), ids(16, 128), LOOP, device_type="cpu", shards=shards
        ).breakdown["activations"]

    assert peak(2) == peak(8)


def test_offloading_moves_what_is_sharded_to_the_host() -> None:
    whole, offloaded = of_stack(), of_stack(cpu_offload=True)
    states = 2 * WEIGHTS
    assert offloaded.host_bytes == pytest.approx(2 * WEIGHTS + states, rel=0.01)
    assert offloaded.peak_bytes < 0.6 * whole.peak_bytes
    assert (offloaded.breakdown["optimizer_states"], whole.host_bytes) == (0, 0)
    assert of_stack(cpu_offload=True, shards=4).host_bytes == pytest.approx(offloaded.host_bytes / 4, rel=0.01)


def test_the_optimizer_of_an_offloaded_model_leaves_the_device_alone() -> None:
    assert of_stack(cpu_offload=True).phases["optimizer"] < 4096


def test_a_model_without_blocks_is_gathered_whole() -> None:
    def build() -> torch.nn.Module:
        return torch.nn.Linear(128, 128)

    found = trace(build, torch.zeros(1, 128), LOOP, device_type="cpu", shards=4)
    assert found.phases["forward"] > parameter_bytes(build())


def test_it_says_that_shards_were_reckoned() -> None:
    found = of_stack(shards=2, cpu_offload=True)
    assert peak_note(Sharding(2, True)) in found.notes
    assert found.error > of_stack().error


# -- beside the real thing --------------------------------------------------------------------------------------------

COUNTER = Path(__file__).parents[2] / "benchmarks" / "memory_prediction.c"
SHAPES = ((256, 6, 1000, 4, 64), (512, 4, 200, 1, 16), (256, 4, 4000, 4, 128))


@pytest.mark.torture
@pytest.mark.parametrize(("width", "depth", "vocab", "rows", "tokens"), SHAPES)
def test_two_ranks_really_allocate_what_was_predicted(
    tmp_path: Path, width: int, depth: int, vocab: int, rows: int, tokens: int
) -> None:
    compiler = shutil.which("cc")
    assert compiler is not None
    library = tmp_path / "counter.so"
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", library, COUNTER, "-ldl"], check=True)
    environment = os.environ | {"LD_PRELOAD": str(library), "RANKS": str(tmp_path / "ranks")}
    shape = json.dumps([width, depth, vocab, rows, tokens])
    command = [sys.executable, "-W", "ignore", "-m", "tests.memory.test_trace_shards", shape]
    ranks = [
        subprocess.Popen([*command, str(rank)], env=environment, stdout=subprocess.PIPE, text=True) for rank in (0, 1)
    ]
    output = [process.communicate()[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0]
    found = trace(
        lambda: Stacked(width=width, depth=depth, vocab=vocab), ids(rows, tokens), LOOP, device_type="cpu", shards=2
    )
    for line in output:
        assert found.peak_bytes == pytest.approx(int(line), rel=found.error)


def rank_main(shape: str, rank: int) -> None:
    """One of two ranks: trains for two steps, and prints the most that torch's allocator handed out."""
    import ctypes

    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    width, depth, vocab, rows, tokens = json.loads(shape)
    dist.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{os.environ['RANKS']}")
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    counter = ctypes.CDLL(None)
    counter.counter_live.restype = counter.counter_peak.restype = ctypes.c_size_t
    before = counter.counter_live()
    model = Stacked(width=width, depth=depth, vocab=vocab)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    batch = ids(rows, tokens)
    counter.counter_reset_peak()
    run_steps(model, batch, LOOP)
    print(counter.counter_peak() - before)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    rank_main(sys.argv[1], int(sys.argv[2]))
