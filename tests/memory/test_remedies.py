"""The cheapest change that makes it fit, in the order of what each costs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainwarden.memory import arithmetic
from trainwarden.memory.architecture import architecture_of
from trainwarden.memory.plan import TrainingPlan
from trainwarden.memory.remedies import REMEDIES, UNPREDICTABLE_BYTES, Advice, advise

GIB = 2**30
MODEL = architecture_of(
    {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    }
)
FULL = TrainingPlan(mode="full", weights="float32", autocast="bfloat16", micro_batch_size=8, optimizer="adamw_foreach")
LORA = TrainingPlan(autocast="bfloat16", micro_batch_size=8)


def need(plan: TrainingPlan) -> tuple[int, int]:
    prediction = arithmetic.predict(MODEL, plan)
    return prediction.peak_bytes, prediction.host_bytes


def advice(plan: TrainingPlan, gib: float, **options: Any) -> Advice:
    return advise(plan, need, device_bytes=round(gib * GIB), **options)


def names(found: Advice) -> list[str]:
    return [change.name for change in found.changes]


def test_the_order_is_that_of_the_cost() -> None:
    assert [remedy.name for remedy in REMEDIES] == [
        "fused optimizer",
        "gradient checkpointing",
        "chunked cross entropy",
        "smaller micro-batch, accumulated",
        "8-bit optimizer states",
        "LoRA",
        "QLoRA",
        "offload to host memory",
    ]


def test_checkpointing_alone_is_advised_where_it_is_enough() -> None:
    found = advice(LORA, 48)
    assert names(found) == ["gradient checkpointing"]
    assert found.plan == replace(LORA, checkpointing=True)


def test_a_smaller_micro_batch_keeps_the_global_batch_and_is_as_large_as_fits() -> None:
    found = advice(replace(LORA, checkpointing=True, loss_chunk_tokens=1024), 18.2)
    assert names(found) == ["smaller micro-batch, accumulated"]
    assert found.plan is not None
    assert found.plan.global_batch_size == LORA.global_batch_size
    larger = replace(found.plan, micro_batch_size=2 * found.plan.micro_batch_size)
    assert need(found.plan)[0] <= 18.2 * GIB < need(larger)[0]


def test_changes_that_are_not_needed_are_dropped() -> None:
    found = advice(FULL, 40)
    assert names(found)[-1] == "LoRA"
    assert "fused optimizer" not in names(found)
    assert "8-bit optimizer states" not in names(found)
    assert found.needed_bytes is not None
    assert found.needed_bytes <= 40 * GIB


def test_when_nothing_helps_that_is_said() -> None:
    found = advice(FULL, 1)
    assert (found.changes, found.plan, found.needed_bytes) == ((), None, None)
    assert len(found.steps) >= 6


def test_offloading_is_no_way_out_where_the_host_has_no_room() -> None:
    fits = [remedy for remedy in REMEDIES if remedy.name == "offload to host memory"]
    plan = replace(FULL, micro_batch_size=1, checkpointing=True)
    assert names(advice(plan, 30, remedies=fits)) == ["offload to host memory"]
    assert names(advice(plan, 30, remedies=fits, host_bytes=64 * GIB)) == []


def test_offloading_is_of_full_fine_tuning_and_tried_beside_the_adapters() -> None:
    """Where not even QLoRA fits, on top of what was tried before LoRA; no `Trainer` offloads adapters."""
    found = advice(replace(FULL, micro_batch_size=1), 1)
    offload = found.steps[-1]
    assert offload.remedy.name == "offload to host memory"
    assert (offload.plan.mode, offload.plan.offload) == ("full", True)
    assert offload.plan.optimizer == "adamw_fused", "its pieces have no 8-bit states"
    assert not [step for step in advice(LORA, 1).steps if step.plan.offload]


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("gradient checkpointing", "-o trainer.gradient_checkpointing=true"),
        ("chunked cross entropy", "-o trainer.loss_chunk_tokens=1024"),
        ("smaller micro-batch, accumulated", "-o trainer.batch_size=1 -o trainer.grad_accum_steps=8"),
        ("8-bit optimizer states", "-o trainer.optimizer=adamw_8bit"),
        ("LoRA", "-o model.mode=lora"),
        ("QLoRA", "-o model.mode=qlora"),
        ("offload to host memory", "-o trainer.full_ft_offload=true"),
    ],
)
def test_each_names_the_settings_that_make_it(name: str, flags: str) -> None:
    (remedy,) = [one for one in REMEDIES if one.name == name]
    changed = remedy.change(FULL)
    assert changed is not None
    assert remedy.flags(changed) == flags


def test_each_step_says_what_it_needs_alone_and_with_those_before_it() -> None:
    first, *others = advice(FULL, 1).steps
    assert first.alone_bytes == first.together_bytes
    assert all(
        step.together_bytes < step.alone_bytes for step in others if step.remedy.name != "offload to host memory"
    )
    assert others[-1].together_bytes < first.together_bytes / 10


@settings(deadline=None, max_examples=60, print_blob=True)
@given(gib=st.floats(4, 300), rows=st.sampled_from([1, 3, 8]), full=st.booleans(), checkpointing=st.booleans())
def test_what_is_advised_fits_and_none_of_it_is_superfluous(
    gib: float, rows: int, full: bool, checkpointing: bool
) -> None:
    plan = replace(FULL if full else LORA, micro_batch_size=rows, checkpointing=checkpointing)
    found = advice(plan, gib)
    if need(plan)[0] <= gib * GIB or found.plan is None:
        return
    assert need(found.plan)[0] <= gib * GIB
    assert names(found) == [name for name in (r.name for r in REMEDIES) if name in names(found)]
    for left_out in found.changes[:-1]:
        fewer = plan
        for change in found.changes:
            fewer = fewer if change is left_out else change.change(fewer) or fewer
        assert need(fewer)[0] > gib * GIB, f"{left_out.name} was not needed"


@pytest.mark.parametrize("mode", ["lora", "qlora"])
def test_what_a_plan_has_already_is_not_advised(mode: Any) -> None:
    plan = replace(LORA, mode=mode, checkpointing=True, loss_chunk_tokens=1024, micro_batch_size=1)
    tried = {step.remedy.name for step in advice(plan, 0.5).steps}
    assert tried <= {"8-bit optimizer states", "QLoRA"}


def test_a_change_that_cannot_be_predicted_is_passed_over() -> None:
    def partly(plan: TrainingPlan) -> tuple[int, int]:
        return (UNPREDICTABLE_BYTES, 0) if plan.loss_chunk_tokens else need(plan)

    found = advise(LORA, partly, device_bytes=20 * GIB)
    assert "chunked cross entropy" not in [step.remedy.name for step in found.steps]
    assert names(found) == ["gradient checkpointing", "smaller micro-batch, accumulated"]
