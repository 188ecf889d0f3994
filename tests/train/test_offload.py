"""Full fine-tuning with FSDP2 and CPU offload trains what plain full fine-tuning trains, in one process.

Rehearsed on the CPU over gloo, with the code that a GPU runs.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import nn

from tests.train import offload_ranks
from tests.train.test_recovery import faulty
from tests.train.tiny import (
    GPT2,
    LLAMA,
    checkpoint_parts,
    distance,
    identical,
    instructions,
    model_weights,
    settings,
)
from trainwarden.errors import (
    FSDPUnavailableError,
    InvalidSettingError,
    TrainingAbortedError,
)
from trainwarden.events import StepCompleted
from trainwarden.testing import MemoryCeiling, out_of_memory_error
from trainwarden.train import Trainer
from trainwarden.train.encode import IGNORED, Encoded
from trainwarden.train.offload import blocks, offloading
from trainwarden.train.precision import Precision
from trainwarden.train.rank_steps import RankStepCollator, rank_loader

ROWS = instructions(30)
TIED = {**LLAMA, "tie_word_embeddings": True}
DROPOUT = {**GPT2, "resid_pdrop": 0.2}
ASKED = {"max_steps": 10, "batch_size": 4, "grad_accum_steps": 2, "seed": 3}


@pytest.fixture(autouse=True)
def _gate(request: pytest.FixtureRequest) -> Iterator[None]:
    with nullcontext() if "real_gate" in request.node.name else offload_ranks.gate_open():
        yield


def train(model: Any, run_dir: Path, rows: Any = ROWS, *, offload: bool = True, **changes: Any) -> Any:
    return Trainer(model, rows, output_dir=run_dir, full_ft_offload=offload, **settings(**{**ASKED, **changes})).train()


def stop_after(step: int) -> list[Any]:
    def observe(event: Any) -> None:
        if isinstance(event, StepCompleted) and event.step == step:
            signal.raise_signal(signal.SIGTERM)

    return [observe]


# -- one rank --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "changes"),
    [(LLAMA, {}), (TIED, {"gradient_checkpointing": True}), (DROPOUT, {})],
    ids=["llama", "tied and checkpointed", "dropout"],
)
def test_one_rank_trains_the_same_weights_as_plain_full_fine_tuning(tmp_path: Path, config: Any, changes: Any) -> None:
    plain = train(config, tmp_path / "plain", offload=False, eval_rows=4, **changes)
    offloaded = train(config, tmp_path / "offloaded", eval_rows=4, **changes)
    assert distance(model_weights(tmp_path / "offloaded"), model_weights(tmp_path / "plain")) < 1e-6
    assert offloaded.tokens == plain.tokens
    assert offloaded.final_loss == pytest.approx(plain.final_loss, rel=1e-6)
    assert offloaded.eval_loss == pytest.approx(plain.eval_loss, rel=1e-6)


def test_it_computes_in_bfloat16_and_keeps_its_weights_in_float32(tmp_path: Path) -> None:
    seen: set[torch.dtype] = set()

    class Looking(Trainer):
        def compute_loss(self, model: Any, batch: Any) -> Any:
            output = model(**batch, use_cache=False)
            seen.add(output.logits.dtype)
            return output.loss

    asked = settings(**ASKED, dtype="bfloat16", full_ft_offload=True)
    Looking(LLAMA, ROWS, output_dir=tmp_path, **asked).train()
    assert seen == {torch.bfloat16}
    assert {tensor.dtype for tensor in model_weights(tmp_path).values()} == {torch.float32}
    moments = checkpoint_parts(tmp_path)["optimizer"]["state"][0]
    assert {moments["exp_avg"].dtype, moments["exp_avg_sq"].dtype} == {torch.float32}


def test_a_stopped_run_continues_bit_identically(tmp_path: Path) -> None:
    train(DROPOUT, tmp_path / "whole")
    with pytest.raises(TrainingAbortedError):
        train(DROPOUT, tmp_path / "stopped", observers=stop_after(4))
    train(DROPOUT, tmp_path / "stopped")
    assert identical(model_weights(tmp_path / "stopped"), model_weights(tmp_path / "whole"))


def test_its_checkpoints_and_those_of_plain_full_fine_tuning_are_the_same(tmp_path: Path) -> None:
    train(TIED, tmp_path / "whole")
    for name, offload in (("from offload", True), ("to offload", False)):
        with pytest.raises(TrainingAbortedError):
            train(TIED, tmp_path / name, offload=offload, observers=stop_after(4))
        train(TIED, tmp_path / name, offload=not offload)
        assert distance(model_weights(tmp_path / name), model_weights(tmp_path / "whole")) < 1e-6


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_a_batch_that_fits_no_longer_is_trained_in_parts(tmp_path: Path, phase: Any) -> None:
    """In an accumulation window: what earlier micro-batches have added to the gradients is kept."""
    train(LLAMA, tmp_path / "undisturbed")
    ceiling = MemoryCeiling(2, from_step=3, phase=phase, times=1)
    calls = iter(range(10**6))
    trainer = faulty(LLAMA, tmp_path / "squeezed", rows=ROWS, wrap=ceiling, full_ft_offload=True, **ASKED)
    ceiling._steps_completed = lambda: trainer.steps if next(calls) % 2 else 0  # strikes the second micro-batch
    assert trainer.train().steps_completed == 10
    assert ceiling.struck == 1
    assert distance(model_weights(tmp_path / "squeezed"), model_weights(tmp_path / "undisturbed")) < 1e-6


def test_gradients_of_a_block_that_failed_half_way_are_not_counted_twice(tmp_path: Path) -> None:
    """The backward pass ends inside a layer, when some weights of the gathered layer have their gradients already."""
    train(LLAMA, tmp_path / "undisturbed")
    struck: list[int] = []

    class Breaking(Trainer):
        def compute_loss(self, model: Any, batch: Any) -> Any:
            def strike(_gradient: Any) -> None:
                struck.append(1)
                raise out_of_memory_error()

            def watch(_module: Any, _inputs: Any, output: Any) -> None:
                if torch.is_grad_enabled() and len(struck) < 2:
                    output.register_hook(strike)

            with model.model.layers[0].mlp.up_proj.register_forward_hook(watch):
                return super().compute_loss(model, batch)

    asked = settings(**ASKED, full_ft_offload=True, max_shrinks=9)
    Breaking(LLAMA, ROWS, output_dir=tmp_path / "broken", **asked).train()
    assert len(struck) == 2
    assert distance(model_weights(tmp_path / "broken"), model_weights(tmp_path / "undisturbed")) < 1e-6


def test_the_published_model_loads_with_plain_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    train(TIED, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert identical(dict(model.state_dict()), checkpoint_parts(tmp_path)["model"])
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_training_leaves_no_process_group_behind(tmp_path: Path) -> None:
    train(LLAMA, tmp_path, max_steps=1)
    assert not dist.is_initialized()


def test_a_process_group_that_is_there_is_used_and_left(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        train(LLAMA, tmp_path / "run", max_steps=1)
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_the_real_gate_refuses_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(FSDPUnavailableError, match="NCCL|CUDA"):
        Trainer(
            tmp_path / "no such model",
            ROWS,
            mode="full",
            max_steps=1,
            output_dir=tmp_path / "run",
            full_ft_offload=True,
        )
    assert not (tmp_path / "run").exists()


def test_a_process_group_without_the_host_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    monkeypatch.setattr(dist, "get_backend_config", lambda *_: "cuda:nccl")
    try:
        with pytest.raises(FSDPUnavailableError, match="no backend for tensors on the host"):
            train(LLAMA, tmp_path / "run")
    finally:
        dist.destroy_process_group()


def test_float16_is_refused() -> None:
    halves = Precision(torch.float16, torch.float32, "as asked")
    with pytest.raises(InvalidSettingError, match="scales no loss"), offloading(torch.device("cpu"), halves, 0):
        pass


# -- what is gathered at a time --------------------------------------------------------------------------------------


def test_layers_are_gathered_one_at_a_time_and_ends_that_share_weights_with_the_rest(tokenizer: Any) -> None:
    from trainwarden.train.models import build_model

    model = build_model(LLAMA, tokenizer, dtype=torch.float32)
    assert blocks(model) == [*model.model.layers, model.model.embed_tokens, model.lm_head]
    tied = build_model(TIED, tokenizer, dtype=torch.float32)
    assert blocks(tied) == list(tied.model.layers)


def test_a_model_that_names_no_layers_is_cut_at_its_largest_list() -> None:
    model = nn.Module()
    model.heads = nn.ModuleList([nn.Linear(2, 2)])
    model.layers = nn.ModuleList([nn.Linear(8, 8), nn.Identity(), nn.Linear(8, 8)])
    assert blocks(model) == [model.layers[0], model.layers[2]]
    assert blocks(nn.Linear(2, 2)) == []


# -- who does what of a step -----------------------------------------------------------------------------------------


def encoded(index: int, length: int) -> Encoded:
    return Encoded.of([index, *range(1, length)], [IGNORED, IGNORED, *range(2, length)])


@given(rows=st.integers(1, 30), world_size=st.integers(1, 5), micro=st.integers(1, 4), lengths=st.integers(3, 7))
@examples(deadline=None, max_examples=60, print_blob=True)
def test_the_ranks_share_a_step_without_overlap(rows: int, world_size: int, micro: int, lengths: int) -> None:
    step = [encoded(index, 3 + (index * lengths) % 7) for index in range(rows)]
    parts = [
        RankStepCollator(rank=rank, world_size=world_size, micro_batch_size=micro, pad_token_id=0)(step)
        for rank in range(world_size)
    ]
    done = [
        int(row[0])
        for part in parts
        for batch, share in zip(part.batches, part.shares, strict=True)
        if share
        for row in batch["input_ids"]
    ]
    assert sorted(done) == list(range(rows))
    assert len({len(part.batches) for part in parts}) == 1
    assert sum(sum(part.shares) for part in parts) == pytest.approx(1.0)
    assert all(len(batch["labels"]) <= micro for part in parts for batch in part.batches)
    assert {part.tokens for part in parts} == {sum(len(row.input_ids) for row in step)}


def test_all_ranks_see_the_same_order_of_rows() -> None:
    from trainwarden.train.data import EncodedDataset

    dataset = EncodedDataset([encoded(index, 4) for index in range(11)])

    def order(rank: int) -> list[list[int]]:
        loader = rank_loader(
            dataset, rank=rank, world_size=2, micro_batch_size=2, grad_accum_steps=1, pad_token_id=0, seed=5
        )
        return [batch["input_ids"][:, 0].tolist() for step in loader for batch in step.batches]

    assert sorted(row for batch in order(0) + order(1) for row in batch) == list(range(11))
