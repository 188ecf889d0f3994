"""The configuration of a run: its model, and how file, environment and flags become one of it."""

from __future__ import annotations

import difflib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

from trainwarden.errors import (
    ConfigNotFoundError,
    ConfigurationError,
    InvalidSettingError,
    UsageError,
    WardenError,
)
from trainwarden.guards.finite import FiniteAction
from trainwarden.guards.spikes import SpikeAction
from trainwarden.train.docstrings import SOURCE_NAME
from trainwarden.train.settings import (
    RULES,
    BackendChoice,
    BatchSize,
    DeviceChoice,
    DtypeChoice,
    Mode,
    OptimizerChoice,
    Schedule,
    check_settings,
)
from trainwarden.train.yaml_leaves import YamlProblem, parse_leaves, parse_value

ENVIRONMENT_PREFIX = "WARDEN_"
_NESTING = "__"
DEFAULT = "default"
_EXPECTED = {
    "string_type": "text",
    "string_too_short": "text that is not empty",
    "dict_type": "keys with values",
    "model_type": "keys with values",
}
"""What pydantic expects, by the type of its complaint, where no rule of ours says it."""


def _by_rule(value: Any, info: pydantic.ValidationInfo) -> Any:
    """The rule that `Trainer` applies to the setting of this name, in its words."""
    rule = RULES.get(info.field_name or "")
    if rule is not None and not rule.accepts(value):
        raise ValueError(rule.expected)
    return value


class _Section(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())

    # Before pydantic's own check of the type, so that every complaint says all that is expected.
    _rules = pydantic.field_validator("*", mode="before")(_by_rule)


class ModelSection(_Section):
    """Which model is trained, and which part of it."""

    name_or_path: Annotated[str, pydantic.Field(min_length=1)] | None = None
    """A local Hugging Face checkpoint directory, or a name on the Hub."""
    config: dict[str, Any] | None = None
    """A new, small model instead: ``model_type`` and what its configuration class takes."""
    mode: Mode = "lora"
    lora_rank: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    lora_target_modules: str | list[str] = "all-linear"
    dtype: DtypeChoice = "auto"

    @pydantic.model_validator(mode="after")
    def _one_source(self) -> ModelSection:
        if (self.name_or_path is None) == (self.config is None):
            raise ValueError("exactly one of name_or_path and config; the other null")
        return self


class DataSection(_Section):
    """What it is trained on."""

    train: Annotated[str, pydantic.Field(min_length=1)]
    """A JSONL file, or ``python-docstrings``: instruction pairs from the docstrings of the running Python."""
    eval: Annotated[str, pydantic.Field(min_length=1)] | None = None
    eval_rows: int = 0
    max_length: int = 512
    limit: int | None = None


class TrainerSection(_Section):
    """How it is trained. ``max_steps`` counts optimizer steps."""

    max_steps: int
    learning_rate: float = 2e-4
    batch_size: BatchSize = 8
    grad_accum_steps: int = 1
    warmup_steps: int = 0
    schedule: Schedule = "cosine"
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0
    optimizer: OptimizerChoice = "adamw"
    seed: int = 0
    log_every_steps: int = 10
    eval_every_steps: int = 0
    device: DeviceChoice = "auto"
    backend: BackendChoice = "auto"
    fp8: bool = False
    full_ft_offload: bool = False
    full_ft_ceiling_billions: float | None = None
    gradient_checkpointing: bool = False
    gradient_checkpointing_if_needed: bool = False
    loss_chunk_tokens: int | None = None
    device_memory_bytes: int | None = None


class GuardSection(_Section):
    """What guards it."""

    oom_recovery: bool = True
    max_shrinks: int = 3
    max_skipped_in_a_row: int = 5
    finite_action: FiniteAction = "skip"
    spike_action: SpikeAction = "announce"
    checkpoint_every_steps: int | None = None
    checkpoint_every_s: float | None = 600.0
    keep_last: int = 2
    resume: Literal["auto", "never", "must"] = "auto"
    accept_changes: list[str] = []
    waive: list[str] = []


class TrainConfig(_Section):
    """Everything that ``warden train`` reads."""

    output_dir: str
    model: ModelSection
    data: DataSection
    trainer: TrainerSection
    guard: GuardSection = GuardSection()

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable; `from_dict` makes the same configuration of it."""
        return self.model_dump(mode="json")

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any], *, place: str, **changes: Any) -> TrainConfig:
        """A configuration that was stored in ``place`` (a ``run.json``).

        Args:
            changes: settings that replace stored ones, by dotted key with ``__`` for the dots
                (``guard__resume="must"``).

        Raises:
            ConfigurationError, InvalidSettingError: it is not one, or not one of this version.
        """
        leaves = {key: Setting(value, place) for key, value in _flattened(stored)}
        for key, value in changes.items():
            _put(leaves, key.replace(_NESTING, "."), Setting(value, place))
        return _build(leaves, place)


@dataclass(frozen=True)
class ResolvedConfig:
    """A configuration and where each of its values comes from.

    ``provenance`` has every dotted key: ``flag``, ``environment NAME``, ``FILE:LINE`` or ``default``.
    """

    config: TrainConfig
    provenance: Mapping[str, str]

    def rows(self) -> Iterator[tuple[str, Any, str]]:
        """``(dotted key, value, where from)``, in the order of the model."""
        for key, value in _flattened(self.config.to_dict()):
            yield key, value, self.provenance.get(key, DEFAULT)

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return {
            "config": self.config.to_dict(),
            "provenance": {key: source for key, _, source in self.rows()},
        }


@dataclass(frozen=True)
class Setting:
    """A value, and where it comes from: ``flag``, ``environment NAME`` or ``FILE:LINE``."""

    value: Any
    source: str


def load_config(
    path: str | Path, overrides: Sequence[str] = (), environ: Mapping[str, str] | None = None
) -> ResolvedConfig:
    """The configuration in a YAML file, with the environment and then ``overrides`` laid over it.

    Paths in it are made absolute: a relative one starts at the current directory.

    Args:
        path: the file.
        overrides: ``key=value`` each, with a dotted key and a value in YAML (``trainer.max_steps=50``).
        environ: where ``WARDEN_TRAINER__MAX_STEPS=50`` is looked up; by default that of the process.

    Raises:
        ConfigNotFoundError: there is no such file.
        ConfigurationError: the file cannot be read, a key is unknown or missing, or several things are wrong;
            its ``problems`` then lists them all.
        InvalidSettingError: one value cannot be.
        UsageError: an override is not ``key=value``.
    """
    return resolve(read_settings(path, overrides, environ), str(path))


def read_settings(
    path: str | Path, overrides: Sequence[str] = (), environ: Mapping[str, str] | None = None
) -> dict[str, Setting]:
    """All settings of a YAML file by dotted key, the environment and ``overrides`` laid over them, still unchecked.

    Raises ConfigNotFoundError, ConfigurationError and UsageError as `load_config`.
    """
    path = Path(path)
    leaves = {key: Setting(leaf.value, f"{path}:{leaf.line}") for key, leaf in _read(path)}
    for key, setting in (
        *_from_environment(os.environ if environ is None else environ),
        *_from_flags(overrides),
    ):
        _put(leaves, key, setting)
    return leaves


def resolve(settings: Mapping[str, Setting], place: str, over: Mapping[str, Setting] | None = None) -> ResolvedConfig:
    """The configuration of a training made of settings, with ``over`` laid over them. Raises as `load_config`."""
    leaves = dict(settings)
    for key, setting in (over or {}).items():
        _put(leaves, key, setting)
    config = _build(leaves, place)
    return ResolvedConfig(_with_whole_paths(config), {key: setting.source for key, setting in leaves.items()})


def _read(path: Path) -> list[tuple[str, Any]]:
    try:
        return list(parse_leaves(path.read_text(encoding="utf-8")).items())
    except FileNotFoundError:
        raise ConfigNotFoundError(path=str(path)) from None
    except YamlProblem as error:
        place = str(path) if error.line is None else f"{path}:{error.line}"
        raise ConfigurationError(place=place, problem=error.problem) from error
    except (OSError, UnicodeDecodeError) as error:
        problem = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigurationError(place=str(path), problem=f"the file cannot be read: {problem}") from error


def _from_environment(environ: Mapping[str, str]) -> Iterator[tuple[str, Setting]]:
    for name in sorted(environ):
        words = name.removeprefix(ENVIRONMENT_PREFIX)
        if name.startswith(ENVIRONMENT_PREFIX) and (_NESTING in words or words == "OUTPUT_DIR"):
            key = words.lower().replace(_NESTING, ".")
            yield from _parsed(key, environ[name], f"environment {name}")


def _from_flags(overrides: Sequence[str]) -> Iterator[tuple[str, Setting]]:
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise UsageError(problem=f"-o takes key=value, such as trainer.max_steps=50, not {override!r}")
        yield from _parsed(key.strip(), text, "flag")


def _parsed(key: str, text: str, source: str) -> Iterator[tuple[str, Setting]]:
    try:
        value = parse_value(text)
    except YamlProblem as error:
        raise ConfigurationError(place=f"{source} ({key})", problem=error.problem) from error
    for leaf_key, leaf in _flattened({key: value}):
        yield leaf_key, Setting(leaf, source)


def _put(leaves: dict[str, Setting], key: str, setting: Setting) -> None:
    """Lay one setting over the others: it takes the place of what lies below its key, or above."""
    sections = _sections()
    if key in sections and not setting.value:  # nothing in it: nothing to lay over
        return
    for other in list(leaves):
        if other not in sections and (other.startswith(f"{key}.") or key.startswith(f"{other}.")):
            del leaves[other]
    leaves[key] = setting


def _flattened(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _build(leaves: Mapping[str, Setting], place: str) -> TrainConfig:
    """The model made of leaves, or the one error that says everything that is wrong with them."""
    try:
        config = TrainConfig.model_validate(_tree(leaves))
    except pydantic.ValidationError as error:
        faults = error.errors(include_url=False)
        raise _as_one([_problem(fault, leaves, place) for fault in faults], place) from None
    try:
        check_settings(_as_trainer_settings(config))
    except InvalidSettingError as error:  # settings that are right each for itself do not fit each other
        key = next(key for key in _known_keys() if key.rpartition(".")[2] == error.details["setting"])
        raise _invalid(key, error.details["value"], error.details["expected"], leaves) from None
    return config


def _tree(leaves: Mapping[str, Setting]) -> dict[str, Any]:
    tree: dict[str, Any] = {name: {} for name in _sections()}
    for key, setting in leaves.items():
        *parents, name = key.split(".")
        branch: Any = tree
        for parent in parents:
            branch = branch.setdefault(parent, {}) if isinstance(branch, dict) else None
        # A section whose lines are all commented out is null: the same as an empty one. And what should be a
        # section and is a number has nothing below it; that it is a number will be the complaint.
        if isinstance(branch, dict) and not (setting.value is None and key in tree):
            branch[name] = setting.value
    return tree


def _as_trainer_settings(config: TrainConfig) -> dict[str, Any]:
    """Under the names that `Trainer` has for them."""
    named = {key: value for name in _sections() for key, value in getattr(config, name)}
    return {**named, "output_dir": config.output_dir, "eval_dataset": config.data.eval}


def _problem(fault: Any, leaves: Mapping[str, Setting], place: str) -> WardenError:
    key = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        where = next((leaves[k].source for k in leaves if k == key or k.startswith(f"{key}.")), place)
        return ConfigurationError(place=where, problem=f"unknown key {key!r}{_nearest(key)}")
    if fault["type"] == "missing":
        return ConfigurationError(place=place, problem=f"{key} is missing")
    # pydantic appends the branch of a union ("model.name_or_path.str"); our keys are known to the dot.
    key = max((known for known in _known_keys() if f"{key}.".startswith(f"{known}.")), key=len, default=key)
    expected = str(fault.get("ctx", {}).get("error", "")) or _EXPECTED.get(fault["type"], fault["msg"])
    return _invalid(key, fault["input"], expected, leaves)


def _invalid(key: str, value: Any, expected: str, leaves: Mapping[str, Setting]) -> InvalidSettingError:
    if isinstance(value, Mapping) and key in _sections():
        both = ("name_or_path", "config")
        value = {name: value[name] for name in both if value.get(name) is not None} or "without either"
    if isinstance(value, float) and not math.isfinite(value):
        value = str(value)
    elif isinstance(value, str) and key not in _sections():
        value = json.dumps(value, ensure_ascii=False)  # quoted: "8" is not 8
    source = f" [{leaves[key].source}]" if key in leaves else ""
    return InvalidSettingError(setting=key, value=value, expected=expected + source)


def _as_one(problems: Sequence[WardenError], place: str) -> WardenError:
    if len(problems) == 1:
        return problems[0]
    listed = [
        f"{problem.details['place']}: {problem.details['problem']}"
        if isinstance(problem, ConfigurationError)
        else problem.message
        for problem in problems
    ]
    return ConfigurationError(place=place, problem=f"{len(listed)} problems: {'; '.join(listed)}", problems=listed)


def _nearest(key: str) -> str:
    section, _, name = key.rpartition(".")
    known = _known_keys()
    here = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == section}
    elsewhere = {k.rpartition(".")[2]: k for k in known}
    for candidates in (here, elsewhere):
        close = difflib.get_close_matches(name, candidates, n=1, cutoff=0.6)
        if close:
            return f"; did you mean {candidates[close[0]]}?"
    return f"; known here are {', '.join(sorted(here))}" if here else ""


def _sections() -> dict[str, type[_Section]]:
    return {
        name: field.annotation
        for name, field in TrainConfig.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, _Section)
    }


def _known_keys() -> list[str]:
    keys = list(TrainConfig.model_fields)
    return keys + [f"{name}.{key}" for name, section in _sections().items() for key in section.model_fields]


def _with_whole_paths(config: TrainConfig) -> TrainConfig:
    """Paths that mean the same from any directory, since ``warden resume`` may be typed in another one."""
    data, model = config.data, config.model
    train = data.train if data.train == SOURCE_NAME else _whole(data.train)
    name = model.name_or_path
    # A name on the Hub looks like a relative path; it is one if there is something at it.
    name = model.name_or_path and (_whole(model.name_or_path) if _is_path(model.name_or_path) else model.name_or_path)
    return config.model_copy(
        update={
            "output_dir": _whole(config.output_dir),
            "data": data.model_copy(update={"train": train, "eval": data.eval and _whole(data.eval)}),
            "model": model.model_copy(update={"name_or_path": name}),
        }
    )


def _is_path(name: str) -> bool:
    return name.startswith((".", "~", "/")) or Path(name).exists()


def _whole(path: str) -> str:
    return os.path.abspath(Path(path).expanduser())  # noqa: PTH100 - resolve() would follow symbolic links
