"""The merge itself: pure over state dicts, into a new state, checked before it is returned."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from trainwarden.errors import SLAOMergeDivergedError

from .adapter import refuse
from .arena import room_for
from .checks import accumulator_problems, fit_problems, layout_problems
from .factors import Kind, State, kind_of, short
from .gate import judge
from .norms import TensorNorms, as_details, norms_of, square_sum, what_is_not_finite
from .policy import MergePolicy
from .pruning import dare, ties


@dataclass(frozen=True)
class MergeResult:
    """A new accumulator.

    Attributes:
        tensors: float32, sharing no memory with the inputs; on the CPU they lie in one block, without overlap.
        index: how many adapters are in it.
        weight: λ of the newest; 1 for the first.
        norms: of each tensor, before, incoming and after.
    """

    tensors: dict[str, Tensor]
    index: int
    weight: float
    norms: tuple[TensorNorms, ...]


@torch.no_grad()
def begin(adapter: State, *, source: str = "adapter") -> MergeResult:
    """The accumulator that the first adapter makes: itself, in float32. Raises as `merge`."""
    refuse(source, layout_problems(adapter), 1)
    tensors = {key: room.copy_(adapter[key]) for key, room in room_for(adapter).items()}
    found = norms_of([square_sum(value) for value in tensors.values()], list(tensors.values()))
    norms = tuple(TensorNorms(key, norm, norm, norm) for key, norm in zip(tensors, found, strict=True))
    for norm in norms:
        if not math.isfinite(norm.incoming):
            raise _not_finite(1, norm, source, "the adapter holds", tensors[norm.key])
    return MergeResult(tensors, 1, 1.0, norms)


@torch.no_grad()
def merge(
    accumulator: State,
    adapter: State,
    index: int,
    policy: MergePolicy | None = None,
    *,
    dtypes: Mapping[str, torch.dtype] | None = None,
    source: str = "adapter",
) -> MergeResult:
    """Merge the ``index``-th adapter (from 2) into the accumulator of those before it.

    With λ = ``policy.weight(index)``: A ← A of the adapter, B ← B + λ (B of the adapter − B), DoRA's magnitude as
    A (Qiao and Mahdavi, arXiv 2512.23017, Algorithm 1); other modes in `MergePolicy`. Neither input is changed.

    Args:
        accumulator: float32 tensors, as the merge before returned them.
        adapter: the same keys and shapes; float32, bfloat16 or float16. It is moved to the accumulator's device.
        dtypes: the dtype that each tensor of the adapter must have, where that is known.
        source: how messages call the adapter.

    Raises:
        SLAOMergeError: keys, shapes or dtypes do not fit. Found before anything is computed.
        SLAOMergeDivergedError: the adapter, the accumulator or the result is not finite, or has grown too much.
        InvalidSettingError: ``index`` is below 2.
    """
    policy = policy or MergePolicy()
    weight = policy.weight(index)
    refuse("accumulator", accumulator_problems(accumulator), index)
    refuse(source, layout_problems(adapter) or fit_problems(adapter, accumulator, dtypes), index)
    with _own_randomness(policy, index, accumulator):
        return _merged(accumulator, adapter, index, weight, policy, source)


def _merged(
    accumulator: State, adapter: State, index: int, weight: float, policy: MergePolicy, source: str
) -> MergeResult:
    tensors = room_for(accumulator)
    squares: list[Tensor] = []
    looked_at: list[Tensor] = []
    for key, before in accumulator.items():
        after, incoming = tensors[key], adapter[key]
        replaced = policy.mode == "slao" and kind_of(key) in (Kind.A, Kind.MAGNITUDE)
        if replaced or incoming.dtype != torch.float32 or incoming.device != before.device:
            incoming = after.copy_(incoming)
        # Next to its arithmetic a tensor is in the cache: the looks at it cost little more.
        arrived = square_sum(incoming)
        if not replaced:
            _combine(before, incoming, key, weight, policy, into=after)
        squares += [square_sum(before), arrived, arrived if replaced else square_sum(after)]
        looked_at += [before, adapter[key], after]
    found = norms_of(squares, looked_at)
    norms = tuple(TensorNorms(key, *found[3 * i : 3 * i + 3]) for i, key in enumerate(tensors))
    _judge(norms, accumulator, adapter, tensors, index=index, policy=policy, source=source)
    return MergeResult(tensors, index, weight, norms)


def _combine(before: Tensor, incoming: Tensor, key: str, weight: float, policy: MergePolicy, *, into: Tensor) -> None:
    """``into`` may be ``incoming`` itself."""
    pruned = kind_of(key) in (Kind.A, Kind.B)
    if pruned and policy.mode == "ties":
        into.copy_(ties(before, incoming, weight, policy.density))
    elif pruned and policy.mode == "dare":
        into.copy_(dare(before, incoming, weight, policy.density))
    else:
        torch.lerp(before, incoming, weight, out=into)


def _judge(
    norms: tuple[TensorNorms, ...],
    accumulator: State,
    adapter: State,
    tensors: State,
    *,
    index: int,
    policy: MergePolicy,
    source: str,
) -> None:
    for norm in norms:
        if not math.isfinite(norm.before):
            raise _not_finite(index, norm, source, "the accumulator holds", accumulator[norm.key])
        if not math.isfinite(norm.incoming):
            raise _not_finite(index, norm, source, "the adapter holds", adapter[norm.key])
        limit = torch.finfo(adapter[norm.key].dtype).max
        # No value exceeds the norm, so that hardly any tensor needs this look.
        if limit < norm.after < math.inf and float(tensors[norm.key].abs().max()) > limit:
            kept = str(adapter[norm.key].dtype).removeprefix("torch.")
            raise _diverged(index, norm, source, f"the result does not fit into {kept}, its dtype")
    found = judge(norms, policy)
    if found is not None:
        raise _diverged(index, found.norms, source, found.problem, found.limit)


def _not_finite(index: int, norm: TensorNorms, source: str, who: str, values: Tensor) -> SLAOMergeDivergedError:
    return _diverged(index, norm, source, f"{who} {what_is_not_finite(values) or 'values beyond float32'}")


def _diverged(
    index: int, norm: TensorNorms, source: str, problem: str, limit: float | None = None
) -> SLAOMergeDivergedError:
    return SLAOMergeDivergedError(
        run_index=index, layer=short(norm.key), problem=problem, adapter=source, norms=as_details(norm, limit)
    )


@contextmanager
def _own_randomness(policy: MergePolicy, index: int, accumulator: State) -> Iterator[None]:
    if policy.mode != "dare":
        yield
        return
    devices = {tensor.device for tensor in accumulator.values() if tensor.device.type == "cuda"}
    with torch.random.fork_rng(devices=devices):
        text = f"{policy.seed} {index}".encode()
        torch.manual_seed(int.from_bytes(hashlib.sha256(text).digest()[:7]))
        yield
