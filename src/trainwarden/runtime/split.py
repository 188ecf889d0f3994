"""Cutting a batch into micro-batches, and what a mean over a part weighs in the mean over the whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from trainwarden.guards.memory_plan import Size

IGNORE_INDEX = -100  # torch.nn.functional.cross_entropy's default: such a target is not part of its mean

Weight = Callable[[Any], float]
Split = Callable[[Any, int], Sequence[Any]]


class CannotSplitError(ValueError):
    """This batch has no row dimension that can be cut; says why. Internal: becomes a ``SplitRefusedError``."""


def rows(batch: Any) -> int:
    """Number of rows of a batch: the common length of its tensors' first dimension."""
    found = {length for _, length in _lengths(batch, "batch")}
    if not found:
        raise CannotSplitError(f"a batch of type {type(batch).__name__} holds no tensor with rows")
    if len(found) > 1:
        places = ", ".join(f"{place} has {length}" for place, length in _lengths(batch, "batch"))
        raise CannotSplitError(f"its tensors differ in their first dimension: {places}")
    return found.pop()


def size(batch: Any) -> Size | None:
    """Rows of a batch, and elements a row of its ``input_ids``, or else of its largest tensor; ``None``: no tensor.

    Padding is counted. Reads shapes only: nothing waits for the device.
    """
    ids = batch.get("input_ids") if _is_mapping(batch) else None
    left = [ids if isinstance(ids, torch.Tensor) else batch]
    largest: torch.Tensor | None = None
    most = -1
    while left:  # on the step path: no generators, no names
        value = left.pop()
        if isinstance(value, torch.Tensor):
            if value.ndim and (elements := value.numel()) > most:
                largest, most = value, elements
        elif _is_mapping(value):
            left.extend(value.values())
        elif _is_sequence(value):
            left.extend(value)
        else:
            left.extend(child for _, child in _children(value))
    if largest is None or not most:
        return None
    rows = largest.shape[0]
    return Size(rows, most // rows)


def split_rows(batch: Any, sizes: Sequence[int]) -> list[Any]:
    """The batch cut along the first dimension of its tensors into parts of ``sizes`` rows, in order, without copying.

    Tensors, tuples, lists, mappings and dataclasses of them are cut, also lists that hold one item a row; whatever has
    no rows (numbers, strings, 0-d tensors, ``None``) goes to every part.
    """
    total = rows(batch)
    if sum(sizes) != total:
        raise ValueError(f"sizes {tuple(sizes)} do not add up to {total} rows")
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [_cut(batch, start, start + size, total) for start, size in zip(starts, sizes, strict=True)]


def target_tokens(batch: Any, *, shift: int = 0) -> float:
    """How many targets a token-mean loss averages over: the entries of ``labels`` that are not -100.

    ``batch`` is a mapping with ``labels`` (int, ``[rows, tokens]``) or a tuple that ends with them. ``shift=1``
    leaves out the first token of each row, as a causal model does that shifts its labels itself.
    """
    labels = _labels(batch)
    return float((labels[:, shift:] if shift else labels).ne(IGNORE_INDEX).sum().item())


shifted_target_tokens: Weight = partial(target_tokens, shift=1)
"""`target_tokens` for Hugging Face causal language models, whose loss never sees the first label of a row."""


def ignored_target_place(batch: Any) -> str | None:
    """Where the batch holds a target of -100 (``batch['labels']``), or ``None``."""
    for place, tensor in _tensors(batch, "batch"):
        if not tensor.is_floating_point() and not tensor.is_complex() and tensor.dtype != torch.bool:
            signed = tensor.dtype not in (torch.uint8, torch.uint16, torch.uint32, torch.uint64)
            if signed and bool(tensor.eq(IGNORE_INDEX).any()):
                return place
    return None


def _labels(batch: Any) -> torch.Tensor:
    labels = batch.get("labels") if isinstance(batch, Mapping) else batch[-1] if _is_sequence(batch) else None
    if not isinstance(labels, torch.Tensor):
        raise CannotSplitError(
            "target_tokens needs a mapping with a tensor under 'labels' or a tuple that ends with the labels"
        )
    return labels


def _is_mapping(value: Any) -> bool:
    return type(value) is dict or isinstance(value, Mapping)  # asking an abstract class is slow


def _is_sequence(value: Any) -> bool:
    return isinstance(value, (tuple, list))


def _children(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        yield from ((f"[{key!r}]", child) for key, child in value.items())
    elif _is_sequence(value):
        yield from ((f"[{index}]", child) for index, child in enumerate(value))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from ((f".{field.name}", getattr(value, field.name)) for field in dataclasses.fields(value))


def _tensors(value: Any, place: str) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield place, value
    else:
        for suffix, child in _children(value):
            yield from _tensors(child, place + suffix)


def _lengths(batch: Any, place: str) -> Iterator[tuple[str, int]]:
    yield from ((where, tensor.shape[0]) for where, tensor in _tensors(batch, place) if tensor.ndim)


def _cut(value: Any, start: int, stop: int, total: int) -> Any:
    def cut(child: Any) -> Any:
        return _cut(child, start, stop, total)

    if isinstance(value, torch.Tensor):
        return value[start:stop] if value.ndim else value
    if isinstance(value, Mapping):
        parts = {key: cut(child) for key, child in value.items()}
        return parts if type(value) is dict else _rebuilt(value, parts)
    if _is_sequence(value):
        if len(value) == total and not any(True for _ in _tensors(value, "")):
            return value[start:stop]
        items = [cut(child) for child in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: cut(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value


def _rebuilt(value: Mapping[Any, Any], parts: dict[Any, Any]) -> Any:
    try:
        return type(value)(parts)  # type: ignore[call-arg]
    except TypeError as error:
        problem = f"a {type(value).__name__} cannot be rebuilt from a dict"
        raise CannotSplitError(problem) from error
