"""The evaluation of a trainer: a token mean over all rows, in any batch size, whatever fits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from trainwarden import Guard
from trainwarden.events import EvaluationShrunk
from trainwarden.runtime.split import shifted_target_tokens
from trainwarden.testing import out_of_memory_error
from trainwarden.train.encode import Encoded
from trainwarden.train.evaluate import evaluation_batches

ROWS = [Encoded.of(range(i, i + 2 + i % 4), range(i, i + 2 + i % 4)) for i in range(11)]
TARGETS = [label for row in ROWS for label in list(row.labels)[1:]]
EXPECTED = sum(TARGETS) / len(TARGETS)


def token_mean(batch: dict[str, Tensor]) -> Tensor:
    """The mean of the targets' own ids: exact, and different for each weighting."""
    targets = batch["labels"][:, 1:]
    return targets[targets != -100].double().mean()


@given(st.integers(1, 20))
def test_every_row_is_in_one_batch_in_order_and_padded_to_the_longest_of_it(batch_size: int) -> None:
    batches = list(evaluation_batches(ROWS, batch_size=batch_size, pad_token_id=7))
    assert all(len(batch["labels"]) == batch_size for batch in batches[:-1])
    found = [
        ids[mask.bool()].tolist()
        for batch in batches
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert found == [list(row.input_ids) for row in ROWS]
    assert all(batch["attention_mask"].sum(1).max() == batch["input_ids"].shape[1] for batch in batches)


def evaluate(run_dir: Path, loss_of: Callable[[Any], Tensor], batch_size: int) -> tuple[float, list[EvaluationShrunk]]:
    events: list[Any] = []
    model = nn.Linear(1, 1)
    guard = Guard(run_dir, observers=[events.append])
    with guard.watch(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1)):
        batches = evaluation_batches(ROWS, batch_size=batch_size, pad_token_id=0)
        value = guard.evaluate(loss_of, batches, weight=shifted_target_tokens)
    assert isinstance(value, float)
    return value, [event for event in events if isinstance(event, EvaluationShrunk)]


# Few cases, because garbage is collected before each new attempt.
@pytest.mark.parametrize(("batch_size", "fits"), [(11, 11), (1, 1), (11, 5), (8, 1), (20, 3)])
def test_neither_batch_size_nor_a_lack_of_memory_matters_while_one_row_fits(
    tmp_path: Path, batch_size: int, fits: int
) -> None:
    def limited(batch: dict[str, Tensor]) -> Tensor:
        if len(batch["labels"]) > fits:
            raise out_of_memory_error()
        return token_mean(batch)

    value, shrinks = evaluate(tmp_path, limited, batch_size)
    assert value == pytest.approx(EXPECTED, rel=1e-12)
    assert bool(shrinks) == (min(batch_size, len(ROWS)) > fits)
