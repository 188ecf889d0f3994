"""The chunked loss is the plain loss: the same mean, the same gradients, without all logits at once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from tests.train import offload_ranks
from tests.train.test_recovery import faulty
from tests.train.tiny import GPT2, LLAMA, distance, instructions, model_weights, settings
from trainwarden.errors import InvalidSettingError
from trainwarden.testing import MemoryCeiling
from trainwarden.train import Trainer
from trainwarden.train.chunked_loss import chunked_loss, output_layer, require_chunkable
from trainwarden.train.models import LoraSettings, add_lora

ROWS = instructions(24)
TIED: Mapping[str, Any] = {**LLAMA, "tie_word_embeddings": True}
CAPPED: Mapping[str, Any] = {
    **LLAMA,
    "model_type": "gemma2",
    "head_dim": 16,
    "final_logit_softcapping": 30.0,
}
SCALED: Mapping[str, Any] = {**LLAMA, "model_type": "granite", "logits_scaling": 8.0}
EXPERTS: Mapping[str, Any] = {**LLAMA, "model_type": "mixtral", "output_router_logits": True}
CPU = torch.device("cpu")


def model_of(config: Mapping[str, Any], *, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(3)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=dtype).train()


def batch_of(rows: int = 2, tokens: int = 13, *, prompt: int = 3, padding: int = 2) -> dict[str, Tensor]:
    ids = torch.randint(0, 300, (rows, tokens), generator=torch.Generator().manual_seed(rows * tokens))
    mask, labels = torch.ones_like(ids), ids.clone()
    labels[0, :prompt] = -100
    if padding:
        mask[-1, -padding:] = 0
        labels[-1, -padding:] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model: Any, batch: dict[str, Tensor], chunk_tokens: int, *, within: float) -> None:
    plain = model(**batch, use_cache=False).loss
    expected = gradients(model, plain)
    chunked = chunked_loss(model, batch, chunk_tokens=chunk_tokens)
    assert (chunked.shape, chunked.dtype) == (torch.Size([]), torch.float32)
    assert float(chunked.detach()) == pytest.approx(float(plain.detach()), rel=within)
    assert distance(gradients(model, chunked), expected) < within


# -- the same loss -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [LLAMA, TIED, GPT2], ids=["llama", "tied", "gpt2"])
def test_loss_and_gradients_are_those_of_the_plain_loss(config: Mapping[str, Any]) -> None:
    config = {**config, **({"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if config is GPT2 else {})}
    assert_same(model_of(config), batch_of(), 7, within=2e-6)


@examples(deadline=None, max_examples=15, print_blob=True)
@given(
    rows=st.integers(1, 3),
    tokens=st.integers(7, 20),
    chunk_tokens=st.integers(1, 70),
    prompt=st.integers(0, 3),
    padding=st.integers(0, 2),
)
def test_whatever_the_chunks_and_the_targets(
    rows: int, tokens: int, chunk_tokens: int, prompt: int, padding: int
) -> None:
    assert_same(model_of(LLAMA), batch_of(rows, tokens, prompt=prompt, padding=padding), chunk_tokens, within=5e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_get_the_same_gradients(checkpointing: bool) -> None:
    model = model_of(LLAMA)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    adapted = add_lora(model, LoraSettings(4, 8.0, 0.0, "all-linear"), base=None).train()
    nn.init.normal_(next(p for n, p in adapted.named_parameters() if "lora_B" in n))
    assert_same(adapted, batch_of(), 5, within=5e-6)


def test_an_output_layer_that_is_adapted_itself_keeps_its_adapter() -> None:
    adapted = add_lora(model_of(LLAMA), LoraSettings(4, 8.0, 0.0, ["q_proj", "lm_head"]), base=None).train()
    nn.init.normal_(next(p for n, p in adapted.named_parameters() if "lm_head" in n and "lora_B" in n))
    assert_same(adapted, batch_of(), 5, within=5e-6)
    assert any("lm_head" in name for name, p in adapted.named_parameters() if p.grad is not None)


def test_in_the_smaller_type_it_differs_by_its_rounding() -> None:
    model, batch = model_of(LLAMA), batch_of()
    with torch.autocast("cpu", torch.bfloat16):
        plain = model(**batch, use_cache=False).loss
        chunked = chunked_loss(model, batch, chunk_tokens=5)
    assert float(chunked.detach()) == pytest.approx(float(plain.detach()), rel=2e-3)
    assert distance(gradients(model, chunked), gradients(model, plain)) < 1e-2


def test_without_targets_it_is_no_number_as_the_plain_loss_is() -> None:
    batch = batch_of()
    batch["labels"][:] = -100
    model = model_of(LLAMA)
    assert torch.isnan(model(**batch, use_cache=False).loss)
    assert torch.isnan(chunked_loss(model, batch, chunk_tokens=5))


def test_an_evaluation_keeps_nothing_for_a_backward_pass() -> None:
    model = model_of(LLAMA)
    with torch.no_grad():
        loss = chunked_loss(model, batch_of(), chunk_tokens=5)
    assert not loss.requires_grad


# -- what it is for ----------------------------------------------------------------------------------------------


class Widest(TorchDispatchMode):
    """The most rows of logits, 300 wide, that one tensor has."""

    rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.ndim and out.shape[-1] == 300 and out.shape != (32, 300):
            self.rows = max(self.rows, out.numel() // 300)
        return out


def test_no_more_logits_than_a_chunk_has_are_ever_there() -> None:
    model, batch = model_of(LLAMA), batch_of(3, 16)
    with Widest() as plain:
        model(**batch, use_cache=False).loss.backward()
    with Widest() as chunked:
        chunked_loss(model, batch, chunk_tokens=6).backward()  # type: ignore[no-untyped-call]
    assert (plain.rows, chunked.rows) == (48, 6)


def test_the_output_layer_is_itself_again_whatever_happens() -> None:
    model = model_of(LLAMA)
    before = model.lm_head.forward
    with pytest.raises(ValueError, match="shorter"):
        chunked_loss(model, {**batch_of(), "labels": torch.zeros(1, 5, dtype=torch.int64)}, chunk_tokens=5)
    assert model.lm_head.forward == before
    assert "forward" not in vars(model.lm_head)
    model.lm_head.forward = before  # as accelerate's hooks leave it
    chunked_loss(model, batch_of(), chunk_tokens=5)
    assert vars(model.lm_head)["forward"] == before


# -- models whose loss is another --------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [LLAMA, TIED, GPT2], ids=["llama", "tied", "gpt2"])
def test_a_plain_output_layer_is_accepted_and_nothing_is_changed(config: Mapping[str, Any]) -> None:
    model = model_of(config)
    state = torch.get_rng_state()
    require_chunkable(model, CPU)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("config", "said"),
    [(CAPPED, "Gemma2ForCausalLM changes its logits"), (SCALED, "Granite"), (EXPERTS, "a loss of its experts")],
    ids=["capped", "scaled", "experts"],
)
def test_a_model_that_does_more_to_its_logits_is_refused(config: Mapping[str, Any], said: str) -> None:
    with pytest.raises(InvalidSettingError, match=said) as caught:
        require_chunkable(model_of(config), CPU)
    assert caught.value.details["setting"] == "loss_chunk_tokens"


def test_a_model_without_an_output_layer_is_refused() -> None:
    with pytest.raises(InvalidSettingError, match="names no output layer"):
        output_layer(nn.Linear(2, 2))


# -- in a trainer ------------------------------------------------------------------------------------------------


def train(model: Any, run_dir: Path, **changes: Any) -> Any:
    return Trainer(model, ROWS, output_dir=run_dir, **settings(**changes)).train()


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_a_trainer_trains_the_same_weights(tmp_path: Path, llama_dir: Path, mode: str) -> None:
    asked = {"mode": mode, "grad_accum_steps": 2, "batch_size": 4, "eval_rows": 4, "learning_rate": 1e-3}
    plain = train(llama_dir, tmp_path / "plain", **asked)
    chunked = train(llama_dir, tmp_path / "chunked", loss_chunk_tokens=7, **asked)
    assert distance(model_weights(tmp_path / "chunked"), model_weights(tmp_path / "plain")) < 1e-5
    assert chunked.final_loss == pytest.approx(plain.final_loss, rel=1e-5)
    assert chunked.eval_loss == pytest.approx(plain.eval_loss, rel=1e-5)


def test_a_batch_that_fits_no_longer_is_trained_in_parts_with_the_same_result(tmp_path: Path, llama_dir: Path) -> None:
    asked = {"max_steps": 4, "learning_rate": 1e-3}
    train(llama_dir, tmp_path / "plain", **asked)
    ceiling = MemoryCeiling(3, from_step=2, phase="backward")
    trainer = faulty(llama_dir, tmp_path / "chunked", rows=ROWS, wrap=ceiling, loss_chunk_tokens=7, **asked)
    ceiling._steps_completed = lambda: trainer.steps
    assert trainer.train().shrinks >= 1
    assert ceiling.struck >= 1
    assert distance(model_weights(tmp_path / "chunked"), model_weights(tmp_path / "plain")) < 1e-5


def test_a_trainer_refuses_such_a_model_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettingError, match="changes its logits"):
        train({**CAPPED, "vocab_size": 300}, tmp_path, loss_chunk_tokens=7)


def test_weights_that_lie_on_the_host_are_gathered_for_it(tmp_path: Path) -> None:
    asked = {"max_steps": 2, "batch_size": 4, "full_ft_offload": True, "learning_rate": 1e-3}
    with offload_ranks.gate_open():
        train(LLAMA, tmp_path / "plain", **asked)
        train(LLAMA, tmp_path / "chunked", loss_chunk_tokens=7, **asked)
    assert distance(model_weights(tmp_path / "chunked"), model_weights(tmp_path / "plain")) < 1e-5
