"""The training loop of one of several ranks: its share of each step, and one outcome for all of them."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from trainwarden.events import Notice
from trainwarden.train.data import Batch, EncodedDataset
from trainwarden.train.loop import TrainingLoop, typed_failures
from trainwarden.train.processes import DataParallel, Processes
from trainwarden.train.rank_steps import RankStep, rank_loader, targets_of
from trainwarden.train.result import TrainResult, result_of_ranks


class RankedLoop(TrainingLoop):
    """One run of a `Trainer` on one of its ranks. Rank 0 alone writes what the run publishes."""

    _accelerator: Processes

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

    def _train(self) -> None:
        ranks, rows, times = self._accelerator.world_size, self._micro_batch_size, self._trainer.grad_accum_steps
        if ranks > 1:
            text = f"a step takes {ranks * rows * times} rows: {ranks} ranks × {rows} rows × {times} micro-batches"
            self._guard.emit(Notice(step=self._guard.steps_completed, text=text))
        super()._train()

    def _step(self, step: RankStep) -> None:  # type: ignore[override]
        """One optimizer step on the mean over all target tokens of all ranks."""
        ranks, last = self._accelerator.world_size, len(step.batches) - 1
        losses = []
        for index, (batch, share) in enumerate(zip(step.batches, step.shares, strict=True)):
            with self._exchanging(index == last):
                # The shares of all ranks add up to 1, and the gradients are averaged over the ranks.
                losses.append(self._backward(batch, share * ranks))
        loss = self._accelerator.sum(torch.stack(losses).sum()) / ranks
        self._update(loss, step.tokens)

    def _exchanging(self, _last: bool) -> AbstractContextManager[Any]:
        """Around one micro-batch of a step; ``_last`` is the one after which the ranks' gradients have to be one."""
        return nullcontext()

    def _publish(self, folder: Path) -> None:
        self._accelerator.ranks.lead(lambda: super(RankedLoop, self)._publish(folder))

    def _publish_tokenizer(self) -> None:
        self._accelerator.ranks.lead(super()._publish_tokenizer)

    def _result(self, run_id: str, model_path: Path) -> TrainResult:
        return result_of_ranks(self._accelerator.ranks.gather(super()._result(run_id, model_path)))


class DataParallelLoop(RankedLoop):
    """Every rank holds the whole model, trains on its rows of a step, and evaluates its rows of the evaluation."""

    _accelerator: DataParallel
    _bare: nn.Module

    def _placed(self, model: Any) -> Any:
        """Moved by each rank for itself, which may be tried twice; wrapped in DDP by all together, which may not."""
        device = self._accelerator.device

        def move() -> Any:
            with typed_failures("load"):
                return self._guard.attempt("load", lambda: model.to(device))

        moved = self._accelerator.together(move)
        wrapped = self._accelerator.prepare(moved)
        self._bare = self._accelerator.unwrap_model(wrapped, keep_fp32_wrapper=True)
        return wrapped

    def _exchanging(self, last: bool) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = nullcontext() if last else self._model.no_sync()
        return context

    def _mean_loss(self, dataset: EncodedDataset) -> float:
        """The same on every rank: each evaluates its own rows, weighed by their targets."""
        rank, ranks = self._accelerator.rank, self._accelerator.world_size
        own = EncodedDataset([dataset[index] for index in range(rank, len(dataset), ranks)])

        def evaluate() -> float:
            with typed_failures("evaluation"):
                return super(DataParallelLoop, self)._mean_loss(own) if len(own) else math.nan

        loss = self._accelerator.together(evaluate)
        found = self._accelerator.ranks.gather((loss, sum(targets_of(own[index]) for index in range(len(own)))))
        weighed = [(loss, weight) for loss, weight in found if weight]
        return math.fsum(loss * weight for loss, weight in weighed) / math.fsum(weight for _, weight in weighed)

    def _loss_of(self, batch: Batch) -> torch.Tensor:
        if torch.is_grad_enabled():
            return super()._loss_of(batch)
        # DDP would send buffers to the other ranks, which are somewhere else in their rows.
        on_device = {name: tensor.to(self._device) for name, tensor in batch.items()}
        return self._trainer.compute_loss(self._bare, on_device)
