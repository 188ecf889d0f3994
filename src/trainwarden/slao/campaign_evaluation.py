"""Held-out losses of an adapter on the tasks of a campaign."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from trainwarden.runtime.evaluation import Evaluation as Evaluating
from trainwarden.runtime.release import release_memory
from trainwarden.runtime.split import shifted_target_tokens
from trainwarden.train.config import TrainConfig
from trainwarden.train.data import Batch, read_rows, split_rows
from trainwarden.train.encode import Encoded, encode_rows
from trainwarden.train.evaluate import evaluation_batches
from trainwarden.train.gates import device_asked
from trainwarden.train.hub import Backoff
from trainwarden.train.loop import typed_failures
from trainwarden.train.precision import Precision, choose_device, choose_precision
from trainwarden.train.preparation import Prepared, prepare
from trainwarden.train.run import trainer_from_config

from .campaign_config import CampaignTask
from .factors import State
from .peft_api import install

_ROWS = 8
"""Rows of an evaluated batch, where the configuration leaves the batch size to the machine."""


def held_out_losses(tasks: Sequence[CampaignTask], adapter: State, say: Callable[[str], None]) -> dict[str, float]:
    """The mean loss (nats a target token) of an adapter on the held-out rows of each task that has some.

    The base model is loaded for it, on the device and in the precision of the last task, and dropped. The rows are
    those that the training of each task held out: same file, same draw, same cut.

    Raises:
        ModelLoadError, the ``Dataset…`` errors, InvalidSettingError: as in training.
        GPUMemoryError: one row does not fit.
        TrainingError: anything else that goes wrong in the model.
    """
    chosen = [task for task in tasks if task.has_held_out_rows]
    if not chosen:
        return {}
    try:
        with typed_failures("evaluation"), torch.random.fork_rng(devices=[]):
            return _losses(chosen, adapter, tasks[-1].config, say)
    finally:
        release_memory()


def _losses(
    tasks: Sequence[CampaignTask], adapter: State, config: TrainConfig, say: Callable[[str], None]
) -> dict[str, float]:
    device, _ = choose_device(device_asked(config.trainer.device, config.trainer.backend))
    precision = choose_precision(config.model.dtype, device, config.model.mode)
    prepared = _as_in_training(config, precision, say)
    model, tokenizer = prepared.model, prepared.tokenizer
    install(model, adapter)
    if config.model.mode != "qlora":  # packed weights were loaded to where they are
        model.to(device)

    def loss_of(batch: Batch) -> Tensor:
        on_device = {key: value.to(device) for key, value in batch.items()}
        with torch.autocast(device.type, precision.compute, enabled=precision.compute is not torch.float32):
            loss: Tensor = model(**on_device, use_cache=False).loss
        return loss

    evaluating = Evaluating(recover=True, split=None, verify=False, on_shrink=lambda *_: None)
    found: dict[str, float] = {}
    for task in tasks:
        rows = _encoded(task.config, tokenizer, model)
        size = task.config.trainer.batch_size
        batches = evaluation_batches(
            rows, batch_size=size if isinstance(size, int) else _ROWS, pad_token_id=prepared.pad_token_id
        )
        loss = evaluating.run(loss_of, batches, shifted_target_tokens, [model])
        assert isinstance(loss, float)
        found[task.name] = loss
    return found


def _as_in_training(config: TrainConfig, precision: Precision, say: Callable[[str], None]) -> Prepared:
    """Model and tokenizer as a training has them, made without its data."""
    trainer = trainer_from_config(
        config, observers=(), eval_dataset=None, eval_rows=0, eval_every_steps=0, gradient_checkpointing=False
    )
    return prepare(replace(trainer, train_dataset=[{"text": "."}]), precision, backoff=Backoff(), say=say)


def _encoded(config: TrainConfig, tokenizer: Any, model: Any) -> list[Encoded]:
    data = config.data
    if data.eval is not None:
        rows, name = read_rows(data.eval), data.eval
    else:
        drawn = read_rows(data.train, limit=data.limit)
        rows, name = split_rows(drawn, data.eval_rows, seed=config.trainer.seed)[1], data.train
    positions = getattr(model.config, "max_position_embeddings", None)
    longest = min(data.max_length, positions) if isinstance(positions, int) and positions >= 2 else data.max_length
    return list(encode_rows(rows, tokenizer, max_length=longest, name=name).rows)
