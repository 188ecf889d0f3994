"""How many parameters a card carries, by technique: the closed form, solved for the size of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trainwarden.memory.architecture import DecoderArchitecture
from trainwarden.memory.arithmetic import predict
from trainwarden.memory.overheads import Overheads
from trainwarden.memory.plan import TrainingPlan

REFERENCE_VOCAB = 128_256
"""Of Llama 3; vocabularies of 2024 and later lie between 100,000 and 260,000."""
REFERENCE_ASPECT = 128
"""Hidden size over blocks: Llama and Qwen models from 3B to 14B lie between 90 and 140."""
REFERENCE_SEQUENCE = 2048
TIED_BELOW_BILLIONS = 4.0
"""Smaller models of the Llama 3 and Qwen families share embedding and head."""
_MOST_BILLIONS = 10_000.0


@dataclass(frozen=True)
class Technique:
    """A way to train, as a column of the table."""

    name: str
    about: str
    plan: TrainingPlan


def _full(**changes: object) -> TrainingPlan:
    usual = {"mode": "full", "checkpointing": True, "sequence_length": REFERENCE_SEQUENCE, "grad_accum_steps": 2}
    return TrainingPlan(**{**usual, **changes})  # type: ignore[arg-type]


TECHNIQUES: tuple[Technique, ...] = (
    Technique(
        "full fp32",
        "weights, gradients and AdamW states in float32, bfloat16 by autocast: what Trainer(mode='full') does",
        _full(weights="float32", autocast="bfloat16"),
    ),
    Technique("full bf16", "everything in bfloat16, fused AdamW", _full()),
    Technique("full 8-bit", "bfloat16 with 8-bit AdamW states", _full(optimizer="adamw_8bit")),
    Technique("full paged", "bfloat16, 8-bit states paged to host memory", _full(optimizer="paged_adamw_8bit")),
    Technique(
        "full in backward",
        "bfloat16, optimizer in the backward pass, states in host memory",
        _full(optimizer="paged_adamw_8bit", optimizer_in_backward=True, grad_accum_steps=1),
    ),
    Technique("LoRA", "bfloat16 base, rank 16 on all linear layers", _full(mode="lora")),
    Technique("QLoRA", "4-bit base (nf4), rank 16 on all linear layers", _full(mode="qlora")),
)
"""All with gradient checkpointing, one row of 2,048 tokens, and accumulation where the technique allows it."""


def reference_decoder(billions: float, *, vocab: int = REFERENCE_VOCAB) -> DecoderArchitecture:
    """A Llama-like model of about so many parameters: its hidden size and depth grow together.

    A block has ``(2 + 2/4 + 3 × 3.5) h²`` linear parameters with a quarter as many key and value heads and a
    feed-forward part 3.5 times as wide.
    """
    tied = billions < TIED_BELOW_BILLIONS
    low, high = 128.0, 131_072.0
    for _ in range(60):
        hidden = (low + high) / 2
        if _shape(hidden, vocab, tied).parameters < billions * 1e9:
            low = hidden
        else:
            high = hidden
    return _shape(high, vocab, tied)


def _shape(hidden: float, vocab: int, tied: bool) -> DecoderArchitecture:
    width = max(128, round(hidden / 64) * 64)
    heads = width // 64
    return DecoderArchitecture(
        layers=max(2, round(hidden / REFERENCE_ASPECT)),
        hidden=width,
        heads=heads,
        kv_heads=max(1, heads // 4),
        head_dim=64,
        intermediate=round(3.5 * width / 64) * 64,
        vocab=vocab,
        tied=tied,
    )


def ceiling_billions(technique: TrainingPlan, available_bytes: int, overheads: Overheads) -> float:
    """The largest reference model that this plan trains in ``available_bytes``, in billions of parameters.

    0.0 when none does. Rounded down to two figures, which is more than the reference shapes can promise.
    """
    budget = overheads.peak_budget_bytes(available_bytes)
    low, high = 0.0, _MOST_BILLIONS
    for _ in range(50):
        middle = (low + high) / 2 if low == 0.0 or high / low > 1.001 else low
        if middle == low:
            break
        if predict(reference_decoder(middle), technique).peak_bytes <= budget:
            low = middle
        else:
            high = middle
    return _rounded_down(low)


def _rounded_down(billions: float) -> float:
    if billions < 0.1:
        return 0.0
    step = 0.1 if billions < 10 else 1.0
    return round(int(billions / step + 1e-9) * step, 1)


def ceilings(available_bytes: int, overheads: Overheads, techniques: Sequence[Technique] = TECHNIQUES) -> list[float]:
    """One ceiling for each technique, in its order."""
    return [ceiling_billions(technique.plan, available_bytes, overheads) for technique in techniques]
