"""What lies in pieces on the ranks is saved whole, put back in pieces, and judged alike on all of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from tests.distributed.pool import RankPool
from tests.runtime import sharded_ranks
from trainwarden.runtime.sharded import group_of, is_sharded, local, summed, whole_model_state, whole_optimizer_state


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[RankPool]:
    pool = RankPool(2)
    yield pool
    pool.close()


def test_ordinary_tensors_are_left_as_they_are() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    weight = model.weight
    assert not is_sharded(weight)
    assert local(weight) is weight
    assert whole_model_state(model)["weight"].data_ptr() == weight.data_ptr()
    assert whole_model_state(model)._metadata == model.state_dict()._metadata  # type: ignore[attr-defined]
    assert whole_optimizer_state(optimizer) == optimizer.state_dict()
    assert group_of([weight]) is None
    assert summed(weight, None) is weight


@pytest.mark.parametrize("layout", ["rows", "fewer rows than ranks", "columns", "copies", "two dimensions"])
def test_a_tensor_is_whole_on_rank_0_only_and_goes_back_into_its_pieces(two_ranks: RankPool, layout: str) -> None:
    assert [answer[layout] for answer in two_ranks.run(sharded_ranks.layouts)] == [(True, True, True)] * 2


def test_the_state_of_a_sharded_model_is_that_of_a_plain_one(two_ranks: RankPool) -> None:
    for answer in two_ranks.run(sharded_ranks.state_travels):
        assert answer == {
            "pieces": 0,
            "none_elsewhere": True,
            "plain": True,
            "plain_moments": True,
            "again": True,
            "weights": True,
        }


def test_a_checkpoint_of_another_shape_is_refused(two_ranks: RankPool) -> None:
    for said in two_ranks.run(sharded_ranks.refuses_another_shape):
        assert "a tensor of shape (5, 3) where (4, 3) is expected" in said


@pytest.mark.parametrize("mode", ["host", "device"])
@pytest.mark.parametrize(("what", "found"), [("loss", (False, True, True)), ("gradient", (True, False, True))])
def test_what_is_not_finite_on_one_rank_is_skipped_on_all(
    two_ranks: RankPool, mode: str, what: str, found: tuple[bool, bool, bool]
) -> None:
    for bad_rank in (0, 1):
        answers = two_ranks.run(sharded_ranks.verdicts, bad_rank=bad_rank, mode=mode, what=what)
        assert answers == [found, found]


@pytest.mark.parametrize("mode", ["host", "device"])
def test_a_finite_step_is_taken_on_all(two_ranks: RankPool, mode: str) -> None:
    answers = two_ranks.run(sharded_ranks.verdicts, bad_rank=-1, mode=mode, what="")
    assert answers == [(True, True, False)] * 2


def test_a_sum_is_the_same_on_every_rank(two_ranks: RankPool) -> None:
    assert two_ranks.run(sharded_ranks.sums) == [3.0, 3.0]
