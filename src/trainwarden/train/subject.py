"""What a preflight is asked about: a training configuration, a model directory, a bare model configuration, a Hub name.

Nothing is downloaded and no weights are read: only configurations.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainwarden.errors import ConfigurationError, InvalidSettingError, ModelLoadError
from trainwarden.memory.architecture import DecoderArchitecture, UnknownArchitectureError, architecture_of
from trainwarden.memory.plan import DtypeName, Mode, OptimizerName, TrainingPlan
from trainwarden.train.models import quiet_torchao, without_collections
from trainwarden.train.settings import OptimizerChoice

if TYPE_CHECKING:
    from trainwarden.train.config import TrainConfig

OPTIMIZERS: Mapping[OptimizerChoice, OptimizerName] = {"adamw": "adamw_fused", "adamw_8bit": "adamw_8bit"}
"""What a plan calls the optimizers of a `Trainer`."""
_YAML = (".yaml", ".yml")
MOST_TOKENS = 1_048_576
"""Sequences that are looked at."""


@dataclass(frozen=True)
class Subject:
    """A model by its configuration, and how it is to be trained.

    Attributes:
        name: how messages call it.
        config: the Hugging Face configuration, complete.
        plan: as configured; of a bare model, the defaults of a `TrainingPlan`.
        training: the whole training configuration, where there is one.
        architecture: for the closed form; None with ``no_architecture`` saying why.
    """

    name: str
    config: Mapping[str, Any]
    plan: TrainingPlan
    training: TrainConfig | None = None
    architecture: DecoderArchitecture | None = None
    no_architecture: str = ""

    @property
    def on_cpu(self) -> bool:
        """Whether its configuration says that it is trained on the CPU."""
        return self.training is not None and "cpu" in (self.training.trainer.device, self.training.trainer.backend)

    def having(self, **changes: Any) -> Subject:
        """The same model under another plan."""
        return replace(self, plan=replace(self.plan, **changes))


def read_subject(reference: str, overrides: Sequence[str] = (), *, bfloat16: bool = True) -> Subject:
    """What ``reference`` means: see the module.

    Args:
        overrides: ``key=value`` over a training configuration.
        bfloat16: whether the device computes in it; decides what ``dtype: auto`` means.

    Raises:
        ConfigNotFoundError, ConfigurationError, InvalidSettingError: a configuration that is not there or wrong.
        ModelLoadError: a model whose configuration is not on this machine, or of a type that transformers lacks.
    """
    path = Path(reference).expanduser()
    if path.is_dir():
        return _of_model(reference, _config_in(path), bfloat16=bfloat16)
    if path.suffix == ".json" and path.is_file():
        return _of_model(reference, _json(path), bfloat16=bfloat16)
    if path.suffix in _YAML or path.is_file():
        return _of_yaml(path, overrides, bfloat16=bfloat16)
    return _of_model(reference, _cached(reference), bfloat16=bfloat16)


def subject_of(
    name: str, config: Mapping[str, Any], plan: TrainingPlan, training: TrainConfig | None = None
) -> Subject:
    """A subject with its architecture, if the closed form knows it."""
    try:
        return Subject(name, config, plan, training, architecture_of(config))
    except UnknownArchitectureError as error:
        return Subject(name, config, plan, training, None, error.reason)


def positions_of(config: Mapping[str, Any]) -> int:
    """The longest sequence that a model can take, as far as its configuration says."""
    most = config.get("max_position_embeddings") or config.get("n_positions")
    return most if isinstance(most, int) and most > 1 else MOST_TOKENS


def under_mode(subject: Subject, mode: Mode, *, bfloat16: bool = True) -> Subject:
    """The same model and micro-batch in another mode, its weights held as `Trainer` would."""
    plan = subject.plan
    compute = plan.autocast or plan.weights
    if mode == "qlora" and compute == "float32":
        compute = "bfloat16" if bfloat16 else "float16"
    held: DtypeName = "float32" if mode == "full" else compute
    return subject.having(mode=mode, weights=held, autocast=None if compute == "float32" else compute)


def plan_for(mode: Mode, dtype: str, *, bfloat16: bool = True, **settings: Any) -> TrainingPlan:
    """The plan that `Trainer` carries out on a GPU for its settings ``mode`` and ``dtype``.

    All weights are trained in float32; frozen ones are held in the type of the computation (see `choose_precision`).
    """
    automatic: DtypeName = "bfloat16" if bfloat16 else "float32"
    compute: Any = automatic if dtype == "auto" else dtype
    held: Any = "float32" if mode == "full" else compute
    autocast = None if compute == "float32" else compute
    return TrainingPlan(mode=mode, weights=held, autocast=autocast, **settings)


def _of_model(name: str, config: Mapping[str, Any], *, bfloat16: bool) -> Subject:
    known = complete(name, config)
    plan = plan_for("lora", "auto", bfloat16=bfloat16)
    return subject_of(name, known, replace(plan, sequence_length=min(plan.sequence_length, positions_of(known))))


def _of_yaml(path: Path, overrides: Sequence[str], *, bfloat16: bool) -> Subject:
    from trainwarden.train.config import load_config

    bare = _bare_model(path)
    if bare is not None:
        return _of_model(str(path), bare, bfloat16=bfloat16)
    training = load_config(path, overrides).config
    model, trainer = training.model, training.trainer
    plan = plan_for(
        model.mode,
        model.dtype,
        bfloat16=bfloat16 and trainer.device != "cpu",
        sequence_length=training.data.max_length,
        micro_batch_size=trainer.batch_size if isinstance(trainer.batch_size, int) else 1,
        grad_accum_steps=trainer.grad_accum_steps,
        checkpointing=trainer.gradient_checkpointing,
        optimizer=OPTIMIZERS[trainer.optimizer],
        loss_chunk_tokens=trainer.loss_chunk_tokens,
        offload=trainer.full_ft_offload,
        lora_rank=model.lora_rank,
        lora_dropout=model.lora_dropout,
    )
    if model.config is not None:
        name, config = f"a new {model.config.get('model_type')} model", complete(str(path), model.config)
    else:
        name = str(model.name_or_path)
        folder = Path(name)
        config = complete(name, _config_in(folder) if folder.is_dir() else _cached(name))
    return subject_of(name, config, plan, training)


def _bare_model(path: Path) -> Mapping[str, Any] | None:
    """A YAML file that describes a model and no training."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None  # loading it as a training configuration says what is wrong with it
    return content if isinstance(content, Mapping) and "model_type" in content else None


def _config_in(folder: Path) -> Mapping[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        adapter = (folder / "adapter_config.json").is_file()
        problem = "it holds an adapter; ask about its base model" if adapter else "the directory has no config.json"
        raise ModelLoadError(
            model=str(folder),
            cause_category="not_found",
            problem=problem,
            suggestion="Give the directory of a Hugging Face model, a config.json, or a training configuration.",
        )
    return _json(file)


def _json(file: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        problem = f"it is no JSON: {error}" if isinstance(error, ValueError) else f"it cannot be read: {error}"
        raise ConfigurationError(place=str(file), problem=problem) from error
    if not isinstance(content, dict):
        raise ConfigurationError(place=str(file), problem="it is no model configuration: a mapping was expected")
    return content


def _cached(name: str) -> Mapping[str, Any]:
    """The configuration that an earlier download of a Hub model left on this machine."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        found = None
    if not isinstance(found, str):
        raise ModelLoadError(
            model=name,
            cause_category="not_found",
            problem="there is no such file or directory, and no model of this name in the Hub's cache on this machine",
            suggestion="A preflight downloads nothing: give a directory, a config.json, or run "
            "`hf download NAME config.json` first.",
        )
    return _json(Path(found))


def complete(place: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with the defaults of its type. A type that transformers lacks stays as it is written."""
    from huggingface_hub.errors import StrictDataclassError

    with quiet_torchao(), without_collections():
        from transformers import AutoConfig
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    values = dict(config)
    kind = values.pop("model_type", None)
    if not isinstance(kind, str):
        raise ConfigurationError(place=place, problem="it is no model configuration: model_type is missing")
    try:
        complete: dict[str, Any] = AutoConfig.for_model(kind, **values).to_dict()
    except (ValueError, KeyError) as error:
        if kind in CONFIG_MAPPING_NAMES:
            raise ConfigurationError(place=place, problem=" ".join(str(error).split())) from error
        known_shape = {"num_hidden_layers", "hidden_size", "vocab_size"} <= values.keys()
        if not known_shape:
            expected = "a model type that transformers knows, such as llama, gpt2 or qwen3"
            raise InvalidSettingError(setting=f"{place}: model_type", value=kind, expected=expected) from None
        return {"model_type": kind, **values}
    except (TypeError, StrictDataclassError) as error:
        raise ConfigurationError(place=place, problem=" ".join(str(error).split())) from error
    return complete
