"""The evaluation loop by itself: a token mean in any batch size, that disturbs nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from trainwarden.errors import GPUMemoryError
from trainwarden.testing import out_of_memory_error
from trainwarden.train.encode import Encoded
from trainwarden.train.evaluate import mean_loss

ROWS = [Encoded.of(range(i, i + 2 + i % 4), range(i, i + 2 + i % 4)) for i in range(11)]


def token_mean(batch: dict[str, Tensor]) -> Tensor:
    """The mean of the targets' own ids: exact, and different for each weighting."""
    targets = batch["labels"][:, 1:]
    return targets[targets != -100].double().mean()


TARGETS = [label for row in ROWS for label in list(row.labels)[1:]]
EXPECTED = sum(TARGETS) / len(TARGETS)


def evaluate(loss_of: Any, batch_size: int, model: nn.Module | None = None, shrink: Any = None) -> float:
    model = model or nn.Linear(1, 1)
    return mean_loss(loss_of, model, ROWS, batch_size=batch_size, pad_token_id=0, shrink=shrink)


@given(st.integers(1, 20))
def test_the_batch_size_does_not_matter(batch_size: int) -> None:
    assert evaluate(token_mean, batch_size) == pytest.approx(EXPECTED, rel=1e-12)


# Few cases, because garbage is collected before each new attempt.
@pytest.mark.parametrize(("batch_size", "fits"), [(11, 11), (11, 5), (8, 1), (3, 2), (20, 3)])
def test_a_lack_of_memory_does_not_matter_while_one_row_fits(batch_size: int, fits: int) -> None:
    def limited(batch: dict[str, Tensor]) -> Tensor:
        if len(batch["labels"]) > fits:
            raise out_of_memory_error()
        return token_mean(batch)

    shrinks: list[tuple[int, int]] = []
    value = evaluate(limited, batch_size, shrink=lambda a, b: shrinks.append((a, b)))
    assert value == pytest.approx(EXPECTED, rel=1e-12)
    assert all(after == -(-before // 2) for before, after in shrinks)
    assert bool(shrinks) == (min(batch_size, len(ROWS)) > fits)


def test_one_row_that_does_not_fit_is_a_memory_error() -> None:
    def never(batch: dict[str, Tensor]) -> Tensor:
        raise out_of_memory_error()

    with pytest.raises(GPUMemoryError) as caught:
        evaluate(never, 4, shrink=lambda a, b: None)
    assert caught.value.details["phase"] == "evaluation"
    assert caught.value.details["micro_batch_size"] == 1


def test_without_recovery_the_first_lack_of_memory_is_the_last() -> None:
    calls: list[int] = []

    def never(batch: dict[str, Tensor]) -> Tensor:
        calls.append(1)
        raise out_of_memory_error()

    with pytest.raises(GPUMemoryError):
        evaluate(never, 4)
    assert len(calls) == 1


def test_another_error_goes_through() -> None:
    def broken(batch: dict[str, Tensor]) -> Tensor:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        evaluate(broken, 4)


@pytest.mark.parametrize("training", [True, False])
def test_mode_gradients_and_random_numbers_are_as_before(training: bool) -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.5)).train(training)

    def loss_of(batch: dict[str, Tensor]) -> Tensor:
        assert not model.training
        assert not torch.is_grad_enabled()
        return model(torch.ones(1, 1)).sum() * 0 + token_mean(batch)

    before = torch.get_rng_state()
    evaluate(loss_of, 4, model)
    assert model.training is training
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), before)


def test_the_mode_is_restored_after_an_error() -> None:
    model = nn.Linear(1, 1).train()

    def broken(batch: dict[str, Tensor]) -> Tensor:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        evaluate(broken, 4, model)
    assert model.training
