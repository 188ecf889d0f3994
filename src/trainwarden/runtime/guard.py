"""`Guard`: composes recovery, finite checks, checkpoints, data position and stop requests around a training loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from trainwarden.device import Sampler
from trainwarden.errors import GPUMemoryError, InvalidSettingError, RollbackNeededError, install_excepthook
from trainwarden.events import EvaluationShrunk, Event, Notice, Observer, announce
from trainwarden.guards.collapse import CollapsePolicy
from trainwarden.guards.data import DataPolicy
from trainwarden.guards.finite import FinitePolicy
from trainwarden.guards.hardware import HardwarePolicies
from trainwarden.guards.ladder import REMEDIES, Remedy
from trainwarden.guards.oom import OOMPolicy
from trainwarden.guards.rollback import RollbackPolicy
from trainwarden.guards.spikes import SpikePolicy
from trainwarden.runtime.backward import UNKNOWN, ComputeLoss
from trainwarden.runtime.clipping import Clipping
from trainwarden.runtime.data_errors import DataErrors
from trainwarden.runtime.evaluation import Evaluate, Evaluation
from trainwarden.runtime.journal import open_journal
from trainwarden.runtime.keeper import CheckpointPolicy
from trainwarden.runtime.numbers import NumberPolicies
from trainwarden.runtime.phases import SWITCHED_OFF, attempt, clip_grad_norm
from trainwarden.runtime.policies import Policies, Progress, Resume
from trainwarden.runtime.ranks import DEFAULT_DEADLINE_S, current_ranks
from trainwarden.runtime.representation import Representation, Source
from trainwarden.runtime.session import Session
from trainwarden.runtime.sharded import is_sharded
from trainwarden.runtime.split import Split, Weight
from trainwarden.runtime.watched import Watched

DEFAULT_HARDWARE = HardwarePolicies()
DEFAULT_DATA = DataPolicy()
DEFAULT_ROLLBACK = RollbackPolicy()
DEFAULT_COLLAPSE = CollapsePolicy()

T = TypeVar("T")


class Guard:
    """Guards one run of any PyTorch training loop, in one process or in every rank of a distributed run.

    ::

        guard = Guard("runs/demo")
        with guard.watch(model=model, optimizer=optimizer, scheduler=scheduler):
            for batch in guard.batches(loader, max_steps=200):
                loss = guard.backward(compute_loss, batch)
                optimizer.step(); scheduler.step(); optimizer.zero_grad()

    Args:
        run_dir: directory of the run; it may hold other files, which are never touched.
        oom_recovery: finish a step that runs out of memory with smaller micro-batches.
        max_shrinks: consecutive shrinks of one step before `GPUMemoryError`.
        max_skipped_in_a_row: steps in a row skipped for a non-finite loss or gradient before `NaNLossError`.
        finite: everything about such steps, in place of ``max_skipped_in_a_row``.
        spikes: what is done about spikes of the loss and the gradient norm; ``None`` looks for none.
        rollback: how the run goes back where ``finite`` or ``spikes`` have the action ``rollback``.
        checkpoint_every_steps: steps between checkpoints; ``None``: by time alone.
        checkpoint_every_s: seconds between checkpoints; ``None``: by steps alone.
        keep_last: verified checkpoints that are kept.
        resume: ``auto`` continues when ``run_dir`` holds a checkpoint, ``never`` refuses such a directory, ``must``
            refuses one without.
        accept_changes: names of differences to the saved run that are meant (``"max_steps"``, ``"optimizer"``).
        split: ``split(batch, max_rows)`` → micro-batches of at most ``max_rows`` rows, in order; for batches that are
            not tensors, tuples, mappings or dataclasses of tensors with one common first dimension.
        split_check: ``verify`` compares the loss of a part with its weighted halves before the first split of a run;
            ``trust`` declares that the loss is a weighted mean over independent rows.
        save_frozen: whether checkpoints hold parameters that need no gradient.
        hardware: what is done about heat, memory pressure, damage and silence of the GPUs in use; ``None`` leaves
            them alone. A hot device pauses the run at a step boundary, after a checkpoint.
        remedies: what may be done when a batch does not fit however it is split, each called once, in this order:
            ``enable_checkpointing`` (of activations), ``offload_optimizer``. A run that needed one is resumed with it.
        data: how much of the data may be left out because it cannot be read, decoded or collated, and how long worker
            processes may be silent, before `DataLoaderError`; ``None`` lets every error through as it is.
        sampler: where device readings come from; by default NVML, when any parameter is on a GPU.
        observers: callables that take one `Event`; ``None``: notices and warnings as lines on stderr.
        command: command line that starts the run again; by default this process's own.
        config: JSON-serialisable configuration from which ``warden resume`` can start the run again.
        rank_deadline_s: how long a rank of a distributed run is waited for before `RankLostError`.
        clock: monotonic seconds; tests replace it.

    Raises:
        InvalidSettingError: an argument is out of range.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        oom_recovery: bool = True,
        max_shrinks: int = 3,
        max_skipped_in_a_row: int = 5,
        finite: FinitePolicy | None = None,
        spikes: SpikePolicy | None = None,
        rollback: RollbackPolicy = DEFAULT_ROLLBACK,
        checkpoint_every_steps: int | None = None,
        checkpoint_every_s: float | None = 600.0,
        keep_last: int = 2,
        resume: Resume = "auto",
        accept_changes: Sequence[str] = (),
        split: Split | None = None,
        split_check: Literal["verify", "trust"] = "verify",
        save_frozen: bool = True,
        hardware: HardwarePolicies | None = DEFAULT_HARDWARE,
        remedies: Mapping[Remedy, Callable[[], None]] | None = None,
        data: DataPolicy | None = DEFAULT_DATA,
        sampler: Sampler | None = None,
        observers: Iterable[Observer] | None = None,
        command: Sequence[str] | None = None,
        config: Mapping[str, Any] | None = None,
        rank_deadline_s: float = DEFAULT_DEADLINE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        _check_count("max_shrinks", max_shrinks, 0)
        _check_count("max_skipped_in_a_row", max_skipped_in_a_row, 0)
        _check_count("keep_last", keep_last, 1)
        _check_choice("resume", resume, ("auto", "never", "must"))
        _check_choice("split_check", split_check, ("verify", "trust"))
        self.run_dir = Path(run_dir)
        self._policies = Policies(
            oom=OOMPolicy(bool(oom_recovery), max_shrinks),
            numbers=NumberPolicies(finite or FinitePolicy(max_skipped_in_a_row), spikes, rollback),
            checkpoint=CheckpointPolicy(checkpoint_every_steps, checkpoint_every_s, keep_last),
            resume=resume,
            accept_changes=tuple(accept_changes),
            split=split,
            verify_split=split_check == "verify",
            save_frozen=save_frozen,
            hardware=hardware,
            remedies=_checked_remedies(remedies or {}),
            data=data,
        )
        self._sampler = sampler
        self._progress = Progress()
        self._learned: dict[str, Any] | None = None
        self._observers = (announce,) if observers is None else tuple(observers)
        self._command = command
        self._config = config
        self._rank_deadline_s = rank_deadline_s
        self._clock = clock
        self._session: Session | None = None
        self._data: DataErrors | None = None
        self._representations: list[Representation] = []
        self._described: Mapping[str, Any] | None = None
        self._evaluation = Evaluation(
            recover=self._policies.oom.enabled,
            split=split,
            verify=self._policies.verify_split,
            on_shrink=self._say_evaluation_shrink,
        )

    # -- public state --------------------------------------------------------------------------------------------

    @property
    def steps_completed(self) -> int:
        """Optimizer steps done since the run began, skipped ones included."""
        return self._progress.steps_completed

    @property
    def steps_skipped(self) -> int:
        """Steps whose update was left out because a loss or gradient was not finite."""
        return self._progress.steps_skipped

    @property
    def data_skipped(self) -> int:
        """Samples, and whole batches, left out on this rank since the run began because they could not be loaded."""
        return self._data.count if self._data else 0

    @property
    def epoch(self) -> int:
        """Epoch of the batch in hand, from 0."""
        position = self._session.position if self._session else None
        return position.epoch if position else 0

    @property
    def micro_batch_size(self) -> int | None:
        """Rows of the largest micro-batch that is tried; ``None`` while whole batches fit."""
        return self._progress.plan.limit

    @property
    def shrinks(self) -> int:
        """How often a micro-batch was shrunk in the whole run."""
        return self._progress.plan.shrinks

    @property
    def newest_checkpoint(self) -> Path | None:
        """The newest checkpoint written or loaded, verified."""
        return self._progress.newest_checkpoint

    @property
    def stop_requested(self) -> str | None:
        """Name of the signal that has asked for a stop and is not served yet."""
        return self._session.stop.reason if self._session else None

    @property
    def run_id(self) -> str | None:
        """The run's identity; the same after a resume. ``None`` before ``watch``."""
        return self._session.journal.run_id if self._session else None

    # -- the three shapes ----------------------------------------------------------------------------------------

    @contextmanager
    def watch(
        self, *, model: Any, optimizer: Any, scheduler: Any = None, scaler: Any = None, **others: Any
    ) -> Iterator[Guard]:
        """The lifetime of a run: locks its directory, resumes it, hooks the optimizers, takes over SIGINT and SIGTERM.

        One or several (list, tuple, mapping) of each; ``others`` are checkpointed by name if they have ``state_dict``.
        On the way out hooks and signal handlers are removed, and what was trained since the last checkpoint is saved.

        Raises:
            RunLockedError, RunExistsError, CheckpointNotFoundError: the directory and ``resume`` do not go together.
            ResumeMismatchError: the code asks for something else than the saved run did.
            CheckpointError: checkpoints are there and none is valid.
        """
        if self._session is not None:
            raise InvalidSettingError(setting="watch", value="a second watch", expected="one watch at a time")
        install_excepthook()
        save_frozen = self._policies.save_frozen
        watched = Watched.collect(model, optimizer, scheduler, scaler, others, save_frozen=save_frozen)
        names = ", ".join(type(one).__name__ for one in watched.models.values())
        ranks = current_ranks(self._rank_deadline_s)
        if ranks.rank != 0:  # what rank 0 tells a person need not be told again
            self._observers = tuple(observer for observer in self._observers if observer is not announce)
        journal = open_journal(ranks, self.run_dir, self._command, self._config, model=names, notice=self._notice)
        self._session = session = Session(
            self._policies,
            self._progress,
            watched,
            journal,
            ranks,
            emit=self.emit,
            notice=self._notice,
            clock=self._clock,
            sampler=self._sampler,
            # Of no interest to `announce` nor to the event log, and not free.
            tell_steps=any(observer is not announce for observer in self._observers),
            representations=self._representations,
            fingerprint=self._described,
        )
        self._described = None
        self._data = session.data
        try:
            session.begin()
            if self._learned is not None:
                self._progress.plan.load_state_dict(self._learned)
                self._learned = None
            yield self
            session.end()
        except BaseException as error:
            lost = session.lost(error)
            if lost is not None:
                session.fail(lost)
                raise lost from error
            session.fail(error)
            if isinstance(error, RollbackNeededError):
                self._described = session.described  # the live learning rate has moved, which is no other run
            raise
        finally:
            self._session = None
            ranks.close()

    def go_back(self) -> None:
        """After a `watch` that failed: the next one, of the same objects, continues from the newest checkpoint.

        Whatever ``resume`` says; where there is none it begins, and the objects have to be what they were then. What
        was learned about memory is kept.
        """
        self._policies = replace(self._policies, resume="auto")
        self._learned = self._progress.plan.state_dict()
        self._progress = Progress()

    def foretell(self, rows: int) -> None:
        """Says, before `watch`, that micro-batches of at most ``rows`` rows are predicted to fit and larger ones not.

        A resumed run goes by what it has learned instead.
        """
        self._progress.plan.limit = rows

    def batches(self, loader: Iterable[Any], *, max_steps: int) -> Iterator[Any]:
        """Batches from ``loader``, over as many epochs as it takes until ``max_steps`` optimizer steps are completed.

        Between two batches lies the step boundary, where checkpoints are taken and stop requests are served.

        Raises:
            TrainingAbortedError: after SIGINT or SIGTERM, with a checkpoint of the last step.
            NaNLossError: too many steps, in a row or of the last ones, were skipped.
            LossSpikeError, CollapseDetectedError: a detector's policy says to end the run.
            StateNotFiniteError: weights or optimizer state are not finite, so that they cannot be saved.
            RollbackNeededError: the run goes back; entering ``watch`` again, here or in a new process, does it.
            DataLoaderError: too much of the data could not be read, or the loader cannot go on.
            ResumeMismatchError: loader or ``max_steps`` are not the saved run's.
        """
        session = self._watching("batches")
        _check_count("max_steps", max_steps, 1)
        position = session.enter_loader(loader, max_steps)
        if self.steps_completed >= max_steps:
            session.skip_loader(position, max_steps)
            return
        stream = iter(position)
        while self.steps_completed < max_steps:
            batch = session.next_batch(stream)
            yield batch
            session.close_batch()

    def backward(self, compute_loss: ComputeLoss, batch: Any, weight: Weight | None = None) -> torch.Tensor:
        """Forward and backward of one batch, retried in smaller micro-batches when memory runs out.

        Args:
            compute_loss: takes a (micro-)batch and returns its mean loss as a scalar tensor.
            batch: tensor, tuple, mapping or dataclass of tensors, or anything that ``split`` can cut.
            weight: what the mean of a micro-batch is taken over, for instance `trainwarden.target_tokens`; rows by
                default. Called before any forward pass, and only when the batch has to be split.

        Returns:
            The detached mean loss of the whole batch, on the device; not scaled by a ``GradScaler``.

        Raises:
            GPUMemoryError: it does not fit after ``max_shrinks`` shrinks, or not even one row does.
            SplitRefusedError: it has to be split, and splitting would train something else.
        """
        session = self._watching("backward")
        loss = session.backward.run(compute_loss, batch, weight)
        session.steps.note_backward(loss, session.backward.loss_of_ranks)
        return loss

    def attempt(self, phase: str, task: Callable[[], T]) -> T:
        """What ``task()`` returns; when memory runs out it is run once more after memory was released, and announced.

        For what has no batch to split, such as loading a model, inside ``watch`` or before it. The second attempt draws
        the same random numbers as the first; anything else that the task changes, it must be able to change twice.

        Args:
            phase: what the task does, for people: ``"load"``.
            task: takes nothing. What it makes must not outlive its failure (no half-built model in an outer variable).

        Raises:
            GPUMemoryError: memory ran out twice, or once with ``oom_recovery=False``.
        """
        refusal = None if self._policies.oom.enabled else SWITCHED_OFF
        return attempt(phase, task, refusal=refusal, say=self._notice)

    def clip_grad_norm_(
        self,
        parameters: torch.Tensor | Iterable[torch.Tensor],
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        foreach: bool | None = None,
    ) -> torch.Tensor:
        """`torch.nn.utils.clip_grad_norm_`, bit for bit, that survives running out of memory.

        With a ``GradScaler``, call ``scaler.unscale_(optimizer)`` first, as ever.

        Returns:
            The total norm before clipping, 0-d.

        Raises:
            GPUMemoryError: memory ran out again after it was released; the gradients are then of no use, the weights
                those of the last step. On one of several ranks of a DDP model it is raised on all of them together, at
                their next vote.
            RuntimeError: the norm is not finite, with ``error_if_nonfinite``.
        """
        try:
            return clip_grad_norm(
                parameters,
                max_norm,
                norm_type=norm_type,
                error_if_nonfinite=error_if_nonfinite,
                foreach=foreach,
                recover=self._policies.oom.enabled,
                say=self._notice,
                keep=self._session.steps.note_clipping if self._session else _forget,
            )
        except GPUMemoryError as error:
            if self._session is None or not self._session.leave_later(error):
                raise
            return UNKNOWN

    def watch_representation(
        self,
        name: str,
        source: Source,
        *,
        policy: CollapsePolicy = DEFAULT_COLLAPSE,
        reference: Source | None = None,
    ) -> None:
        """Measures now and then whether a representation degenerates, and ends the run if it does.

        Call it once, before ``watch`` or inside it. Nothing is done on the steps between two measurements.

        Args:
            name: for people, such as ``"encoder"``.
            source: a module, whose (first) output in the steps that are measured is taken, ``[…, dimensions]``, or a
                callable without arguments that returns ``[samples, dimensions]``, for instance of a held-out batch; it
                is called between two steps without gradients, and may draw random numbers. Give a callable for a
                compiled module.
            policy: how often, and what is a collapse.
            reference: where the targets come from that the representation predicts; its variance is compared with
                theirs then, instead of with its own first.

        Raises:
            InvalidSettingError: the name is taken, or, once measured, the output holds no samples.
        """
        if any(one.name == name for one in self._representations):
            raise InvalidSettingError(setting="watch_representation(name=)", value=name, expected="a free name")
        self._representations.append(Representation(name, source, policy, reference))

    def evaluate(self, fn: Evaluate, loader: Iterable[Any], weight: Weight | None = None) -> float | dict[str, float]:
        """The weighted mean of ``fn(batch)`` over all batches of ``loader``, in smaller parts when memory runs out.

        Runs under ``no_grad`` with the watched models in evaluation mode; afterwards every module is in the mode that
        it had, and every random stream where it was. The size that fits is remembered for the next evaluation and has
        nothing to do with training's. Each process evaluates what it is given: a mean over ranks is up to you.

        Args:
            fn: takes a (part of a) batch and returns a mean over its rows, or a mapping of names to means; scalar
                tensors, of which none is read from the device before the end, or numbers.
            loader: batches as for `backward`.
            weight: what a mean is taken over, as for `backward`; rows by default. A batch of weight 0 is left out.

        Returns:
            The mean, or a dictionary of means if ``fn`` returns a mapping; NaN if nothing was weighed.

        Raises:
            GPUMemoryError: not even one row fits.
            SplitRefusedError: a batch has to be split, and cannot be, or the parts would give another mean.
            InvalidSettingError: called outside ``watch``, or without ``weight`` for a batch without rows.
        """
        session = self._watching("evaluate")
        together = session.ranks.world_size > 1 and any(is_sharded(leaf) for leaf in session.watched.leaves())
        refusal = "a forward pass of sharded weights needs every rank at once" if together else None
        models = list(session.watched.models.values())
        return self._evaluation.run(fn, loader, weight, models, refusal=refusal)

    def emit(self, event: Event) -> None:
        """Tells all observers. One that fails is dropped with a notice: it must not end the run."""
        for observer in (*self._observers, *(self._session.journal.observers if self._session else ())):
            try:
                observer(event)
            except Exception as error:  # noqa: BLE001 - boundary: foreign code, called for information only
                self._observers = tuple(o for o in self._observers if o is not observer)
                self._notice(f"observer {observer!r} failed and is dropped: {error!r}")

    # -- helpers ---------------------------------------------------------------------------

    def _watching(self, what: str) -> Session:
        if self._session is None:
            expected = "inside 'with guard.watch(model=…, optimizer=…):'"
            raise InvalidSettingError(setting=f"guard.{what}", value="called outside watch", expected=expected)
        return self._session

    def _say_evaluation_shrink(self, from_size: int, to_size: int, reason: str) -> None:
        step = self.steps_completed
        self.emit(EvaluationShrunk(step=step, from_size=from_size, to_size=to_size, reason=reason))

    def _notice(self, text: str) -> None:
        self.emit(Notice(step=self.steps_completed, text=text))


def _forget(_clipping: Clipping) -> None:
    pass


def _check_count(setting: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InvalidSettingError(setting=setting, value=value, expected=f"a whole number of at least {least}")


def _checked_remedies(remedies: Mapping[Remedy, Callable[[], None]]) -> dict[Remedy, Callable[[], None]]:
    for name, remedy in remedies.items():
        if name not in REMEDIES or not callable(remedy):
            expected = f"callables without arguments, by the names {' and '.join(REMEDIES)}"
            raise InvalidSettingError(setting="remedies", value=name, expected=expected)
    return dict(remedies)


def _check_choice(setting: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise InvalidSettingError(setting=setting, value=value, expected=" or ".join(choices))
