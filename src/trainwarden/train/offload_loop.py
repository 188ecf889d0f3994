"""The training loop of ranks whose weights lie in pieces on their hosts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from trainwarden.runtime.sharded import is_sharded, whole_model_state
from trainwarden.train.loop import TrainingLoop
from trainwarden.train.offload import Offload
from trainwarden.train.rank_steps import RankStep, rank_loader


class OffloadedLoop(TrainingLoop):
    """One run of a `Trainer` with ``full_ft_offload``, on one of its ranks.

    Its accelerator is the `Offload`. Rank 0 alone writes what the run publishes.
    """

    _accelerator: Offload
    _whole: dict[str, Any]

    def _placed(self, model: Any) -> Any:
        return self._accelerator.prepare(model)  # with every rank at once, so no rank tries it twice

    def _loader(self) -> DataLoader[Any]:
        return rank_loader(
            self._prepared.train,
            rank=self._accelerator.rank,
            world_size=self._accelerator.world_size,
            micro_batch_size=self._micro_batch_size,
            grad_accum_steps=self._trainer.grad_accum_steps,
            pad_token_id=self._prepared.pad_token_id,
            seed=self._trainer.seed,
        )

    def _step(self, step: RankStep) -> None:  # type: ignore[override]
        """One optimizer step on the mean over all target tokens of all ranks."""
        ranks = self._accelerator.world_size
        # The shares of all ranks add up to 1, and FSDP takes the mean over the ranks.
        losses = [self._backward(batch, share * ranks) for batch, share in zip(step.batches, step.shares, strict=True)]
        loss = self._accelerator.sum(torch.stack(losses).sum()) / ranks
        grad_norm: Any = self._guard.clip_grad_norm_(self._parameters, self._trainer.max_grad_norm or math.inf)
        grad_norm = grad_norm.full_tensor() if is_sharded(grad_norm) else grad_norm
        self._optimizer.step()
        self._scheduler.step()
        self._optimizer.zero_grad()
        self._metrics.note_step(loss, grad_norm.to(loss.device), step.tokens)

    def _evaluate(self, step: int) -> None:
        super()._evaluate(step)
        self._model.reshard()  # FSDP keeps the outermost weights gathered after a forward pass alone

    def _evaluation_rows(self) -> int:
        """The same on every rank, for all evaluate the same batches together."""
        return min(self._accelerator.ranks.gather(super()._evaluation_rows()))

    def _publish(self, folder: Path) -> None:
        self._whole = whole_model_state(self._model)
        self._accelerator.ranks.lead(lambda: super(OffloadedLoop, self)._publish(folder))
        self._whole = {}

    def _publish_tokenizer(self) -> None:
        self._accelerator.ranks.lead(super()._publish_tokenizer)

    def _save_weights(self, folder: Path) -> None:
        self._model.save_pretrained(folder, state_dict=self._whole)
