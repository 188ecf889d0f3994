"""`Trainer`: guarded supervised fine-tuning of a causal language model."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from trainwarden.device import Sampler
from trainwarden.errors import InvalidSettingError
from trainwarden.events import Notice, Observer
from trainwarden.guards.finite import FiniteAction, FinitePolicy
from trainwarden.guards.ladder import Remedy
from trainwarden.guards.spikes import SpikeAction, SpikePolicy
from trainwarden.runtime import Guard
from trainwarden.train import gates
from trainwarden.train.chunked_loss import chunked_loss
from trainwarden.train.data import Batch, Source
from trainwarden.train.foresight import Foresight
from trainwarden.train.fp8 import frozen_layers_in_fp8
from trainwarden.train.hub import Backoff
from trainwarden.train.loop import TrainingLoop, print_event, typed_failures
from trainwarden.train.models import ModelSource, enable_checkpointing, quiet_torchao
from trainwarden.train.offload import offloading
from trainwarden.train.offload_loop import OffloadedLoop
from trainwarden.train.precision import choose_device, choose_precision
from trainwarden.train.preparation import MODEL_FOLDER, TOKENIZER_FOLDER, Prepared, prepare
from trainwarden.train.processes import Processes, data_parallel, device_of_rank
from trainwarden.train.publish import require_ours
from trainwarden.train.ranked_loop import DataParallelLoop
from trainwarden.train.result import TrainResult
from trainwarden.train.settings import (
    BackendChoice,
    BatchSize,
    DeviceChoice,
    DtypeChoice,
    Mode,
    OptimizerChoice,
    Schedule,
    check_settings,
)


@dataclass(eq=False, repr=False)
class Trainer:
    """Fine-tunes a causal language model on chat, instruction or plain-text rows.

    ::

        result = Trainer("models/base", "data/train.jsonl", max_steps=200, output_dir="runs/demo").train()

    A step is an optimizer step over ``batch_size`` × ``grad_accum_steps`` rows of each rank; its loss is the mean
    over all its target tokens (what the assistant says, or all of a plain text), however the rows fall into
    micro-batches. Started by torchrun or ``accelerate launch``, the ranks train one model together
    (docs/ranks.md); in a script of one's own each of them makes its own `Trainer`.

    Args:
        model: directory of a Hugging Face checkpoint, or a Hub name; a mapping with ``model_type`` and
            whatever else that type's configuration knows, for a new model with random weights; or a model
            object.
        train_dataset: path of a JSONL file, ``"python-docstrings"``, or a sequence of mappings.
        mode: ``lora`` trains adapters on all linear layers, ``qlora`` does so on frozen weights packed to 4 bits
            (bitsandbytes), ``full`` trains all weights.
        max_steps: optimizer steps of the whole run, resumed parts and skipped steps included.
        output_dir: directory of the run: checkpoints, event log and, at the end, ``model/``. It may hold
            other files.
        tokenizer: a fast tokenizer; needed with a model object, else found beside the model or learned from
            the data.
        eval_dataset: like ``train_dataset``; its loss is computed every ``eval_every_steps`` (0: at the end
            only).
        eval_rows: rows drawn from the training data for evaluation instead.
        max_length: tokens at which rows are cut.
        limit: training rows that are read at most.
        batch_size: rows of a micro-batch on each rank; fewer when memory runs out, with ``oom_recovery``, and the
            same step results. ``auto`` takes as many as are predicted to fit with 5 % of the memory to spare, and
            a continued run the same.
        learning_rate: peak; 2e-4 suits LoRA, full fine-tuning wants about a tenth.
        schedule: ``cosine``, ``linear`` or ``constant`` after ``warmup_steps``.
        optimizer: ``adamw``, or ``adamw_8bit`` (bitsandbytes), which keeps two bytes of state a parameter, not eight.
        max_grad_norm: gradients are scaled down to this norm; ``None`` leaves them.
        seed: of weights, adapters, dropout and order of the data (below 2**32).
        device: ``auto`` takes a CUDA device when there is one.
        dtype: of the computation; trained weights are kept in float32. ``auto`` chooses and says why.
        backend: what trains: ``cpu`` or ``cuda``, the same as ``device``; ``mlx`` is refused until it is built.
        fp8: with LoRA, the frozen linear layers compute in FP8 (torchao), all else in bfloat16. Where that
            cannot be, a warning says why and all is computed in bfloat16.
        full_ft_offload: with ``mode="full"``, weights, gradients and optimizer state lie in host memory
            (FSDP2), in one process or, under torchrun, in pieces on all ranks; ``batch_size`` is then that of one
            rank (docs/offload.md). Where that cannot be, it is refused.
        full_ft_ceiling_billions: with ``mode="full"``, the largest model that is trained, whatever is predicted;
            ``None`` leaves it to the prediction.
        gradient_checkpointing: blocks keep their input only and run again in the backward pass: about a third
            more compute for a fraction of the activations.
        gradient_checkpointing_if_needed: begins without, and switches it on when not even one row fits, or
            ``max_shrinks`` is used up: announced, and the same gradients up to rounding.
        loss_chunk_tokens: tokens whose logits are held at a time: the same loss and gradients up to rounding, for the
            memory of a chunk's logits and one more product with the output layer. ``None`` holds all.
        device_memory_bytes: what the run may take; by default what the driver of a GPU says.
        lora_rank, lora_alpha, lora_dropout, lora_target_modules: of the adapters, as in peft.
        finite_action: what is done about steps that are not finite: ``skip`` leaves them out, up to
            ``max_skipped_in_a_row``; ``rollback`` then goes back to a checkpoint from before them and trains on without
            their rows; ``abort`` ends the run at the first.
        spike_action: what is done about a spike of the loss or gradient norm: ``announce``, ``rollback``, ``abort``.
        accept_changes: as in `Guard`; ``["data"]`` continues on other rows.
        waive: codes of preflight findings that refuse nothing, such as ``PREFLIGHT_MEMORY``.
        on_loaded: called once with the loaded model, its adapters included, before a checkpoint is looked for:
            for starting from other values of what is trained.
        oom_recovery and the other settings not named here: see `Guard`.
        observers: callables that take one event; ``None`` prints notices and log lines to stderr.

    Raises:
        InvalidSettingError: an argument is out of range, or excluded by another or by this machine
            (docs/capability.md). Nothing is loaded before all are checked.
        FP8UnsupportedError: FP8 on a GPU that has it, with a torchao that cannot be imported.
        FSDPUnavailableError: full fine-tuning cannot be offloaded here.
        QuantizationUnavailableError: ``qlora`` or ``adamw_8bit``, which bitsandbytes does not do here.
        MLXUnavailableError: MLX on a Mac that lacks it.
    """

    model: ModelSource
    train_dataset: Source
    _: KW_ONLY
    max_steps: int
    output_dir: str | Path
    mode: Mode = "lora"
    tokenizer: Any = None
    eval_dataset: Source | None = None
    eval_rows: int = 0
    max_length: int = 512
    limit: int | None = None
    batch_size: BatchSize = 8
    grad_accum_steps: int = 1
    learning_rate: float = 2e-4
    warmup_steps: int = 0
    schedule: Schedule = "cosine"
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0
    optimizer: OptimizerChoice = "adamw"
    seed: int = 0
    log_every_steps: int = 10
    eval_every_steps: int = 0
    device: DeviceChoice = "auto"
    dtype: DtypeChoice = "auto"
    backend: BackendChoice = "auto"
    fp8: bool = False
    full_ft_offload: bool = False
    full_ft_ceiling_billions: float | None = None
    gradient_checkpointing: bool = False
    gradient_checkpointing_if_needed: bool = False
    loss_chunk_tokens: int | None = None
    device_memory_bytes: int | None = None
    lora_rank: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    lora_target_modules: str | Sequence[str] = "all-linear"
    oom_recovery: bool = True
    max_shrinks: int = 3
    max_skipped_in_a_row: int = 5
    finite_action: FiniteAction = "skip"
    spike_action: SpikeAction = "announce"
    checkpoint_every_steps: int | None = None
    checkpoint_every_s: float | None = 600.0
    keep_last: int = 2
    resume: Literal["auto", "never", "must"] = "auto"
    accept_changes: Sequence[str] = ()
    waive: Sequence[str] = ()
    observers: Sequence[Observer] | None = None
    command: Sequence[str] | None = None
    config: Mapping[str, Any] | None = None
    on_loaded: Callable[[Any], None] | None = None

    def __post_init__(self) -> None:
        settings = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        check_settings(settings)
        self._check_model()
        for name in ("train_dataset", "eval_dataset"):
            _check_source(name, settings[name], optional=name == "eval_dataset")
        self._granted = gates.ask(self)

    def train(self) -> TrainResult:
        """Trains until ``max_steps``, from the newest checkpoint on, and saves ``output_dir/model``.

        Raises:
            DatasetNotFoundError, DatasetParseError, DatasetValidationError, DatasetFormatError, DatasetError:
                bad data.
            ModelLoadError, GPUNotAvailableError, ConfigurationError: what the run needs is not there, or does
                not fit.
            GPUMemoryError, SplitRefusedError: memory ran out and smaller micro-batches did not help.
            NaNLossError: too many steps in a row were not finite.
            DataLoaderError: too many rows could not be read.
            TrainingAbortedError: after SIGINT or SIGTERM, with a checkpoint.
            ResumeMismatchError, RunExistsError, RunLockedError, CheckpointError, DiskFullError: see
                `Guard.watch`.
            TrainingError: anything else that went wrong during training, chained from what it was.
        """
        began_s = time.perf_counter()
        device, device_reason = choose_device(gates.device_asked(self.device, self.backend))
        device = device_of_rank(device)
        precision = choose_precision(self.dtype, device, self.mode, fp8=self.fp8)
        self._check_output()
        sampler = Sampler() if device.type == "cuda" else None
        runner: Any = offloading if self.full_ft_offload else data_parallel
        with runner(device, precision, self.seed) as processes, ExitStack() as converted:
            guard = self._guard(sampler, processes.rank, self._remedies(lambda: prepared.model))

            def say(text: str) -> None:
                guard.emit(Notice(step=0, text=text))

            foresight = Foresight(self, device, precision, say=say)

            def load(*, weights: bool = True) -> Prepared:
                with typed_failures("load"), quiet_torchao():
                    ahead = foresight if weights else None
                    return guard.attempt(
                        "load",
                        lambda: prepare(self, precision, backoff=Backoff(), say=say, weights=weights, foresight=ahead),
                    )

            say(f"device {device} ({device_reason}), computing in {str(precision.compute)[6:]} ({precision.reason})")
            prepared = processes.together(lambda: load(weights=processes.loads_weights))
            prepared.notices[:0] = self._granted.warnings
            if self.on_loaded is not None:
                with typed_failures("load"):
                    self.on_loaded(prepared.model)
            self._check_remedies(prepared.model)
            if self._granted.trains_in_fp8:
                with typed_failures("load"), quiet_torchao():
                    converted.enter_context(frozen_layers_in_fp8(prepared.model, prepared.notices.append))
            rows = self._settled_rows(foresight, guard, prepared, processes)
            loop = self._loop(processes.world_size)
            running = loop(self, prepared, processes, guard, micro_batch_size=rows, sampler=sampler, began_s=began_s)
            result: TrainResult | None = None
            try:
                result = running.run()
            finally:
                if processes.rank == 0:
                    foresight.record(running.run_id, result)
            return result

    def compute_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean loss over the targets of a (micro-)batch on the device; to be overridden for another loss.

        ``batch``: ``input_ids``, ``attention_mask``, ``labels``, int64 of shape (rows, tokens). Returns a 0-d
        tensor, a mean over the labels from the second column on that are not -100: that is how its parts are
        weighed.
        """
        if self.loss_chunk_tokens is not None:
            return chunked_loss(model, batch, chunk_tokens=self.loss_chunk_tokens)
        loss: Tensor = model(**batch, use_cache=False).loss
        return loss

    def _loop(self, world_size: int) -> type[TrainingLoop]:
        if self.full_ft_offload:
            return OffloadedLoop
        return TrainingLoop if world_size == 1 else DataParallelLoop

    def _settled_rows(self, foresight: Foresight, guard: Guard, prepared: Prepared, processes: Processes) -> int:
        """Rows of a micro-batch, and what is predicted to fit of them: the same on every rank, as rank 0 finds it."""

        def settle() -> tuple[int, int | None]:
            return foresight.settle(guard, prepared), guard.micro_batch_size

        rows, fitting = processes.ranks.lead(settle)
        if processes.rank and fitting is not None:
            guard.foretell(fitting)
        return rows

    def _remedies(self, model: Callable[[], Any]) -> dict[Remedy, Callable[[], None]]:
        """What the guard may do when splitting has come to its end. ``model`` is called only then."""
        if not self.gradient_checkpointing_if_needed or self.gradient_checkpointing:
            return {}
        return {"enable_checkpointing": lambda: enable_checkpointing(model())}

    def _check_remedies(self, model: Any) -> None:
        if self.gradient_checkpointing_if_needed and not getattr(model, "supports_gradient_checkpointing", False):
            expected = f"false: {type(model).__name__} has no gradient checkpointing"
            raise InvalidSettingError(setting="gradient_checkpointing_if_needed", value=True, expected=expected)

    def _guard(self, sampler: Sampler | None, rank: int, remedies: dict[Remedy, Callable[[], None]]) -> Guard:
        observers = (print_event,) if self.observers is None else self.observers
        if self.observers is None and rank:
            observers = ()  # what rank 0 tells a person need not be told again
        return Guard(
            self.output_dir,
            oom_recovery=self.oom_recovery,
            max_shrinks=self.max_shrinks,
            finite=FinitePolicy(self.max_skipped_in_a_row, action=self.finite_action),
            spikes=SpikePolicy(action=self.spike_action),
            checkpoint_every_steps=self.checkpoint_every_steps,
            checkpoint_every_s=self.checkpoint_every_s,
            keep_last=self.keep_last,
            resume=self.resume,
            accept_changes=self.accept_changes,
            # A frozen base model is loaded again; only adapters are worth a checkpoint's space.
            save_frozen=self.mode == "full",
            observers=observers,
            remedies=remedies,
            sampler=sampler,
            command=self.command,
            config=self.config,
        )

    def _check_model(self) -> None:
        model = self.model
        if isinstance(model, nn.Module):
            if self.tokenizer is None:
                expected = "the tokenizer of the model that is given as an object"
                raise InvalidSettingError(setting="tokenizer", value=None, expected=expected)
        elif not (isinstance(model, str | Path | Mapping) and model and str(model).strip()):
            expected = "a directory, a Hub name, a mapping with model_type, or a model object"
            raise InvalidSettingError(setting="model", value=repr(model), expected=expected)

    def _check_output(self) -> None:
        """Refuses an ``output_dir`` in which saving would write over what the run did not make."""
        output_dir = Path(self.output_dir)
        if isinstance(self.model, str | Path):
            source = Path(self.model).expanduser()
            if source.is_dir() and source.resolve().is_relative_to(output_dir.resolve()):
                expected = f"a directory that does not hold the model it starts from ({source})"
                raise InvalidSettingError(setting="output_dir", value=str(self.output_dir), expected=expected)
        for name in (MODEL_FOLDER, TOKENIZER_FOLDER):
            require_ours(output_dir / name)


def _check_source(name: str, source: Any, *, optional: bool) -> None:
    if source is None and optional:
        return
    rows_like = hasattr(source, "__len__") and hasattr(source, "__getitem__")
    if isinstance(source, Mapping | bytes) or not (isinstance(source, str | Path) or rows_like) or source == "":
        expected = 'a path, "python-docstrings", or rows with a length and an index'
        raise InvalidSettingError(setting=name, value=type(source).__name__, expected=expected)
