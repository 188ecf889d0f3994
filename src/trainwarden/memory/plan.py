"""What a training does to memory, independent of how it is predicted: one frozen plan for closed form and trace."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Mode = Literal["full", "lora", "qlora"]
OptimizerName = Literal["adamw_fused", "adamw_foreach", "adamw_8bit", "paged_adamw_8bit", "sgd"]
DtypeName = Literal["float32", "bfloat16", "float16"]

MODES: tuple[Mode, ...] = get_args(Mode)
OPTIMIZERS: tuple[OptimizerName, ...] = get_args(OptimizerName)
DTYPES: tuple[DtypeName, ...] = get_args(DtypeName)
BYTES_OF: dict[DtypeName, int] = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """One way to train a model.

    Attributes:
        mode: all weights, adapters on frozen weights, or adapters on frozen weights packed to 4 bits.
        sequence_length: tokens of the longest row; a micro-batch is padded to it.
        weights: type in which the model is held: all of it (``full``), or what is frozen. Adapters are float32.
        autocast: type of the forward pass where it is not that of the weights.
        checkpointing: blocks keep their input only and are run again in the backward pass.
        loss_chunk_tokens: logits are made for so many tokens at a time, twice; None holds all of them.
        optimizer_in_backward: each parameter is updated as soon as its gradient is there; excludes accumulation.
        offload: FSDP with CPU offload: weights, gradients and states live in host memory.
        dropout: of the adapters; a mask is kept for each.
    """

    mode: Mode = "lora"
    micro_batch_size: int = 1
    sequence_length: int = 2048
    grad_accum_steps: int = 1
    optimizer: OptimizerName = "adamw_fused"
    weights: DtypeName = "bfloat16"
    autocast: DtypeName | None = None
    checkpointing: bool = False
    loss_chunk_tokens: int | None = None
    optimizer_in_backward: bool = False
    offload: bool = False
    lora_rank: int = 16
    lora_dropout: float = 0.0

    @property
    def tokens(self) -> int:
        """Of one micro-batch, padding included."""
        return self.micro_batch_size * self.sequence_length

    @property
    def global_batch_size(self) -> int:
        return self.micro_batch_size * self.grad_accum_steps

    @property
    def weight_bytes(self) -> int:
        """Of one weight as it is held."""
        return BYTES_OF[self.weights]

    @property
    def compute_bytes(self) -> int:
        """Of one activation of a matrix product."""
        return BYTES_OF[self.autocast or self.weights]
