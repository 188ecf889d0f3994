"""Small models whose memory can be reckoned by hand."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional


class Block(nn.Module):
    """Two linear layers around a ReLU, with a residual connection. ``number`` is its place in the stack."""

    def __init__(self, width: int, number: int = 0, scale: float = 1.0) -> None:
        super().__init__()
        self.number, self.scale = number, scale
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = hidden + self.scale * self.down(torch.relu(self.up(hidden)))
        return out


class Stacked(nn.Module):
    """An embedding, equal blocks, and a head with its loss. Calls each block through a checkpoint if asked to."""

    def __init__(self, width: int = 64, depth: int = 3, vocab: int = 100, *, checkpointing: bool = False) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.embedding = nn.Embedding(vocab, width)
        self.blocks = nn.ModuleList(Block(width, number) for number in range(depth))
        self.head = nn.Linear(width, vocab)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(ids)
        for block in self.blocks:
            if self.checkpointing:
                hidden = torch.utils.checkpoint.checkpoint(block, hidden, use_reentrant=False)
            else:
                hidden = block(hidden)
        return functional.cross_entropy(self.head(hidden).flatten(0, 1), ids.flatten())


def ids(rows: int = 2, tokens: int = 16) -> torch.Tensor:
    """Token ids, all of them 1."""
    return torch.ones(rows, tokens, dtype=torch.long)


def parameter_bytes(model: nn.Module) -> int:
    """Of all weights."""
    return sum(p.numel() * p.element_size() for p in model.parameters())
