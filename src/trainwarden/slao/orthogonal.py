"""The orthogonal start of the next task, and how far the subspaces of two adapters overlap."""

from __future__ import annotations

import torch
from torch import Tensor

from trainwarden.errors import SLAOError

from .factors import Kind, State, keys_of, kind_of, short

ORTHOGONALITY_LIMIT = 1e-4
"""Largest entry of |Q Qᵀ − 1| that float32 Householder QR of factors this size leaves is near 1e-6."""


@torch.no_grad()
def init_adapter(finetuned: State) -> dict[str, Tensor]:
    """The start for the next task from the adapter of the last one: A orthonormal, all else as it was.

    With QR(Aᵀ) = QR, the new A is Qᵀ, so that A Aᵀ = 1 (Qiao and Mahdavi, arXiv 2512.23017). The signs of Q are
    chosen so that R has no negative diagonal: rows keep their direction, and B, which is kept, its meaning. With
    rank > in, rows cannot be orthonormal; then the columns are: Aᵀ A = 1. Computed in float32, where QR exists,
    and returned in the dtype of each tensor. Expect a step in the loss when A was far from orthogonal.

    ``finetuned`` is the adapter as it was trained, not the merged one, whose B differs. Raises SLAOError.
    """
    return {
        key: orthonormal(tensor, key).to(tensor.dtype) if kind_of(key) is Kind.A else tensor.detach().clone()
        for key, tensor in finetuned.items()
    }


def orthonormal(a: Tensor, key: str = "A") -> Tensor:
    """The orthonormal basis of the rows of ``a`` (rank × …), float32, same shape; see `init_adapter`."""
    flat = a.detach().to(torch.float32).reshape(a.shape[0], -1)
    if not bool(flat.isfinite().all()):  # one NaN would become a whole matrix of them
        raise SLAOError(problem=f"{short(key)} is not finite, so it has no orthogonal start")
    tall = flat.shape[0] > flat.shape[1]
    q, r = torch.linalg.qr(flat if tall else flat.T)
    basis = q * torch.where(r.diagonal() < 0, -1.0, 1.0)
    error = float((basis.T @ basis - torch.eye(basis.shape[1], device=basis.device)).abs().max())
    if not error < ORTHOGONALITY_LIMIT:
        raise SLAOError(problem=f"the start of {short(key)} is off orthogonal by {error:.1e}")
    rows: Tensor = basis if tall else basis.T
    return rows.reshape(a.shape).contiguous()


@torch.no_grad()
def overlap(one: State, other: State) -> dict[str, float]:
    """For each A, the share of one row space that lies in the other: 1 for the same one, 0 for orthogonal ones.

    It is ‖Q₁ᵀ Q₂‖² / min(rank): the mean squared cosine of the principal angles. Unrelated adapters have about
    rank / in. Raises SLAOError.
    """
    found = {}
    for key in keys_of(Kind.A, one):
        first, second = (orthonormal(state[key], key).reshape(state[key].shape[0], -1) for state in (one, other))
        rank = min(first.shape)
        found[key] = 1.0 if rank == first.shape[1] else float((first @ second.T).square().sum()) / rank
    return found
