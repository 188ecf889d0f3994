"""The shape of a decoder model, read from the configuration that lies beside its weights: no torch, no transformers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

_DEFAULT_INTERMEDIATE = 4
"""Times the hidden size, where a configuration leaves it open (GPT-2, Falcon, OPT's ``ffn_dim`` excepted)."""
_UNGATED = frozenset({"gpt2", "gpt_neox", "gptj", "opt", "falcon", "bloom", "phi", "starcoder2", "gpt_bigcode"})
_TIED_BY_DEFAULT = frozenset({"gpt2", "opt", "gemma", "gemma2", "gemma3", "gemma3_text", "bloom", "gpt_bigcode"})
_LEARNED_POSITIONS = frozenset({"gpt2", "opt", "gpt_bigcode"})
_NO_STACK = ("mamba", "mamba2", "rwkv", "recurrent_gemma", "jamba", "bamba", "zamba", "zamba2", "falcon_mamba")
_NO_DECODER = ("bert", "roberta", "vit", "t5", "whisper", "clip", "wav2vec2", "deberta", "bart")


class UnknownArchitectureError(Exception):
    """The closed form does not know this kind of model; ``reason`` says why, in one clause."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class DecoderArchitecture:
    """A uniform stack of decoder blocks between an embedding and a language-model head.

    Attributes:
        tied: the head uses the weights of the embedding.
        gated: the feed-forward part multiplies two projections (SwiGLU) before the third.
        positions: rows of a learned table of positions; 0 for rotary positions.
        experts: feed-forward parts a block has; ``active_experts`` of them see a token.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool = False
    gated: bool = True
    positions: int = 0
    experts: int = 1
    active_experts: int = 1
    linear_bias: bool = False

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def projections(self) -> tuple[tuple[int, int], ...]:
        """``(inputs, outputs)`` of each linear layer of one block."""
        h, i = self.hidden, self.intermediate
        attention = ((h, self.query_width), (h, self.kv_width), (h, self.kv_width), (self.query_width, h))
        feed_forward = ((h, i), (h, i), (i, h)) if self.gated else ((h, i), (i, h))
        return attention + feed_forward * self.experts

    @property
    def block_linear_parameters(self) -> int:
        biases = sum(outputs for _, outputs in self.projections) if self.linear_bias else 0
        return sum(inputs * outputs for inputs, outputs in self.projections) + biases

    @property
    def linear_parameters(self) -> int:
        """Of all blocks: what LoRA adapts and what 4-bit packing packs."""
        return self.layers * self.block_linear_parameters

    @property
    def embedding_parameters(self) -> int:
        """Of embedding, positions and head; a tied head counts once."""
        return self.hidden * (self.vocab * (1 if self.tied else 2) + self.positions)

    @property
    def parameters(self) -> int:
        norms = self.hidden * (2 * self.layers + 1) * (2 if self.linear_bias else 1)
        router = self.layers * self.hidden * self.experts if self.experts > 1 else 0
        return self.linear_parameters + self.embedding_parameters + norms + router

    def adapter_parameters(self, rank: int) -> int:
        """Of LoRA on every linear layer of the blocks."""
        return self.layers * rank * sum(inputs + outputs for inputs, outputs in self.projections)


def architecture_of(config: Mapping[str, Any]) -> DecoderArchitecture:
    """The shape that a Hugging Face configuration (``config.json``) describes.

    Raises UnknownArchitectureError for a model that is no uniform stack of decoder blocks with attention, and for a
    configuration that leaves a needed number open.
    """
    config = _language_part(config)
    kind = str(config.get("model_type", "unknown"))
    if kind in _NO_STACK or kind in _NO_DECODER or config.get("is_encoder_decoder"):
        what = "blocks other than attention" if kind in _NO_STACK else "more than a stack of decoder blocks"
        raise UnknownArchitectureError(f"models of type {kind} have {what}")
    hidden = _number(config, "hidden_size", "n_embd", "d_model")
    heads = _number(config, "num_attention_heads", "n_head")
    experts = _optional(config, "num_local_experts", "num_experts", "n_routed_experts") or 1
    intermediate = _optional(config, "intermediate_size", "n_inner", "ffn_dim") or _DEFAULT_INTERMEDIATE * hidden
    if experts > 1:
        intermediate = _optional(config, "moe_intermediate_size") or intermediate
    positions = _optional(config, "max_position_embeddings", "n_positions") or 0
    return DecoderArchitecture(
        layers=_number(config, "num_hidden_layers", "n_layer"),
        hidden=hidden,
        heads=heads,
        kv_heads=_kv_heads(config, heads),
        head_dim=_optional(config, "head_dim") or hidden // heads,
        intermediate=intermediate,
        vocab=_number(config, "vocab_size"),
        tied=bool(config.get("tie_word_embeddings", kind in _TIED_BY_DEFAULT)),
        gated=kind not in _UNGATED,
        positions=positions if kind in _LEARNED_POSITIONS else 0,
        experts=experts,
        active_experts=min(experts, _optional(config, "num_experts_per_tok", "num_experts_per_token") or 1),
        linear_bias=kind in _UNGATED and kind != "falcon",
    )


def _language_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Models that see or hear keep their decoder's numbers one level down."""
    text = config.get("text_config")
    if isinstance(text, Mapping) and "hidden_size" not in config:
        return {"model_type": config.get("model_type"), **text}
    return config


def _kv_heads(config: Mapping[str, Any], heads: int) -> int:
    if config.get("multi_query") and not config.get("new_decoder_architecture"):
        return 1
    return _optional(config, "num_key_value_heads", "num_kv_heads", "n_head_kv") or heads


def _number(config: Mapping[str, Any], *names: str) -> int:
    value = _optional(config, *names)
    if value is None:
        raise UnknownArchitectureError(f"the configuration of this {config.get('model_type')} model has no {names[0]}")
    return value


def _optional(config: Mapping[str, Any], *names: str) -> int | None:
    return next((value for value in _whole(config, names) if value > 0), None)


def _whole(config: Mapping[str, Any], names: Iterable[str]) -> Iterable[int]:
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            yield value
