"""The training loop: the `Guard` of any loop, around accelerate's model and a plain torch optimizer."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from trainwarden.device import Sampler
from trainwarden.errors import TrainingError, WardenError
from trainwarden.events import Evaluated, Event, MetricsLogged, Notice, announce
from trainwarden.guards.oom import is_out_of_memory
from trainwarden.runtime import Guard
from trainwarden.runtime.ranks import is_rank_failure
from trainwarden.runtime.shortage import Shortage
from trainwarden.runtime.split import shifted_target_tokens
from trainwarden.train.chunked_loss import require_chunkable
from trainwarden.train.data import Batch, DatasetIdentity, EncodedDataset, training_loader
from trainwarden.train.evaluate import evaluation_batches
from trainwarden.train.hub import first_line
from trainwarden.train.metrics import Metrics
from trainwarden.train.models import quiet_progress_bars
from trainwarden.train.preparation import BASE_MODEL_FOLDER, MODEL_FOLDER, Prepared
from trainwarden.train.publish import publish, read_marker
from trainwarden.train.result import TrainResult
from trainwarden.train.rollback import WayBack
from trainwarden.train.schedule import build_adamw, build_schedule, lr_factor
from trainwarden.train.sensors import Sensors

if TYPE_CHECKING:
    from trainwarden.train.trainer import Trainer


def print_event(event: Event) -> None:
    """The observer of a `Trainer` that was given none: notices and log lines on stderr."""
    if isinstance(event, MetricsLogged | Evaluated):
        print(event, file=sys.stderr, flush=True)
    else:
        announce(event)


@contextmanager
def typed_failures(phase: str) -> Iterator[None]:
    """Makes `GPUMemoryError` of a lack of memory that no guarded phase has met, else `TrainingError`."""
    try:
        yield
    except WardenError:
        raise
    except Exception as error:  # boundary: whatever a model, a template or a file system may raise
        if is_rank_failure(error):
            raise  # the guard knows more about the ranks, and says it
        if is_out_of_memory(error):
            raise Shortage.of(phase, error).error("") from error
        raise TrainingError(problem=f"{type(error).__name__}: {first_line(error)}") from error


class TrainingLoop:
    """One run of a `Trainer`, from the prepared model to the published result."""

    def __init__(
        self,
        trainer: Trainer,
        prepared: Prepared,
        accelerator: Any,
        guard: Guard,
        *,
        micro_batch_size: int,
        sampler: Sampler | None,
        began_s: float,
    ) -> None:
        self._trainer = trainer
        self._micro_batch_size = micro_batch_size
        self.run_id: str | None = None
        """Of the run, from its start on."""
        self._prepared = prepared
        self._accelerator = accelerator
        self._guard = guard
        self._began_s = began_s
        self._device: torch.device = accelerator.device
        self._sensors = Sensors(self._device, sampler)
        self._metrics = Metrics()
        self._eval_loss: float | None = None
        with typed_failures("load"):
            self._model = self._placed(prepared.model)
            if trainer.loss_chunk_tokens is not None:
                require_chunkable(self._model, self._device)
            optimizer = build_adamw(
                self._model,
                learning_rate=trainer.learning_rate,
                weight_decay=trainer.weight_decay,
                device=self._device,
                kind=trainer.optimizer,
            )
            # The guard hooks the optimizer itself; accelerate's wrapper takes no hooks.
            self._optimizer: torch.optim.Optimizer = accelerator.prepare(optimizer).optimizer
        self._scheduler = build_schedule(
            self._optimizer,
            schedule=trainer.schedule,
            warmup_steps=trainer.warmup_steps,
            max_steps=trainer.max_steps,
        )
        self._parameters = [p for p in self._model.parameters() if p.requires_grad]
        others = [self._scheduler, self._metrics, *filter(None, [accelerator.scaler])]
        self._way_back = WayBack(
            guard,
            accelerator.ranks,
            self._model,
            self._optimizer,
            others,
            may_return=trainer.oom_recovery and self._ends_together(),
        )

    def _placed(self, model: Any) -> Any:
        return self._guard.attempt("load", lambda: self._accelerator.prepare(model))

    def run(self) -> TrainResult:
        """Trains to ``max_steps``, evaluates, publishes the model. Errors: see `Trainer.train`."""
        self._sensors.forget_peak_memory()
        run_id, model_path = self._way_back.through(self._run_once)
        return self._result(run_id, model_path)

    def _ends_together(self) -> bool:
        """Whether memory that runs out on one rank ends all of them with the same error."""
        return True

    def _run_once(self) -> tuple[str, Path]:
        """From the newest checkpoint to the end: the run's name, and where its model lies."""
        guard, trainer, prepared = self._guard, self._trainer, self._prepared
        with (
            guard.watch(
                model=self._model,
                optimizer=self._optimizer,
                scheduler=self._scheduler,
                scaler=self._accelerator.scaler,
                metrics=self._metrics,
                data=DatasetIdentity(prepared.train, accept_changes=trainer.accept_changes),
            ),
            self._way_back.watching(),
            typed_failures("step"),
        ):
            self.run_id = guard.run_id
            notices, prepared.notices = prepared.notices, []
            for notice in notices:
                guard.emit(Notice(step=guard.steps_completed, text=notice))
            self._publish_tokenizer()
            self._train()
            model_path = self._finish()
            run_id = guard.run_id
        assert run_id is not None
        return run_id, model_path

    # -- steps -------------------------------------------------------------------------------------------

    def _train(self) -> None:
        self._model.train()
        self._metrics.start_clock()
        for micro_batches in self._guard.batches(self._loader(), max_steps=self._trainer.max_steps):
            self._at_boundary()
            self._step(micro_batches)
        self._at_boundary()

    def _loader(self) -> DataLoader[Any]:
        trainer = self._trainer
        return training_loader(
            self._prepared.train,
            micro_batch_size=self._micro_batch_size,
            grad_accum_steps=trainer.grad_accum_steps,
            pad_token_id=self._prepared.pad_token_id,
            seed=trainer.seed,
        )

    def _step(self, micro_batches: list[Batch]) -> None:
        """One optimizer step on the mean over all target tokens of its micro-batches."""
        targets = [shifted_target_tokens(batch) for batch in micro_batches]
        shares = [count / sum(targets) for count in targets]
        losses = [self._backward(batch, share) for batch, share in zip(micro_batches, shares, strict=True)]
        tokens = sum(int(batch["attention_mask"].sum()) for batch in micro_batches)
        self._update(torch.stack(losses).sum(), tokens)

    def _update(self, loss: Tensor, tokens: int) -> None:
        """What follows the backward passes of a step. ``loss``, 0-d, and ``tokens`` are what is logged of it."""
        scaler = self._accelerator.scaler
        if scaler is not None:
            scaler.unscale_(self._optimizer)
        grad_norm = self._clip()
        if scaler is not None:
            scaler.step(self._optimizer)
            scaler.update()
        else:
            self._optimizer.step()
        self._scheduler.step()
        self._optimizer.zero_grad()
        self._metrics.note_step(loss, grad_norm.to(loss.device), tokens)

    def _clip(self) -> Tensor:
        """The norm of the gradients before they were scaled down to ``max_grad_norm``, 0-d."""
        return self._guard.clip_grad_norm_(self._parameters, self._trainer.max_grad_norm or math.inf)

    def _backward(self, batch: Batch, share: float) -> Tensor:
        """``share``: what this micro-batch's targets are of the whole step's."""

        def loss_of(part: Batch) -> Tensor:
            return self._loss_of(part) * share

        return self._guard.backward(loss_of, batch, weight=shifted_target_tokens)

    def _loss_of(self, batch: Batch) -> Tensor:
        # Moved here, inside what is retried, so that the copies of a failed attempt are released with it.
        on_device = {name: tensor.to(self._device) for name, tensor in batch.items()}
        return self._trainer.compute_loss(self._model, on_device)

    # -- between steps -----------------------------------------------------------------------------------

    def _at_boundary(self) -> None:
        """After a step and its checkpoint: log and evaluate when due."""
        trainer, step = self._trainer, self._guard.steps_completed
        self._way_back.at_boundary()
        self._sensors.temperature_c()  # for the maximum
        last = step == trainer.max_steps
        if not self._metrics.window_is_empty and (step == 1 or step % trainer.log_every_steps == 0 or last):
            self._log(step)
        if trainer.eval_every_steps and step and step % trainer.eval_every_steps == 0 and not last:
            self._evaluate(step)

    def _log(self, step: int) -> None:
        window = self._metrics.close_window()
        self._guard.emit(
            MetricsLogged(
                step=step,
                max_steps=self._trainer.max_steps,
                loss=window.loss,
                grad_norm=window.grad_norm,
                learning_rate=self._learning_rate_of(step),
                tokens_per_s=window.tokens_per_s,
                memory_bytes=self._sensors.memory_bytes(),
                temperature_c=self._sensors.temperature_c(),
                steps_skipped=self._guard.steps_skipped,
                shrinks=self._guard.shrinks,
            )
        )

    def _learning_rate_of(self, step: int) -> float:
        """What step ``step`` (from 1) was taken with; the scheduler is one step ahead by now."""
        trainer = self._trainer
        return trainer.learning_rate * lr_factor(
            step - 1,
            schedule=trainer.schedule,
            warmup_steps=trainer.warmup_steps,
            max_steps=trainer.max_steps,
        )

    def _evaluate(self, step: int) -> None:
        dataset = self._prepared.evaluation
        if dataset is None:
            return
        self._eval_loss = self._mean_loss(dataset)
        self._guard.emit(Evaluated(step=step, loss=self._eval_loss, rows=len(dataset)))
        self._metrics.start_clock()

    def _mean_loss(self, dataset: EncodedDataset) -> float:
        """Over all its target tokens."""
        batches = evaluation_batches(
            dataset.rows,
            batch_size=self._evaluation_rows(),
            pad_token_id=self._prepared.pad_token_id,
        )
        loss = self._guard.evaluate(self._loss_of, batches, weight=shifted_target_tokens)
        assert isinstance(loss, float)
        return loss

    def _evaluation_rows(self) -> int:
        """Rows of an evaluated batch: those of a micro-batch, as far as they are known to fit."""
        return min(self._micro_batch_size, self._guard.micro_batch_size or self._micro_batch_size)

    # -- the end -----------------------------------------------------------------------------------------

    def _finish(self) -> Path:
        self._evaluate(self._guard.steps_completed)
        folder = Path(self._trainer.output_dir) / MODEL_FOLDER
        self._publish(folder)
        return folder

    def _publish(self, folder: Path) -> None:
        facts = {"run_id": self._guard.run_id, "step": self._guard.steps_completed}
        marker = read_marker(folder)
        if marker is None or any(marker.get(key) != value for key, value in facts.items()):
            publish(folder, self._save_model, facts=facts, needed_bytes=self._model_bytes())

    def _publish_tokenizer(self) -> None:
        self._prepared.publish_tokenizer(Path(self._trainer.output_dir))

    def _save_model(self, folder: Path) -> None:
        """The adapter alone with LoRA, else all weights; with the tokenizer and its chat template."""
        with quiet_progress_bars():
            self._save_weights(folder)
        self._prepared.tokenizer.save_pretrained(folder)

    def _save_weights(self, folder: Path) -> None:
        model = self._accelerator.unwrap_model(self._model, keep_fp32_wrapper=True)
        if self._trainer.mode != "full":
            # "auto" would ask the Hub whether the vocabulary was resized.
            model.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
        else:
            model.save_pretrained(folder)
        if self._prepared.new_base is not None:
            with torch.random.fork_rng(devices=[]):  # made from the seed once more, beside the run's own random numbers
                base = self._prepared.new_base()
            base.save_pretrained(folder / BASE_MODEL_FOLDER)

    def _model_bytes(self) -> int:
        saved = self._model.parameters() if self._trainer.mode == "full" else self._parameters
        return sum(parameter.numel() * parameter.element_size() for parameter in saved)

    def _result(self, run_id: str, model_path: Path) -> TrainResult:
        guard, history = self._guard, self._metrics.history
        ranks: int = self._accelerator.world_size
        return TrainResult(
            run_id=run_id,
            run_dir=str(guard.run_dir),
            steps_completed=guard.steps_completed,
            steps_skipped=guard.steps_skipped,
            shrinks=guard.shrinks,
            data_skipped=guard.data_skipped,
            tokens=history.tokens,
            wall_s=time.perf_counter() - self._began_s,
            first_loss=math.nan if history.first is None else history.first,
            final_loss=history.final,
            best_loss=history.best,
            mean_loss=history.mean,
            eval_loss=self._eval_loss,
            peak_memory_bytes=self._sensors.peak_memory_bytes(),
            max_temperature_c=self._sensors.max_temperature_c,
            checkpoint_path=None if guard.newest_checkpoint is None else str(guard.newest_checkpoint),
            model_path=str(model_path),
            rollbacks=self._way_back.count,
            world_size=ranks,
            global_batch_size=ranks * self._micro_batch_size * self._trainer.grad_accum_steps,
        )
