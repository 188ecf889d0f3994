"""The closed form: as close to the trace as it states, and sane wherever nobody has traced."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainwarden.memory import arithmetic
from trainwarden.memory.architecture import DecoderArchitecture, UnknownArchitectureError, architecture_of
from trainwarden.memory.plan import MODES, OPTIMIZERS, TrainingPlan
from trainwarden.memory.prediction import Prediction
from trainwarden.train.forecast import Forecast
from trainwarden.train.subject import complete, plan_for, subject_of

GIB = 2**30
LLAMA_8B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
QWEN_HALF: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
SMALL: dict[str, Any] = {**LLAMA_8B, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 32000}

PLANS = st.builds(
    TrainingPlan,
    mode=st.sampled_from(MODES),
    micro_batch_size=st.integers(1, 32),
    sequence_length=st.sampled_from([16, 512, 4096]),
    grad_accum_steps=st.integers(1, 4),
    optimizer=st.sampled_from(OPTIMIZERS),
    weights=st.sampled_from(["float32", "bfloat16"]),
    autocast=st.sampled_from([None, "bfloat16"]),
    checkpointing=st.booleans(),
    loss_chunk_tokens=st.sampled_from([None, 64, 1024]),
    offload=st.booleans(),
    lora_rank=st.sampled_from([4, 64]),
)


def traced(config: dict[str, Any], plan: TrainingPlan) -> tuple[Prediction, DecoderArchitecture]:
    subject = subject_of("model", complete("model", config), plan)
    prediction = Forecast(subject).predict(plan)
    assert prediction.source == "traced", prediction.notes
    assert subject.architecture is not None
    return prediction, subject.architecture


@pytest.mark.parametrize(
    "plan",
    [
        plan_for("full", "bfloat16", sequence_length=512, checkpointing=True, grad_accum_steps=2),
        plan_for("lora", "bfloat16", sequence_length=512),
        plan_for("qlora", "bfloat16", sequence_length=512, checkpointing=True),
        replace(plan_for("full", "float32", sequence_length=512), optimizer="adamw_foreach"),
    ],
    ids=lambda plan: f"{plan.mode}-{plan.weights}-{plan.optimizer}-{'ckpt' if plan.checkpointing else 'dense'}",
)
def test_it_is_as_close_to_the_trace_as_it_states(plan: TrainingPlan) -> None:
    prediction, architecture = traced(SMALL, plan)
    closed = arithmetic.predict(architecture, plan)
    assert abs(closed.peak_bytes / prediction.peak_bytes - 1) <= closed.error
    assert arithmetic.disagreement(prediction, architecture, plan) is None


def test_a_trace_that_differs_by_more_than_the_stated_error_is_reported() -> None:
    plan = TrainingPlan(checkpointing=True)
    architecture = architecture_of(LLAMA_8B)
    closed = arithmetic.predict(architecture, plan)
    other = arithmetic.predict(replace(architecture, vocab=2 * architecture.vocab), plan)
    said = arithmetic.disagreement(other, architecture, plan)
    assert said is not None
    assert f"{closed.peak_bytes / GIB:.2f} GiB" in said
    assert "3%" in said


@settings(deadline=None, max_examples=150, print_blob=True)
@given(plan=PLANS, layers=st.integers(2, 80), tied=st.booleans(), experts=st.sampled_from([1, 8]))
def test_more_of_anything_never_needs_less(plan: TrainingPlan, layers: int, tied: bool, experts: int) -> None:
    architecture = replace(architecture_of(LLAMA_8B), layers=layers, tied=tied, experts=experts)
    peak = arithmetic.predict(architecture, plan).peak_bytes
    assert peak > 0
    assert (
        arithmetic.predict(architecture, replace(plan, micro_batch_size=plan.micro_batch_size + 1)).peak_bytes >= peak
    )
    assert arithmetic.predict(architecture, replace(plan, sequence_length=plan.sequence_length + 64)).peak_bytes >= peak
    assert arithmetic.predict(replace(architecture, layers=layers + 1), plan).peak_bytes >= peak
    assert arithmetic.predict(replace(architecture, vocab=architecture.vocab + 64), plan).peak_bytes >= peak


@settings(deadline=None, max_examples=100, print_blob=True)
@given(plan=PLANS)
def test_the_savers_save(plan: TrainingPlan) -> None:
    architecture = architecture_of(LLAMA_8B)
    peak = arithmetic.predict(architecture, plan).peak_bytes
    whole = arithmetic.predict(architecture, replace(plan, loss_chunk_tokens=None)).peak_bytes
    # Where the head is trained, the gradients of its chunks are summed beside it.
    assert peak <= whole + 3 * architecture.vocab * architecture.hidden * plan.weight_bytes * (plan.mode == "full")
    if plan.optimizer == "adamw_foreach":
        assert arithmetic.predict(architecture, replace(plan, optimizer="adamw_fused")).peak_bytes <= peak
    if plan.mode == "lora" and plan.weights == "bfloat16" and not plan.offload:
        assert arithmetic.predict(architecture, replace(plan, mode="qlora")).peak_bytes < peak


def test_offloading_moves_the_bytes_to_the_host() -> None:
    architecture = architecture_of(LLAMA_8B)
    plan = plan_for("full", "bfloat16", checkpointing=True)
    resident, offloaded = (arithmetic.predict(architecture, replace(plan, offload=on)) for on in (False, True))
    assert resident.host_bytes == 0
    assert offloaded.host_bytes == 16 * architecture.parameters
    assert offloaded.peak_bytes < resident.peak_bytes / 5


def test_paged_states_are_on_the_host() -> None:
    architecture = architecture_of(LLAMA_8B)
    paged = arithmetic.predict(architecture, TrainingPlan(mode="full", optimizer="paged_adamw_8bit"))
    assert paged.breakdown["optimizer_states"] == 0
    assert paged.host_bytes == pytest.approx(2 * architecture.parameters, rel=0.02)


@pytest.mark.parametrize(
    ("config", "billions"),
    [
        (LLAMA_8B, 8.030),
        (QWEN_HALF, 0.494),
        (
            {
                "model_type": "gpt2",
                "n_embd": 768,
                "n_layer": 12,
                "n_head": 12,
                "vocab_size": 50257,
                "n_positions": 1024,
            },
            0.124,
        ),
        (
            {
                **LLAMA_8B,
                "model_type": "mixtral",
                "vocab_size": 32000,
                "num_local_experts": 8,
                "num_experts_per_tok": 2,
            },
            46.70,
        ),
    ],
    ids=["llama-8b", "qwen-0.5b", "gpt2", "mixtral-8x7b"],
)
def test_it_counts_the_parameters_of_published_models(config: dict[str, Any], billions: float) -> None:
    assert architecture_of(config).parameters / 1e9 == pytest.approx(billions, rel=0.005)


@pytest.mark.parametrize("kind", ["bert", "mamba", "t5"])
def test_it_says_which_models_it_does_not_know(kind: str) -> None:
    with pytest.raises(UnknownArchitectureError, match=kind):
        architecture_of({**LLAMA_8B, "model_type": kind})


def test_it_says_which_number_is_missing() -> None:
    with pytest.raises(UnknownArchitectureError, match="vocab_size"):
        architecture_of({key: value for key, value in LLAMA_8B.items() if key != "vocab_size"})


def test_a_model_that_sees_is_known_by_its_language_part() -> None:
    seeing = {"model_type": "llava", "text_config": LLAMA_8B, "vision_config": {"hidden_size": 1024}}
    assert architecture_of(seeing) == architecture_of(LLAMA_8B)
