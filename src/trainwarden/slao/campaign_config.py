"""The configuration of a campaign: a training configuration, the tasks that it is made for, and how they are merged.

Each task is an ordinary training: the sections ``model``, ``data``, ``trainer`` and ``guard`` of the file hold for
all of them, and ``tasks.NAME`` says what is different for one.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pydantic

from trainwarden.errors import ConfigurationError, InvalidSettingError
from trainwarden.train.config import ResolvedConfig, Setting, TrainConfig, read_settings, resolve

from .policy import MergePolicy, Mode, Schedule

OnFailure = Literal["stop", "continue"]

TASKS = "tasks"
"""The section of the tasks, and the folder of their runs."""

_OF_A_TASK = ("data", "trainer", "guard")
_OWN = ("merge", "gate", "on_failure")
_NO_MATTER = frozenset({"log_every_steps", "eval_every_steps", "device", "backend", "device_memory_bytes"})
"""Settings that leave the result of a training as it is."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


class _Section(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True)


class MergeSection(_Section):
    """How adapters are merged: see `MergePolicy`. ``keep_last`` snapshots can be rolled back to."""

    mode: Mode = "slao"
    schedule: Schedule = "inverse_sqrt"
    constant: float = 1.0
    density: float = 0.5
    seed: int = 0
    max_norm_growth: float = 10.0
    keep_last: int = 5


class GateSection(_Section):
    """Which merges may stand.

    ``max_forgetting_nats``: how far the held-out loss of an earlier task (nats a token) may be above the lowest that
    it had since it was merged; None lets every merge stand.
    """

    max_forgetting_nats: float | None = None


class _OwnSettings(_Section):
    on_failure: OnFailure = "stop"
    merge: MergeSection = MergeSection()
    gate: GateSection = GateSection()


@dataclass(frozen=True)
class CampaignTask:
    """One training of a campaign. The output directory of ``config`` is that of its first attempt."""

    name: str
    config: TrainConfig

    @property
    def has_held_out_rows(self) -> bool:
        """Whether its loss can be computed on rows that it was not trained on."""
        return self.config.data.eval is not None or self.config.data.eval_rows > 0

    @property
    def settings(self) -> dict[str, Any]:
        """What the result of its training depends on, by dotted key."""
        sections = self.config.to_dict()
        return {
            f"{section}.{key}": value
            for section in ("model", "data", "trainer")
            for key, value in sections[section].items()
            if key not in _NO_MATTER
        }


@dataclass(frozen=True)
class CampaignConfig:
    """Everything that ``warden slao run`` reads.

    Attributes:
        output_dir: of the campaign; absolute.
        tasks: in the order in which they are trained and merged.
        merge: how.
        max_forgetting_nats: see `GateSection`.
        on_failure: of a task: ``stop`` ends the campaign with its error; ``continue`` goes on with the next one.
        rows: ``(dotted key, value, where from)`` of every setting.
    """

    output_dir: Path
    tasks: tuple[CampaignTask, ...]
    merge: MergeSection
    max_forgetting_nats: float | None
    on_failure: OnFailure
    rows: tuple[tuple[str, Any, str], ...]

    @property
    def policy(self) -> MergePolicy:
        """The merge policy."""
        return MergePolicy(**self.merge.model_dump(exclude={"keep_last"}))

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable: values and provenance of all settings, by dotted key."""
        return {
            "config": {key: value for key, value, _ in self.rows},
            "provenance": {key: source for key, _, source in self.rows},
        }


def load_campaign(
    path: str | Path, overrides: Sequence[str] = (), environ: Mapping[str, str] | None = None
) -> CampaignConfig:
    """The campaign in a YAML file, with the environment and then ``overrides`` laid over it.

    Arguments and errors are those of `trainwarden.train.config.load_config`; a setting of a task is
    ``tasks.NAME.trainer.max_steps``, and goes before ``trainer.max_steps``, whatever it was given by.
    """
    settings, place = read_settings(path, overrides, environ), str(path)
    own = {key: setting for key, setting in settings.items() if key.partition(".")[0] in _OWN}
    of_tasks = {key: setting for key, setting in settings.items() if key.partition(".")[0] == TASKS}
    shared = {key: setting for key, setting in settings.items() if key not in own and key not in of_tasks}
    _require_known(shared)
    if "output_dir" not in shared:
        raise ConfigurationError(place=place, problem="output_dir is missing")
    chosen = _own_settings(own, place)
    tasks = _by_task(of_tasks, place)
    resolved = {name: _resolved(name, shared, over, place) for name, over in tasks.items()}
    config = CampaignConfig(
        output_dir=Path(next(iter(resolved.values())).config.output_dir).parents[1],
        tasks=tuple(CampaignTask(name, one.config) for name, one in resolved.items()),
        merge=chosen.merge,
        max_forgetting_nats=chosen.gate.max_forgetting_nats,
        on_failure=chosen.on_failure,
        rows=tuple(_rows(chosen, own, shared["output_dir"], tasks, resolved)),
    )
    _check(config)
    return config


def _require_known(shared: Mapping[str, Setting]) -> None:
    known = [*TrainConfig.model_fields, TASKS, *_OWN]
    for key, setting in shared.items():
        top = key.partition(".")[0]
        if top not in known:
            close = difflib.get_close_matches(top, known, n=1, cutoff=0.6)
            hint = f"did you mean {close[0]}?" if close else f"known here are {', '.join(sorted(known))}"
            raise ConfigurationError(place=setting.source, problem=f"unknown key {key!r}; {hint}")


def _own_settings(settings: Mapping[str, Setting], place: str) -> _OwnSettings:
    tree: dict[str, Any] = {}
    for key, setting in settings.items():
        section, _, name = key.partition(".")
        if name:
            branch = tree.setdefault(section, {})
            if isinstance(branch, dict):
                branch[name] = setting.value
        elif not (setting.value in (None, {}) and section != "on_failure"):  # a section with nothing in it
            tree[section] = setting.value
    try:
        chosen = _OwnSettings.model_validate(tree)
    except pydantic.ValidationError as error:
        fault = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in fault["loc"])
        source = next((s.source for k, s in settings.items() if k == key or k.startswith(f"{key}.")), place)
        if fault["type"] == "extra_forbidden":
            raise ConfigurationError(place=source, problem=f"unknown key {key!r}{_nearest(key)}") from None
        raise _invalid(key, fault["input"], _expected(fault), source) from None
    _check_numbers(chosen, settings, place)
    return chosen


def _check_numbers(chosen: _OwnSettings, settings: Mapping[str, Setting], place: str) -> None:
    def source(key: str) -> str:
        return settings[key].source if key in settings else place

    try:
        MergePolicy(**chosen.merge.model_dump(exclude={"keep_last"}))
    except InvalidSettingError as error:
        key = f"merge.{error.details['setting']}"
        raise _invalid(key, error.details["value"], str(error.details["expected"]), source(key)) from None
    if chosen.merge.keep_last < 1:
        raise _invalid("merge.keep_last", chosen.merge.keep_last, "at least 1", source("merge.keep_last"))
    limit = chosen.gate.max_forgetting_nats
    if limit is not None and not limit >= 0:
        key = "gate.max_forgetting_nats"
        raise _invalid(key, str(limit), "a number from 0, or null for no gate", source(key))


def _by_task(settings: Mapping[str, Setting], place: str) -> dict[str, dict[str, Setting]]:
    """What each task lays over the shared settings, tasks in their order."""
    tasks: dict[str, dict[str, Setting]] = {}
    for key, setting in settings.items():
        _, _, rest = key.partition(".")
        name, _, inner = rest.partition(".")
        if not rest and setting.value:
            expected = "names of tasks, each with its settings below it"
            raise _invalid(TASKS, json.dumps(setting.value, default=str), expected, setting.source)
        if not name:
            continue
        if not _NAME.fullmatch(name):
            problem = f"{name!r} is no name for a task: letters, digits, - and _ make one"
            raise ConfigurationError(place=setting.source, problem=problem)
        if not inner and setting.value is None:  # `-o tasks.law=null` leaves a task out
            continue
        over = tasks.setdefault(name, {})
        if not inner and setting.value == {}:
            continue
        if inner.partition(".")[0] not in _OF_A_TASK:
            what = f"tasks.{rest}: " if inner else f"tasks.{name} is no mapping: "
            problem = f"{what}a task has settings in {', '.join(_OF_A_TASK)}; everything else is one for all tasks"
            raise ConfigurationError(place=setting.source, problem=problem)
        over[inner] = setting
    if not tasks:
        raise ConfigurationError(place=place, problem="tasks is missing: name at least one, with its data.train")
    return tasks


def _resolved(name: str, shared: Mapping[str, Setting], over: Mapping[str, Setting], place: str) -> ResolvedConfig:
    base = shared["output_dir"]
    if not isinstance(base.value, str) or not base.value:
        raise _invalid("output_dir", base.value, "a directory", base.source)
    directory = Setting(str(Path(base.value) / TASKS / name), base.source)
    return resolve(shared, place, {**over, "output_dir": directory})


def _check(config: CampaignConfig) -> None:
    """What a training may be and a campaign may not."""
    first = config.tasks[0].config
    if first.model.mode == "full":
        raise _invalid("model.mode", first.model.mode, "lora or qlora: what is merged are adapters")
    if first.model.config is not None:
        expected = "null, with model.name_or_path instead: all tasks start from the weights and tokenizer of one model"
        raise _invalid("model.config", "a new model", expected)
    for task in config.tasks:
        if task.config.guard.resume != "auto":
            expected = "auto: a campaign goes on where it was; give a new one another output_dir"
            raise _invalid("guard.resume", task.config.guard.resume, expected)
    if config.max_forgetting_nats is not None and not any(task.has_held_out_rows for task in config.tasks):
        expected = "null, or a data set with held-out rows (data.eval_rows or data.eval) to tell forgetting by"
        raise _invalid("gate.max_forgetting_nats", config.max_forgetting_nats, expected)


def _rows(
    chosen: _OwnSettings,
    own: Mapping[str, Setting],
    output_dir: Setting,
    tasks: Mapping[str, Mapping[str, Setting]],
    resolved: Mapping[str, ResolvedConfig],
) -> Iterator[tuple[str, Any, str]]:
    """Every setting once: those of the campaign, those that all tasks share, those of each task."""
    yield "output_dir", output_dir.value, output_dir.source
    for section, values in chosen.model_dump(mode="json").items():
        for name, value in values.items() if isinstance(values, dict) else [("", values)]:
            key = f"{section}.{name}" if name else section
            yield key, value, own[key].source if key in own else "default"
    different = {key for over in tasks.values() for key in over} | {"output_dir"}

    def differs(key: str) -> bool:
        return any(key == other or key.startswith(f"{other}.") or other.startswith(f"{key}.") for other in different)

    yield from (row for row in next(iter(resolved.values())).rows() if not differs(row[0]))
    for name, one in resolved.items():
        for key, value, source in one.rows():
            if differs(key):
                yield f"{TASKS}.{name}.{key}", value, source


def _nearest(key: str) -> str:
    known = {"on_failure": None}
    for section, kind in (("merge", MergeSection), ("gate", GateSection)):
        known |= dict.fromkeys(f"{section}.{name}" for name in kind.model_fields)
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def _expected(fault: Any) -> str:
    words = {"float_type": "a number", "int_type": "a whole number", "model_type": "keys with values"}
    return words.get(fault["type"]) or str(fault.get("ctx", {}).get("expected") or fault["msg"])


def _invalid(key: str, value: object, expected: str, source: str | None = None) -> InvalidSettingError:
    return InvalidSettingError(setting=key, value=value, expected=expected + (f" [{source}]" if source else ""))
