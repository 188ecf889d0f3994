"""What counts as a rank that is gone, and what one process does where several would have to agree."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from trainwarden.errors import TrainingError
from trainwarden.runtime.ranks import Alone, Wish, current_ranks, is_rank_failure, leave_together
from trainwarden.testing import out_of_memory_error


@pytest.mark.parametrize(
    "error",
    [
        dist.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:94, remote process exited"),
        dist.DistNetworkError("The client socket has timed out after 60000ms"),
        RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:32152"),
        RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer"),
        RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation"),
        RuntimeError("Application timeout caused pair closure"),
    ],
)
def test_a_collective_that_fails_because_a_rank_is_gone_is_known(error: RuntimeError) -> None:
    assert is_rank_failure(error)


@pytest.mark.parametrize(
    "error",
    [
        out_of_memory_error(),
        RuntimeError("NCCL error: unhandled cuda error, Cuda failure 2 'out of memory'"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x3 and 2x2)"),
        ValueError("Connection closed by peer"),
        KeyboardInterrupt(),
    ],
)
def test_other_errors_are_not_taken_for_one(error: BaseException) -> None:
    assert not is_rank_failure(error)


def test_one_process_agrees_with_itself() -> None:
    ranks = current_ranks()
    assert isinstance(ranks, Alone)
    assert (ranks.rank, ranks.world_size) == (0, 1)
    assert ranks.vote(Wish.STOP | Wish.SAVE) == Wish.STOP | Wish.SAVE
    assert ranks.largest(3) == 3
    assert ranks.gather("x") == ["x"]
    assert ranks.lead(lambda: torch.tensor(1)) == 1
    error = TrainingError(problem="x")
    assert leave_together(ranks, error) is error
    assert leave_together(ranks, None) is None
