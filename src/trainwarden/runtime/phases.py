"""The phases of a run beside the training step's own: what is simply done once more after memory was released."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from trainwarden.checkpoint.rng import capture_rng, restore_rng
from trainwarden.runtime.clipping import Clipping, measured
from trainwarden.runtime.release import release_memory
from trainwarden.runtime.sharded import is_sharded
from trainwarden.runtime.shortage import Shortage, attempted, more_memory

CLIPPING = "gradient clipping"
CHECKPOINT = "checkpoint"
SWITCHED_OFF = "recovery is switched off (oom_recovery=False)"

T = TypeVar("T")


def attempt(
    phase: str, task: Callable[[], T], *, refusal: str | None, say: Callable[[str], None], draws: bool = True
) -> T:
    """What ``task()`` returns; when memory runs out it is run once more, after the first attempt's was released.

    ``refusal`` says why that must not be; ``draws=False`` that the task draws no random number, which need not be drawn
    again then.

    Raises:
        GPUMemoryError: memory ran out twice, or once with a ``refusal``.
    """
    state = capture_rng() if draws and refusal is None else {}
    result, shortage = attempted(phase, task)
    if shortage is not None:
        return once_more(phase, task, shortage, refusal=refusal, say=say, state=state)
    return result  # type: ignore[return-value]  # without a shortage it is what the task returned, None included


def once_more(
    phase: str,
    task: Callable[[], T],
    shortage: Shortage,
    *,
    refusal: str | None,
    say: Callable[[str], None],
    state: dict[str, Any] | None = None,
) -> T:
    """What ``task()`` returns, run after the first attempt's memory was released and the random ``state`` put back.

    Raises `GPUMemoryError` when memory runs out again, or at once with a ``refusal``.
    """
    if refusal is not None:
        raise shortage.error(refusal)
    release_memory()
    if state:
        restore_rng(state)
    say(f"out of memory in {phase}: {shortage.memory.text}; memory is released and it is tried once more")
    result, again = attempted(phase, task)
    if again is not None:
        raise again.error("again after memory was released", would_fit=more_memory(again))
    return result  # type: ignore[return-value]  # without a shortage it is what the task returned, None included


def clip_grad_norm(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    *,
    norm_type: float,
    error_if_nonfinite: bool,
    foreach: bool | None,
    recover: bool,
    say: Callable[[str], None],
    keep: Callable[[Clipping], None] = lambda _clipping: None,
) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_`, bit for bit, in pieces of which each changes everything of it or nothing.

    Computing the norm changes nothing. Scaling makes its factor first, once for each device and type of gradient, and
    then multiplies in place, which takes no memory: so those are scaled one kind after the other. ``keep`` is handed
    what was measured, for the check before the step.

    Raises `GPUMemoryError` and, with ``error_if_nonfinite``, `RuntimeError`.
    """
    given = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    chosen = [parameter for parameter in given if parameter.grad is not None]
    gradients = [parameter.grad for parameter in chosen if parameter.grad is not None]
    refusal = None if recover else SWITCHED_OFF
    if any(map(is_sharded, gradients)):
        refusal = "the norm of distributed gradients needs every rank at once"

    def norm() -> tuple[Tensor, Clipping | None]:
        return measured(gradients, norm_type, error_if_nonfinite, foreach)

    total, clipping = attempt(CLIPPING, norm, refusal=refusal, say=say, draws=False)
    for kind in _by_kind(chosen):

        def scale(kind: list[Tensor] = kind) -> None:
            torch.nn.utils.clip_grads_with_norm_(kind, max_norm, total, foreach)

        attempt(CLIPPING, scale, refusal=refusal, say=say, draws=False)
    if clipping is not None:
        clipping.seal()
        keep(clipping)
    return total


def _by_kind(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """A gradient that is conjugated or negated only when it is used takes memory to be scaled: a kind of its own."""
    kinds: dict[tuple[torch.device, torch.dtype, int], list[Tensor]] = {}
    for parameter in parameters:
        gradient = parameter.grad
        assert gradient is not None
        alone = id(gradient) if gradient.is_conj() or gradient.is_neg() else 0
        kinds.setdefault((gradient.device, gradient.dtype, alone), []).append(parameter)
    yield from kinds.values()
