"""The cheapest change that makes a run fit: tried in the order of what each costs the training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

from trainwarden.memory.plan import DtypeName, OptimizerName, TrainingPlan

Change = Callable[[TrainingPlan], TrainingPlan | None]
"""The plan with one change, or None where it has it already or it does not apply."""


LOSS_CHUNK_TOKENS = 1024
"""Of the chunked loss that is advised: its logits take 1.2 GB at 100,000 words, and its products are still large."""


@dataclass(frozen=True)
class Remedy:
    """One change. ``cost``: what it takes from the training; ``how``: its flags, with fields of the plan."""

    name: str
    cost: str
    how: str
    change: Change

    def flags(self, plan: TrainingPlan) -> str:
        """What a person adds to ``warden train CONFIG`` for this part of ``plan``."""
        return self.how.format(**asdict(plan))


@dataclass(frozen=True)
class Step:
    """A remedy tried: what it needs alone, and together with those before it."""

    remedy: Remedy
    alone_bytes: int
    together_bytes: int
    plan: TrainingPlan
    """With this remedy and those before it."""
    host_bytes: int = 0


@dataclass(frozen=True)
class Advice:
    """What was tried, and the fewest and cheapest changes that fit together; none when nothing does."""

    steps: tuple[Step, ...]
    changes: tuple[Remedy, ...]
    plan: TrainingPlan | None
    needed_bytes: int | None


def _fused(plan: TrainingPlan) -> TrainingPlan | None:
    return replace(plan, optimizer="adamw_fused") if plan.optimizer == "adamw_foreach" else None


def _checkpointed(plan: TrainingPlan) -> TrainingPlan | None:
    return None if plan.checkpointing else replace(plan, checkpointing=True)


def _chunked(plan: TrainingPlan) -> TrainingPlan | None:
    return None if plan.loss_chunk_tokens else replace(plan, loss_chunk_tokens=LOSS_CHUNK_TOKENS)


def _one_row(plan: TrainingPlan) -> TrainingPlan | None:
    if plan.micro_batch_size == 1 or plan.optimizer_in_backward:
        return None
    return replace(plan, micro_batch_size=1, grad_accum_steps=plan.global_batch_size)


def _eight_bit(plan: TrainingPlan) -> TrainingPlan | None:
    return replace(plan, optimizer="adamw_8bit") if plan.optimizer.startswith("adamw_f") and not plan.offload else None


def _lora(plan: TrainingPlan) -> TrainingPlan | None:
    if plan.mode != "full":
        return None
    base: DtypeName = plan.autocast or plan.weights
    return replace(plan, mode="lora", weights=base, optimizer_in_backward=False)


def _qlora(plan: TrainingPlan) -> TrainingPlan | None:
    if plan.mode == "qlora":
        return None
    base: DtypeName = "bfloat16" if (plan.autocast or plan.weights) == "float32" else plan.autocast or plan.weights
    return replace(plan, mode="qlora", weights=base, optimizer_in_backward=False, offload=False)


def _offload(plan: TrainingPlan) -> TrainingPlan | None:
    if plan.offload or plan.mode != "full":
        return None
    whole: OptimizerName = "adamw_fused" if plan.optimizer == "adamw_8bit" else plan.optimizer
    return replace(plan, offload=True, optimizer=whole)  # pieces of weights have no 8-bit states


REMEDIES: tuple[Remedy, ...] = (
    Remedy("fused optimizer", "nothing", "--optimizer adamw_fused", _fused),
    Remedy("gradient checkpointing", "a third more compute", "-o trainer.gradient_checkpointing=true", _checkpointed),
    Remedy("chunked cross entropy", "little", "-o trainer.loss_chunk_tokens={loss_chunk_tokens}", _chunked),
    Remedy(
        "smaller micro-batch, accumulated",
        "some speed",
        "-o trainer.batch_size={micro_batch_size} -o trainer.grad_accum_steps={grad_accum_steps}",
        _one_row,
    ),
    Remedy("8-bit optimizer states", "a little precision", "-o trainer.optimizer=adamw_8bit", _eight_bit),
    Remedy("LoRA", "trains adapters, not all weights", "-o model.mode=lora", _lora),
    Remedy("QLoRA", "frozen weights at 4 bits; slower", "-o model.mode=qlora", _qlora),
    Remedy("offload to host memory", "much slower; host memory", "-o trainer.full_ft_offload=true", _offload),
)
"""In the order of what they cost."""

UNPREDICTABLE_BYTES = 2**60
"""The need of a plan that nothing can predict: it fits nowhere, and is not advised."""

NeedBytes = Callable[[TrainingPlan], tuple[int, int]]
"""Device and host memory that a plan needs, overheads included."""


def advise(
    plan: TrainingPlan,
    need: NeedBytes,
    *,
    device_bytes: int,
    host_bytes: int | None = None,
    remedies: Sequence[Remedy] = REMEDIES,
) -> Advice:
    """Tries the remedies in order, each on top of the others, until the plan fits; then drops what it can do without.

    One that excludes an earlier one (offloading is of full fine-tuning) is tried on top of those before that.

    Args:
        need: what a plan needs on the device and on the host.
        host_bytes: available host memory; None leaves it unchecked.
    """

    def fits(candidate: TrainingPlan) -> bool:
        device, host = need(candidate)
        return device <= device_bytes and (host_bytes is None or host <= host_bytes)

    steps: list[Step] = []
    stages: list[tuple[TrainingPlan, list[Remedy]]] = [(plan, [])]
    found = False
    for remedy in remedies:
        alone = remedy.change(plan)
        stage = next((one for one in reversed(stages) if remedy.change(one[0]) is not None), None)
        if alone is None or stage is None or found:
            continue
        changed = remedy.change(stage[0]) or plan
        device, host = need(changed)
        if device >= UNPREDICTABLE_BYTES:
            continue
        stages.append((changed, [*stage[1], remedy]))
        steps.append(Step(remedy, need(alone)[0], device, changed, host))
        found = fits(changed)
    if not found:
        return Advice(tuple(steps), (), None, None)
    chosen = _fewest(plan, stages[-1][1], fits)
    final = _fewest_parts(_all_applied(chosen, plan), plan, fits)
    return Advice(tuple(steps), tuple(chosen), final, need(final)[0])


def _fewest(plan: TrainingPlan, applied: list[Remedy], fits: Callable[[TrainingPlan], bool]) -> list[Remedy]:
    """Without those that are not needed, the dearest dropped first; the last one is what made it fit."""
    chosen = list(applied)
    for remedy in reversed(applied[:-1]):
        fewer = [one for one in chosen if one is not remedy]
        if fits(_all_applied(fewer, plan)):
            chosen = fewer
    return chosen


def _fewest_parts(final: TrainingPlan, plan: TrainingPlan, fits: Callable[[TrainingPlan], bool]) -> TrainingPlan:
    """With the largest micro-batch below that of ``plan`` that divides the global batch, if it was made smaller."""
    if final.micro_batch_size == plan.micro_batch_size:
        return final
    whole = final.global_batch_size
    for rows in range(plan.micro_batch_size - 1, 1, -1):
        parts = replace(final, micro_batch_size=rows, grad_accum_steps=whole // rows)
        if whole % rows == 0 and fits(parts):
            return parts
    return final


def _all_applied(remedies: Sequence[Remedy], plan: TrainingPlan) -> TrainingPlan:
    for remedy in remedies:
        plan = remedy.change(plan) or plan
    return plan
