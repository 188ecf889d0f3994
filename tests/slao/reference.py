"""SLAO in numpy and float64, written from the paper (arXiv 2512.23017) and not from the code under test.

After task i: A_merge ← A_i, B_merge ← B_merge + λ(i) (B_i − B_merge), λ(i) = 1/√i. The next task starts with
A = Qᵀ of QR(A_iᵀ), the diagonal of R made positive, and B = B_i.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray

Arrays = dict[str, NDArray[np.float64]]


def arrays(state: Mapping[str, torch.Tensor]) -> Arrays:
    return {key: value.detach().to(torch.float64).numpy().copy() for key, value in state.items()}


def is_a(key: str) -> bool:
    return "lora_A" in key or "lora_embedding_A" in key


def merged(adapters: Iterable[Arrays], weight: Callable[[int], float] = lambda i: 1 / np.sqrt(i)) -> Arrays:
    accumulator: Arrays = {}
    for i, task in enumerate(adapters, start=1):
        if i == 1:
            accumulator = {key: value.copy() for key, value in task.items()}
            continue
        for key, value in task.items():
            if is_a(key) or "magnitude" in key:
                accumulator[key] = value.copy()
            else:
                accumulator[key] = accumulator[key] + weight(i) * (value - accumulator[key])
    return accumulator


def start(finetuned: Arrays) -> Arrays:
    begun = {}
    for key, value in finetuned.items():
        if not is_a(key):
            begun[key] = value.copy()
            continue
        basis: list[NDArray[np.float64]] = []
        for row in value:  # Gram–Schmidt, twice: independent of any library's QR, and positive diagonal by construction
            left = row.copy()
            for _ in range(2):
                for found in basis:
                    left = left - (left @ found) * found
            basis.append(left / np.sqrt(left @ left))
        begun[key] = np.stack(basis)
    return begun


def distance(state: Mapping[str, torch.Tensor], reference: Arrays) -> float:
    """The relative distance of all values concatenated, in float64."""
    assert state.keys() == reference.keys()
    ours = np.concatenate([arrays(state)[key].ravel() for key in sorted(reference)])
    theirs = np.concatenate([reference[key].ravel() for key in sorted(reference)])
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
