"""Held-out losses: of the rows that a training held out, and nothing is changed by computing them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.train.tiny import instructions, write_jsonl
from trainwarden import slao
from trainwarden.errors import DatasetNotFoundError, GPUMemoryError, ModelLoadError, TrainingError
from trainwarden.slao import campaign_evaluation
from trainwarden.slao.campaign_config import CampaignTask
from trainwarden.slao.campaign_evaluation import held_out_losses
from trainwarden.testing import out_of_memory_error
from trainwarden.train.run import run_from_config

from .campaigns import TWO, loaded

pytestmark = pytest.mark.usefixtures("campaign")


def say(text: str) -> None:
    raise AssertionError(text)


def tasks(*overrides: str) -> tuple[CampaignTask, ...]:
    return loaded(TWO, "trainer.max_steps=1", *overrides).tasks


def untrained() -> dict[str, torch.Tensor]:
    """An adapter that leaves the base model as it is."""
    run_from_config(tasks()[0].config, observers=())
    tensors = slao.read_adapter("campaign/tasks/a/model").tensors
    return {key: torch.zeros_like(value) if "lora_B" in key else value for key, value in tensors.items()}


@pytest.mark.parametrize("held_out", [(), ("data.eval_rows=0", "tasks.a.data.eval=held.jsonl")], ids=["drawn", "file"])
def test_it_is_the_loss_that_the_training_itself_ends_with(held_out: tuple[str, ...]) -> None:
    write_jsonl(Path("held.jsonl"), instructions(5))
    [first, _] = tasks(*held_out)
    result = run_from_config(first.config, observers=())
    losses = held_out_losses([first], slao.read_adapter(result.model_path).tensors, say)
    assert losses["a"] == pytest.approx(result.eval_loss, rel=1e-5)


def test_every_task_with_held_out_rows_has_a_loss_and_no_other() -> None:
    adapter = untrained()
    assert set(held_out_losses(tasks(), adapter, say)) == {"a", "b"}
    assert set(held_out_losses(tasks("tasks.b.data.eval_rows=0"), adapter, say)) == {"a"}
    assert held_out_losses(tasks("data.eval_rows=0"), adapter, say) == {}


def test_random_numbers_go_on_as_if_nothing_had_been_evaluated() -> None:
    adapter = untrained()
    state = torch.get_rng_state()
    first = held_out_losses(tasks(), adapter, say)
    assert torch.equal(torch.get_rng_state(), state)
    assert held_out_losses(tasks(), adapter, say) == first


def test_rows_are_cut_as_in_training() -> None:
    adapter = untrained()
    write_jsonl(Path("held.jsonl"), [{"text": "red stone lamp " * 40}])

    def cut_at(max_length: int) -> dict[str, float]:
        where = ("data.eval_rows=0", "tasks.a.data.eval=held.jsonl", f"data.max_length={max_length}")
        return held_out_losses(tasks(*where), adapter, say)

    assert cut_at(1000) == cut_at(32), "the model has 32 positions"
    assert cut_at(10) != cut_at(32)


def test_memory_that_runs_out_once_is_met_with_smaller_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = untrained()
    expected = held_out_losses(tasks("data.eval_rows=4"), adapter, say)
    sizes = failing_above(2, monkeypatch)
    found = held_out_losses(tasks("data.eval_rows=4"), adapter, say)
    assert max(sizes) == 4
    assert min(sizes) == 2
    assert found == pytest.approx(expected, rel=1e-5)


def test_what_goes_wrong_is_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = untrained()
    with pytest.raises(DatasetNotFoundError):
        held_out_losses(tasks("tasks.b.data.train=nowhere.jsonl"), adapter, say)
    with pytest.raises(ModelLoadError):
        held_out_losses(tasks("model.name_or_path=./nowhere"), adapter, say)
    with monkeypatch.context() as patch:
        failing_above(0, patch)
        with pytest.raises(GPUMemoryError, match="evaluation"):
            held_out_losses(tasks(), adapter, say)
    monkeypatch.setattr(campaign_evaluation, "evaluation_batches", lambda *_, **__: 1 / 0)
    with pytest.raises(TrainingError, match="ZeroDivisionError"):
        held_out_losses(tasks(), adapter, say)


def failing_above(rows: int, patch: pytest.MonkeyPatch) -> list[int]:
    """A model that runs out of memory with more rows than these; returns the sizes of the batches that it meets."""
    sizes: list[int] = []
    real = campaign_evaluation.install

    def install(model: torch.nn.Module, adapter: dict[str, torch.Tensor]) -> None:
        def limited(_: torch.nn.Module, __: object, batch: dict[str, torch.Tensor]) -> None:
            sizes.append(len(batch["input_ids"]))
            if sizes[-1] > rows:
                raise out_of_memory_error()

        real(model, adapter)
        model.register_forward_pre_hook(limited, with_kwargs=True)

    patch.setattr(campaign_evaluation, "install", install)
    return sizes
