"""`Campaign`: train on one data set after the other, merge each adapter into one. Kill it anywhere and start again."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from trainwarden.checkpoint.durable import save_errors
from trainwarden.errors import EvalRegressionError, InvalidSettingError, ResumeMismatchError, SLAOError, WardenError
from trainwarden.events import Notice, Observer
from trainwarden.runs.lock import DirectoryLock
from trainwarden.train.loop import print_event
from trainwarden.train.preparation import MODEL_FOLDER
from trainwarden.train.publish import read_marker
from trainwarden.train.run import trainer_from_config

from . import campaign_plan as plan
from .adapter import WEIGHTS_FILE
from .campaign_config import TASKS, CampaignConfig
from .campaign_evaluation import held_out_losses
from .campaign_plan import Attempt, Evaluation, Facts, Failure, Finish, Merge, Stop, Train
from .campaign_record import CampaignLog, CampaignRecord
from .campaign_result import CampaignResult, TaskOutcome, conclude, writable
from .campaign_stop import StopRequests
from .records import Record, Snapshot
from .store import LOCK_FILE, SlaoStore
from .transaction import Proposal, Start, next_start, propose, record_lineage

MERGED_FOLDER = "merged"
RECORD_FOLDER = "record"


class Campaign:
    """One campaign in one directory.

    ::

        result = Campaign(load_campaign("campaign.yaml")).run()
    """

    def __init__(
        self, config: CampaignConfig, *, observers: Sequence[Observer] | None = None, command: str | None = None
    ) -> None:
        """Touches nothing.

        Args:
            observers: of all trainings, and told what happens between them; None prints to stderr.
            command: the command line that starts the campaign again, for errors to name.
        """
        self._config = config
        self._observers = (print_event,) if observers is None else tuple(observers)
        self._command = command
        self._tasks = {task.name: task for task in config.tasks}
        self._settings = {task.name: task.settings for task in config.tasks}
        directory = config.output_dir
        rejected = self._on_rejected
        self._store = SlaoStore(directory / MERGED_FOLDER, keep_last=config.merge.keep_last, on_rejected=rejected)
        self._log = CampaignLog(directory / RECORD_FOLDER, on_rejected=rejected)
        self._record = CampaignRecord()
        self._failed: dict[str, WardenError] = {}
        self._stop = StopRequests()

    def run(self) -> CampaignResult:
        """Do what is left to do. All of it is kept: a later call, in this process or another, goes on from it.

        Tasks that failed in an earlier call are tried again.

        Raises:
            PartialBatchError: with ``on_failure: continue``, some tasks failed and others are merged.
            WardenError: with ``stop``, the failure of the first task that failed; with ``continue``, that of the first
                one when all failed; and in any case at once what lies in no task, such as a full disk.
            EvalRegressionError: such a failure: the gate held a merge back.
            TrainingAbortedError: after SIGINT or SIGTERM.
            ResumeMismatchError: what is done would come out differently with the present settings.
            RunLockedError: another process runs this campaign.
            InvalidSettingError: several ranks were started.
        """
        self._failed.clear()
        _require_one_process()
        try:
            with self._locked(), self._stop.listening():
                self._record = self._log.read()
                self._refuse_changes()
                self._store.export()  # when a kill came between commit and export
                while not isinstance(action := self._next(), Finish):
                    self._stop.require_none()
                    self._perform(action)
            return conclude(self.result(), self._failed)
        except WardenError as error:
            error.add_context(resume_command=self._command)
            raise

    def result(self) -> CampaignResult:
        """How far it has come, by what is on disk. Raises SLAOCheckpointError."""
        self._record = self._log.read()
        snapshot = self._store.current()
        records = {record.source: record for record in (snapshot.history if snapshot else ()) if _adds(record)}
        merged = plan.merged_sources(snapshot.history) if snapshot else ()
        return CampaignResult(
            output_dir=str(self._config.output_dir),
            merged_path=str(self._store.path),
            tasks=tuple(self._outcome(name, records[name] if name in merged else None) for name in self._tasks),
        )

    # -- what is next --------------------------------------------------------------------------------------------

    def _next(self) -> plan.Action:
        return plan.next_action(self._settings, self._facts(), self._config.on_failure)

    def _facts(self) -> Facts:
        snapshot = self._store.current()
        return Facts(
            attempts=self._record.attempts,
            merged=frozenset(plan.merged_sources(snapshot.history) if snapshot else ()),
            trained=frozenset(task for task, one in self._record.attempts.items() if self._is_trained(task, one)),
            head=_digest(snapshot),
            failed=frozenset(self._failed),
        )

    def _is_trained(self, task: str, attempt: Attempt) -> bool:
        folder = self._directory(task, attempt.number) / MODEL_FOLDER
        # Published at the end of a training, whole or not at all.
        return WEIGHTS_FILE in (read_marker(folder) or {"files": {}})["files"] and (folder / WEIGHTS_FILE).is_file()

    def _refuse_changes(self) -> None:
        accepted = {task.name: task.config.guard.accept_changes for task in self._config.tasks}
        facts = self._facts()
        found = plan.mismatches(self._settings, facts, accepted)
        if facts.merged and self._record.merge is not None:
            every = {name for names in accepted.values() for name in names}
            merge = plan.differences(self._record.merge, self._merge_settings())
            found |= {f"merge.{key}": values for key, values in merge.items() if key not in every}
        if found:
            raise ResumeMismatchError(differences=found)

    def _merge_settings(self) -> dict[str, Any]:
        return self._config.merge.model_dump(mode="json", exclude={"keep_last"})

    # -- doing it ------------------------------------------------------------------------------------------------

    def _perform(self, action: Train | Merge | Stop) -> None:
        if isinstance(action, Stop):
            raise self._failed[action.task]
        try:
            if isinstance(action, Train):
                self._train(action.task, action.attempt)
            else:
                self._merge(action.task)
        except WardenError as error:
            if not plan.lies_in_task(error):
                raise
            self._failed[action.task] = error
            self._note(action.task, failure=Failure(error.code, error.message, error.exit_code))
            self._say(f"task {action.task} failed: {error.message} ({error.code})")

    def _train(self, task: str, number: int) -> None:
        attempt = self._record.attempts.get(task)
        if attempt is None or attempt.number != number:
            attempt = Attempt(number, _digest(self._store.current()), self._settings[task])
        self._put(task, replace(attempt, failure=None))
        count = f"{list(self._tasks).index(task) + 1} of {len(self._tasks)}"
        again = f", attempt {number}" if number > 1 else ""
        self._say(f"task {task} ({count}{again}) trains in {self._directory(task, number)}")
        config = self._tasks[task].config.model_copy(update={"output_dir": str(self._directory(task, number))})
        trainer_from_config(
            config,
            observers=(*self._observers, self._stop.hand_over),
            config=None,  # the campaign's command continues it, not `warden resume`
            command=None if self._command is None else shlex.split(self._command),
            on_loaded=partial(self._place_start, attempt.started_from),
        ).train()
        self._note(task, settings=self._settings[task])

    def _place_start(self, started_from: str | None, model: Any) -> None:
        self._stop.require_none()
        start = next_start(self._store, model)
        if (start.started_from if start else None) != started_from:
            raise SLAOError(problem="the accumulator was changed while this task was being prepared")

    def _merge(self, task: str) -> None:
        attempt, snapshot = self._record.attempts[task], self._store.current()
        folder = self._directory(task, attempt.number) / MODEL_FOLDER
        if attempt.started_from is not None and snapshot is not None:
            record_lineage(folder, Start(snapshot.index + 1, attempt.started_from))
        proposal = propose(self._store, folder, self._config.policy, source=task)
        for note in proposal.notes:
            self._say(note)
        self._gate(task, self._evaluated(task, attempt, proposal))
        if self._record.merge != self._merge_settings():
            self._record = replace(self._record, merge=self._merge_settings())
            self._log.write(self._record)
        committed = self._store.commit(proposal)
        self._say(f"task {task} is merged: {self._store.path} holds {committed.index}, snapshot {committed.sequence}")

    def _evaluated(self, task: str, attempt: Attempt, proposal: Proposal) -> Evaluation:
        """The losses of a proposal, computed once: they are on disk before the commit."""
        known = attempt.evaluation
        if known is not None and (known.parent, known.digest) == (proposal.parent, proposal.record.digest):
            return known
        names = [*self._merged(), task]
        chosen = [self._tasks[name] for name in names if name in self._tasks]
        losses = held_out_losses(chosen, proposal.preview().exported(), self._say)
        found = Evaluation(proposal.parent, proposal.record.digest, losses)
        self._note(task, evaluation=found)
        return found

    def _gate(self, task: str, evaluation: Evaluation) -> None:
        earlier = [self._record.attempts[name].evaluation for name in self._merged() if name in self._record.attempts]
        worst = plan.forgetting([one.losses for one in earlier if one is not None], evaluation.losses, task)
        limit = self._config.max_forgetting_nats
        if worst is not None and limit is not None and plan.regressed(worst, limit):
            raise EvalRegressionError(
                task=task,
                regressed=worst.task,
                rise_nats=round(worst.rise_nats, 4),
                limit_nats=limit,
                losses=writable(evaluation.losses),
            )

    # -- the end -------------------------------------------------------------------------------------------------

    def _outcome(self, name: str, record: Record | None) -> TaskOutcome:
        attempt = self._record.attempts.get(name)
        failure = attempt.failure if attempt and record is None else None
        return TaskOutcome(
            name=name,
            state="merged" if record else "failed" if failure else "waiting",
            attempt=attempt.number if attempt else 0,
            run_dir=str(self._directory(name, attempt.number)) if attempt else None,
            snapshot=record.sequence if record else None,
            weight=record.weight if record else None,
            losses=attempt.evaluation.losses if attempt and attempt.evaluation else None,
            code=failure.code if failure else None,
            message=failure.message if failure else None,
        )

    # -- small things --------------------------------------------------------------------------------------------

    def _merged(self) -> tuple[str, ...]:
        snapshot = self._store.current()
        return plan.merged_sources(snapshot.history) if snapshot else ()

    def _directory(self, task: str, number: int) -> Path:
        first = (
            Path(self._tasks[task].config.output_dir) if task in self._tasks else self._config.output_dir / TASKS / task
        )
        return first if number == 1 else first.with_name(f"{first.name}.{number}")

    def _note(self, task: str, **changes: Any) -> None:
        self._put(task, replace(self._record.attempts[task], **changes))

    def _put(self, task: str, attempt: Attempt) -> None:
        if self._record.attempts.get(task) != attempt:
            self._record = replace(self._record, attempts={**self._record.attempts, task: attempt})
            self._log.write(self._record)

    def _say(self, text: str) -> None:
        for observer in self._observers:
            observer(Notice(step=0, text=text))

    def _on_rejected(self, path: Path, reason: str) -> None:
        self._say(f"{path} is damaged and was passed over: {reason}")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        directory = self._config.output_dir
        with save_errors(directory / LOCK_FILE, needed_bytes=0):
            directory.mkdir(parents=True, exist_ok=True)
            lock = DirectoryLock(directory / LOCK_FILE)
        try:
            yield
        finally:
            lock.close()


def run_campaign(
    config: CampaignConfig, *, observers: Sequence[Observer] | None = None, command: str | None = None
) -> CampaignResult:
    """`Campaign(config).run()`: takes and raises what they do."""
    return Campaign(config, observers=observers, command=command).run()


def _require_one_process() -> None:
    world_size = os.environ.get("WORLD_SIZE", "1")
    if world_size != "1":
        raise InvalidSettingError(setting="WORLD_SIZE", value=world_size, expected="1: a campaign is one process")


def _adds(record: Record) -> bool:
    return record.action != "rollback"


def _digest(snapshot: Snapshot | None) -> str | None:
    return None if snapshot is None else snapshot.digest
