"""The closed form: what a decoder model needs in training, in microseconds and without torch.

Used where tracing is impossible, to steer searches, and as a cross-check of the trace. The model follows what a block
of transformers' Llama keeps for the backward pass with flash-type attention; `ERRORS` states how far it was from the
trace. Conventions: N parameters, T tokens of a micro-batch, h hidden size, V vocabulary, L blocks, c bytes of an
activation, w bytes of a weight.
"""

from __future__ import annotations

from dataclasses import dataclass

from trainwarden.memory.architecture import DecoderArchitecture
from trainwarden.memory.plan import TrainingPlan
from trainwarden.memory.prediction import KINDS, Kind, Phase, Prediction

ADAPTER_BYTES = 4
"""peft keeps adapters in float32."""
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Four bits, a byte of scale for each block of 64 weights, and its own scale for each 256 of these (QLoRA,
arXiv 2305.14314, double quantisation)."""
STATE_8BIT_BYTES = 1 + 4 / 256
"""A byte and, for each block of 256, a float32 scale (arXiv 2110.02861)."""
OFFLOAD_UNSHARDED_BLOCKS = 3
"""Blocks that FSDP2 holds whole on the device: the one at work, the next, and the one just left."""

DENSE_ERROR = 0.05
CHECKPOINTED_ERROR = 0.03
EXPERTS_ERROR = 0.15
"""Relative errors that the closed form states; tests/memory/test_arithmetic.py holds it to them."""


@dataclass(frozen=True)
class _Resident:
    """Bytes that stay, by what they are."""

    weights: int
    gradients: int
    states: int
    host: int


def predict(architecture: DecoderArchitecture, plan: TrainingPlan) -> Prediction:
    """The peak of two training steps by the closed form; pure, in microseconds."""
    resident = _resident(architecture, plan)
    forward, backward, optimizer = _phases(architecture, plan, resident)
    load: dict[Kind, int] = {"weights": resident.weights}
    by_phase: dict[Phase, dict[Kind, int]] = {
        "load": load,
        "forward": forward,
        "backward": backward,
        "optimizer": optimizer,
    }
    phases: dict[Phase, int] = {phase: sum(kinds.values()) for phase, kinds in by_phase.items()}
    phase = max(phases, key=lambda name: phases[name])
    return Prediction(
        peak_bytes=phases[phase],
        phase=phase,
        operation=None,
        breakdown={kind: by_phase[phase].get(kind, 0) for kind in KINDS},
        phases=phases,
        host_bytes=resident.host,
        source="closed form",
        error=stated_error(architecture, plan),
        notes=_notes(architecture, plan),
    )


def stated_error(architecture: DecoderArchitecture, plan: TrainingPlan) -> float:
    """How far the closed form may be from the trace, relatively."""
    if architecture.experts > 1:
        return EXPERTS_ERROR
    return CHECKPOINTED_ERROR if plan.checkpointing else DENSE_ERROR


def disagreement(traced: Prediction, architecture: DecoderArchitecture, plan: TrainingPlan) -> str | None:
    """One sentence when the trace and the closed form differ by more than the latter's stated error, else None."""
    closed = predict(architecture, plan)
    difference = closed.peak_bytes / traced.peak_bytes - 1
    if abs(difference) <= closed.error:
        return None
    return (
        f"the closed form gives {closed.peak_bytes / 2**30:.2f} GiB, {difference:+.1%} from the trace, which is more "
        f"than its stated {closed.error:.0%}: the installed model code differs from what the closed form describes"
    )


def _notes(architecture: DecoderArchitecture, plan: TrainingPlan) -> tuple[str, ...]:
    notes = ["attention is assumed to keep no matrix of tokens by tokens (flash or memory-efficient)"]
    if architecture.experts > 1:
        notes.append("tokens are assumed to be spread evenly over the experts")
    if plan.offload:
        notes.append("FSDP is assumed to hold three blocks whole on the device")
    return tuple(notes)


# -- what stays -------------------------------------------------------------------------------------------------------


def _resident(architecture: DecoderArchitecture, plan: TrainingPlan) -> _Resident:
    if plan.mode == "full":
        return _resident_full(architecture, plan)
    adapters = architecture.adapter_parameters(plan.lora_rank)
    frozen = architecture.parameters - architecture.linear_parameters
    base = architecture.linear_parameters * (NF4_BYTES if plan.mode == "qlora" else plan.weight_bytes)
    states, host = _state_bytes(adapters, ADAPTER_BYTES, plan)
    weights = round(base) + frozen * plan.weight_bytes + adapters * ADAPTER_BYTES
    if plan.offload:
        unsharded = _unsharded(architecture) * plan.weight_bytes
        return _Resident(unsharded, adapters * ADAPTER_BYTES // architecture.layers, 0, weights + states)
    return _Resident(weights, adapters * ADAPTER_BYTES, states, host)


def _resident_full(architecture: DecoderArchitecture, plan: TrainingPlan) -> _Resident:
    count, width = architecture.parameters, plan.weight_bytes
    states, host = _state_bytes(count, width, plan)
    if plan.offload:
        unsharded = _unsharded(architecture) * plan.compute_bytes
        block = architecture.block_linear_parameters * plan.compute_bytes
        return _Resident(unsharded, block, 0, 2 * count * width + states + host)
    gradients = count * width
    if plan.optimizer_in_backward:
        gradients = max(architecture.vocab * architecture.hidden, architecture.block_linear_parameters // 3) * width
    return _Resident(count * width, gradients, states, host)


def _unsharded(architecture: DecoderArchitecture) -> int:
    return architecture.embedding_parameters + OFFLOAD_UNSHARDED_BLOCKS * architecture.block_linear_parameters


def _state_bytes(trained: int, width: int, plan: TrainingPlan) -> tuple[int, int]:
    """``(on the device, on the host)`` for the states of an optimizer over ``trained`` parameters."""
    if plan.optimizer == "sgd":
        return 0, 0
    if plan.optimizer == "adamw_8bit":
        return round(2 * STATE_8BIT_BYTES * trained), 0
    if plan.optimizer == "paged_adamw_8bit":
        return 0, round(2 * STATE_8BIT_BYTES * trained)
    return 2 * width * trained, 0


# -- what comes and goes ----------------------------------------------------------------------------------------------


def _phases(
    architecture: DecoderArchitecture, plan: TrainingPlan, resident: _Resident
) -> tuple[dict[Kind, int], dict[Kind, int], dict[Kind, int]]:
    always: dict[Kind, int] = {"weights": resident.weights, "optimizer_states": resident.states}
    # Gradients of the micro-batches before are still there when the next one runs forward.
    earlier = resident.gradients if plan.grad_accum_steps > 1 else 0
    saved = _saved_bytes(architecture, plan)
    casts = _cast_bytes(architecture, plan)
    forward: dict[Kind, int] = {
        **always,
        "gradients": earlier,
        "activations": saved,
        "temporaries": casts,
        "logits_and_loss": _logits_bytes(architecture, plan, forward=True),
    }
    loss: dict[Kind, int] = {
        **forward,
        "temporaries": 0 if plan.checkpointing else casts,
        "logits_and_loss": _logits_bytes(architecture, plan, forward=False),
    }
    embedding = _embedding_gradient_bytes(architecture, plan)
    has_one = architecture.tied or plan.grad_accum_steps > 1
    first_block: dict[Kind, int] = {
        **always,
        "gradients": resident.gradients - (0 if has_one else embedding),
        "activations": saved if plan.checkpointing else 0,
        "temporaries": _block_backward_bytes(architecture, plan),
    }
    last: dict[Kind, int] = {
        **always,
        "gradients": resident.gradients,
        "temporaries": embedding * _gradients_apart(architecture, plan),
    }
    backward = max(loss, first_block, last, key=lambda kinds: sum(kinds.values()))
    optimizer: dict[Kind, int] = {
        **always,
        "gradients": resident.gradients,
        "temporaries": _step_bytes(plan, resident),
    }
    return forward, backward, optimizer


def _saved_bytes(architecture: DecoderArchitecture, plan: TrainingPlan) -> int:
    """What the stack of blocks keeps for the backward pass."""
    stream = _stream_bytes(plan)
    if plan.checkpointing:
        return plan.tokens * architecture.hidden * stream * architecture.layers
    return plan.tokens * _block_bytes(architecture, plan) * architecture.layers


def _stream_bytes(plan: TrainingPlan) -> int:
    """Of the residual stream, which has the type of the embedding."""
    return plan.weight_bytes


def _block_bytes(architecture: DecoderArchitecture, plan: TrainingPlan) -> int:
    """For each token, what one block keeps for its backward pass."""
    return _norm_bytes(architecture, plan) + _attention_bytes(architecture, plan) + _mlp_bytes(architecture, plan)


def _norm_bytes(architecture: DecoderArchitecture, plan: TrainingPlan) -> int:
    h, stream, trained = architecture.hidden, _stream_bytes(plan), plan.mode == "full"
    normalised = 4 * h + (stream * h if trained else 0)
    return 2 * normalised


def _attention_bytes(architecture: DecoderArchitecture, plan: TrainingPlan) -> int:
    c = plan.compute_bytes
    kept = 2 * architecture.query_width + 2 * architecture.kv_width
    inputs = _inputs_bytes(architecture.hidden, 3, plan) + _inputs_bytes(architecture.query_width, 1, plan)
    return c * kept + 4 * architecture.heads + inputs


def _mlp_bytes(architecture: DecoderArchitecture, plan: TrainingPlan) -> int:
    c, i = plan.compute_bytes, architecture.intermediate * architecture.active_experts
    inner = 3 * c * i if architecture.gated else c * i
    readers = 2 if architecture.gated else 1
    return inner + _inputs_bytes(architecture.hidden, readers, plan) + _inputs_bytes(i, 1, plan)


def _inputs_bytes(width: int, readers: int, plan: TrainingPlan) -> int:
    """The input of ``readers`` linear layers, kept for the gradients of their weights or adapters.

    peft casts the input to float32 for each adapter by itself, and autocast casts each of these copies back.
    """
    if plan.mode == "full" or plan.weights == "float32":
        return plan.compute_bytes * width
    return (plan.compute_bytes if plan.autocast else ADAPTER_BYTES) * width * readers


def _cast_bytes(architecture: DecoderArchitecture, plan: TrainingPlan) -> int:
    """Autocast keeps a copy of each trained weight in the smaller type until the forward pass is over."""
    if not _casts(plan) or plan.mode != "full" or plan.offload:
        return 0
    return (architecture.linear_parameters + architecture.vocab * architecture.hidden) * plan.compute_bytes


def _logits_bytes(architecture: DecoderArchitecture, plan: TrainingPlan, *, forward: bool) -> int:
    """Logits in the type of the computation, and float32 copies in the loss: 12 bytes for each token and word."""
    tokens = min(plan.tokens, plan.loss_chunk_tokens or plan.tokens)
    h, vocab = architecture.hidden, architecture.vocab
    tail = plan.tokens * h * (_stream_bytes(plan) + plan.compute_bytes) + plan.tokens * h // 2
    copies = 8 if plan.compute_bytes == 4 else 10
    summed = 0 if forward or tokens == plan.tokens else _chunks_gradient_bytes(architecture, plan, 12 * tokens * vocab)
    return tokens * vocab * (copies if forward else 12) + tail + summed


def _chunks_gradient_bytes(architecture: DecoderArchitecture, plan: TrainingPlan, logits_bytes: int) -> int:
    """Of the head, whose gradients each chunk makes anew, beside the logits of a chunk."""
    gradient = _embedding_gradient_bytes(architecture, plan)
    if _casts(plan):  # the sum and the copy of the weight, both in the smaller type
        return 2 * gradient * plan.compute_bytes // plan.weight_bytes
    return max(gradient, 3 * gradient - logits_bytes)


def _gradients_apart(architecture: DecoderArchitecture, plan: TrainingPlan) -> int:
    """Gradients of the embedding, which come last in a backward pass, that are there beside the one that stays.

    Where the weight has one from the micro-batches before, or is tied to the head, the new one is made apart. With tied
    weights the two are added before that: in place where autocast has made the head's anew, else into a third, as the
    head's is then a transposed view (measured with the allocator: benchmarks/memory_prediction.py).
    """
    earlier = 1 if plan.grad_accum_steps > 1 else 0
    if not architecture.tied:
        return earlier
    return earlier + (1 if _casts(plan) else 2)


def _casts(plan: TrainingPlan) -> bool:
    """Whether autocast computes in a type that the weights are not held in."""
    return plan.autocast is not None and plan.autocast != plan.weights


def _embedding_gradient_bytes(architecture: DecoderArchitecture, plan: TrainingPlan) -> int:
    """Of the embedding, or the head; nothing where it is frozen, or where gradients do not stay."""
    if plan.mode != "full" or plan.offload or plan.optimizer_in_backward:
        return 0
    return architecture.vocab * architecture.hidden * plan.weight_bytes


def _block_backward_bytes(architecture: DecoderArchitecture, plan: TrainingPlan) -> int:
    """While the first block is at work in the backward pass: what it keeps, and gradients of its widest parts."""
    widest = 3 * architecture.intermediate * architecture.active_experts + 2 * architecture.hidden
    return plan.tokens * (_block_bytes(architecture, plan) + plan.compute_bytes * widest)


def _step_bytes(plan: TrainingPlan, resident: _Resident) -> int:
    """A foreach step computes the update of all parameters before it adds any."""
    return resident.gradients if plan.optimizer == "adamw_foreach" else 0
