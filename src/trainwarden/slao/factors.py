"""What the tensors of a LoRA adapter are, told by their keys as peft saves them, and how they belong together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum
from functools import lru_cache

from torch import Tensor

State = Mapping[str, Tensor]
"""An adapter as peft saves it: ``base_model.model.….q_proj.lora_A.weight`` and so on, without an adapter name."""


class Kind(StrEnum):
    """The part that a tensor plays in its layer."""

    A = "A"
    """The down-projection, rank × in (an embedding's and a convolution's too); replaced by SLAO."""
    B = "B"
    """The up-projection, out × rank; merged."""
    MAGNITUDE = "magnitude"
    """DoRA's magnitude, one value an output. It was trained with the A of its own task, so it follows A."""
    WHOLE = "whole"
    """Anything saved whole (`modules_to_save`, biases): merged as B is, never pruned."""


_SUFFIXES = {
    ".lora_A.weight": Kind.A,
    ".lora_embedding_A": Kind.A,
    ".lora_B.weight": Kind.B,
    ".lora_embedding_B": Kind.B,
    ".lora_magnitude_vector": Kind.MAGNITUDE,
}
_PARTNERS = {
    ".lora_A.weight": ".lora_B.weight",
    ".lora_embedding_A": ".lora_embedding_B",
    ".lora_B.weight": ".lora_A.weight",
    ".lora_embedding_B": ".lora_embedding_A",
}


@lru_cache(maxsize=1 << 14)
def kind_of(key: str) -> Kind:
    """The kind of the tensor of that name."""
    return next((kind for suffix, kind in _SUFFIXES.items() if key.endswith(suffix)), Kind.WHOLE)


@lru_cache(maxsize=1 << 14)
def partner_of(key: str) -> str | None:
    """The name of the B that belongs to an A, or the other way round; None for anything else."""
    for suffix, other in _PARTNERS.items():
        if key.endswith(suffix):
            return key.removesuffix(suffix) + other
    return None


def keys_of(kind: Kind, keys: Iterable[str]) -> list[str]:
    """The keys of one kind, in their order."""
    return [key for key in keys if kind_of(key) is kind]


def short(key: str) -> str:
    """A key as people know it, without peft's wrapping."""
    return key.removeprefix("base_model.model.").removeprefix("model.")
