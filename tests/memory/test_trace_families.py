"""Families of transformers' models are traced forward and backward; what cannot be traced says why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from trainwarden.memory.trace import CannotTraceError, TrainingLoop, trace

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' and peft's own, about models that are only traced

W, V, N, H = 32, 128, 2, 4
DECODER = {"vocab_size": V, "hidden_size": W, "intermediate_size": 2 * W, "num_hidden_layers": N}
DECODER |= {"num_attention_heads": H, "num_key_value_heads": 2, "pad_token_id": 0}
PLAIN = {key: value for key, value in DECODER.items() if key != "num_key_value_heads"}
IDS = torch.ones(2, 16, dtype=torch.long)
TEXT = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS}
PIXELS = {"pixel_values": torch.zeros(2, 3, 32, 32), "labels": torch.zeros(2, dtype=torch.long)}
SEQ2SEQ = {"vocab_size": V, "d_model": W, "decoder_start_token_id": 0}
BART = SEQ2SEQ | {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in (("layers", N), ("ffn_dim", W))}
BART |= {"encoder_attention_heads": H, "decoder_attention_heads": H, "max_position_embeddings": 64}

FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, torch.Tensor]]] = {
    "llama": ("CausalLM", DECODER, TEXT),
    "qwen2": ("CausalLM", DECODER, TEXT),
    "qwen3": ("CausalLM", DECODER | {"head_dim": 8}, TEXT),
    "mistral": ("CausalLM", DECODER, TEXT),
    "gemma": ("CausalLM", DECODER | {"head_dim": 8}, TEXT),
    "gemma2": ("CausalLM", DECODER | {"head_dim": 8}, TEXT),
    "phi": ("CausalLM", DECODER, TEXT),
    "phi3": ("CausalLM", DECODER, TEXT),
    "gpt2": ("CausalLM", {"vocab_size": V, "n_embd": W, "n_layer": N, "n_head": H}, TEXT),
    "gpt_neox": ("CausalLM", PLAIN, TEXT),
    "opt": ("CausalLM", PLAIN | {"ffn_dim": W, "word_embed_proj_dim": W, "max_position_embeddings": 64}, TEXT),
    "bloom": ("CausalLM", {"vocab_size": V, "hidden_size": W, "n_layer": N, "n_head": H}, TEXT),
    "falcon": ("CausalLM", PLAIN, TEXT),
    "mixtral": ("CausalLM", DECODER | {"num_local_experts": 4}, TEXT),
    "mamba": ("CausalLM", {"vocab_size": V, "hidden_size": W, "num_hidden_layers": N, "state_size": 4}, TEXT),
    "t5": ("Seq2SeqLM", SEQ2SEQ | {"d_kv": 8, "d_ff": W, "num_layers": N, "num_heads": H}, TEXT),
    "bart": ("Seq2SeqLM", BART, TEXT),
    "bert": ("MaskedLM", PLAIN | {"max_position_embeddings": 64}, TEXT),
    "vit": ("ImageClassification", PLAIN | {"image_size": 32, "patch_size": 8}, PIXELS),
}


def builder(family: str, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Callable[[], nn.Module]:
    head, settings, _ = FAMILIES[family]

    def build() -> nn.Module:
        import transformers

        config = transformers.AutoConfig.for_model(family, **(settings | changes))
        model: nn.Module = getattr(transformers, f"AutoModelFor{head}").from_config(config, dtype=dtype)
        return model.train()

    return build


def batch_of(family: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in FAMILIES[family][2].items()}


RARER = ("gemma", "phi3", "bloom", "mamba", "bart", "vit")
"""Traced with the long tests."""


@pytest.mark.parametrize("family", [pytest.param(f, marks=[pytest.mark.torture] * (f in RARER)) for f in FAMILIES])
def test_a_family_is_traced(family: str) -> None:
    found = trace(builder(family), batch_of(family), TrainingLoop())
    with torch.device("meta"):
        weights = {id(p): p.numel() * 2 for p in builder(family)().parameters()}
    assert sum(weights.values()) <= found.breakdown["weights"] < 2 * sum(weights.values()) + 2**19
    assert found.phases["backward"] > found.phases["load"]
    assert found.phases["optimizer"] >= 4 * sum(weights.values())
    assert not found.notes


@pytest.mark.parametrize("family", ["llama", "bart"])
def test_masks_that_mask_nothing_are_left_out_and_others_are_not(family: str) -> None:
    padded = dict(batch_of(family), attention_mask=torch.cat([IDS[:1], IDS[1:] * 0]))
    whole, masked = (trace(builder(family), batch, TrainingLoop()).peak_bytes for batch in (batch_of(family), padded))
    assert masked >= whole


def test_a_mask_without_values_is_counted_and_that_is_said() -> None:
    batch = {name: tensor.to("meta") for name, tensor in batch_of("llama").items()}
    found = trace(builder("llama"), batch, TrainingLoop())
    assert found.notes == ("attention masks are counted whole, as the batch has no values to judge them by",)


@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
def test_experts_are_traced_or_it_is_said_why_not(experts: str) -> None:
    def build() -> nn.Module:
        model: Any = builder("mixtral")()
        model.set_experts_implementation(experts)
        return model

    if experts == "grouped_mm":
        assert trace(build, TEXT, TrainingLoop()).peak_bytes > 0
    else:
        with pytest.raises(CannotTraceError, match="a tensor's shape depends on values"):
            trace(build, TEXT, TrainingLoop())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("mode", ["lora", "qlora"])
def test_real_adapters_are_traced(mode: str, checkpointing: bool) -> None:
    from peft import LoraConfig, get_peft_model

    from trainwarden.memory.trace_packed import pack_linears

    def build() -> nn.Module:
        model: Any = builder("qwen2", hidden_size=128, intermediate_size=256)()
        if mode == "qlora":
            pack_linears(model)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).train()

    found = trace(build, TEXT, TrainingLoop(), device_type="cpu")
    with torch.device("meta"):
        model = build()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert 0 < trained < 0.1 * sum(p.numel() for p in model.parameters()) * (4 if mode == "qlora" else 1)
    assert found.phases["optimizer"] < found.phases["load"] + 6 * 4 * trained


def test_reentrant_checkpointing_needs_what_the_other_kind_needs() -> None:
    def peak(use_reentrant: bool) -> int:
        def build() -> nn.Module:
            model: Any = builder("llama", num_hidden_layers=4)()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
            return model

        return trace(build, TEXT, TrainingLoop(), device_type="cpu").peak_bytes

    assert peak(True) == pytest.approx(peak(False), rel=0.05)
