"""Where a model comes from (a directory, the Hub, a configuration alone), and LoRA around it."""

from __future__ import annotations

import difflib
import gc
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainwarden.errors import ConfigurationError, InvalidSettingError, ModelLoadError
from trainwarden.guards.oom import is_out_of_memory
from trainwarden.train.hub import Backoff, first_line, load_with_retries
from trainwarden.train.quantized import loading_settings
from trainwarden.train.rows import Row
from trainwarden.train.tokenizer import train_tokenizer

ModelSource = str | Path | Mapping[str, Any] | torch.nn.Module

DEFAULT_VOCAB_SIZE = 2048
_LEAST_VOCAB_SIZE = 260  # 256 bytes, three special tokens, and one merge

_TORCHAO_LOGGERS = ("torchao", "torch.utils._pytree", "bitsandbytes.backends.cpu.ops")

Say = Callable[[str], None]


@dataclass(frozen=True)
class LoraSettings:
    """What peft is asked for; ``target_modules`` is ``"all-linear"`` or a list of module names."""

    rank: int
    alpha: float
    dropout: float
    target_modules: str | Sequence[str]


def source_name(source: ModelSource) -> str:
    """How messages call a model."""
    if isinstance(source, str | Path):
        return str(source)
    if isinstance(source, Mapping):
        return f"a new {source.get('model_type')} model"
    return type(source).__name__


@contextmanager
def quiet_progress_bars() -> Iterator[None]:
    """Keeps transformers' bars for loading and saving out of the log lines."""
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


@contextmanager
def quiet_torchao() -> Iterator[None]:
    """Keeps what torchao and bitsandbytes log when they are first imported out of a run's lines.

    transformers and peft import them wherever they are installed, and torchao names each of its compiled kernels that
    does not fit this torch. FP8 training needs none of them, and its gate tries those of torch that it does need.
    """
    loggers = [logging.getLogger(name) for name in _TORCHAO_LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def without_collections() -> Iterator[None]:
    """Keeps the garbage collector from going through what imports and building make, of which nothing is garbage.

    It takes a sixth off the time of a preflight.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def load_tokenizer(source: ModelSource, *, backoff: Backoff, say: Say) -> Any:
    """The tokenizer of a directory or Hub repository. Raises `ModelLoadError`."""
    from transformers import AutoTokenizer

    name = _existing(source)
    tokenizer = load_with_retries(
        lambda: AutoTokenizer.from_pretrained(name, trust_remote_code=False, local_files_only=_is_local(name)),
        model=name,
        backoff=backoff,
        say=say,
        preface=_preface(name),
    )
    require_fast(tokenizer, name)
    return tokenizer


def require_fast(tokenizer: Any, name: str) -> None:
    """Refuses a tokenizer that cannot say which characters a token stands for: the loss mask needs that."""
    if not getattr(tokenizer, "is_fast", False):
        problem = f"its tokenizer ({type(tokenizer).__name__}) is not a fast one, which masking prompts needs"
        raise ModelLoadError(model=name, cause_category="unsupported", problem=problem)


def load_model(
    source: ModelSource,
    *,
    dtype: torch.dtype,
    backoff: Backoff,
    say: Say,
    weights: bool = True,
    packed_on: torch.device | None = None,
) -> Any:
    """The model of a directory or Hub repository, on the CPU, without executing code that comes with it.

    Without ``weights`` as `without_weights` builds it; with ``packed_on`` its linear layers are packed to 4 bits on
    that device while they are read. Raises `ModelLoadError`, also when the files lack weights: those would silently be
    random.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    name = _existing(source)

    def build() -> Any:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, local_files_only=_is_local(name))
        return without_weights(lambda: AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False))

    if not weights:
        return load_with_retries(build, model=name, backoff=backoff, say=say, preface=_preface(name))

    packing = loading_settings(dtype, packed_on) if packed_on is not None else {}

    def load() -> tuple[Any, dict[str, Any]]:
        with quiet_progress_bars():
            loaded: tuple[Any, dict[str, Any]] = AutoModelForCausalLM.from_pretrained(
                name,
                dtype=dtype,
                trust_remote_code=False,
                weights_only=True,
                local_files_only=_is_local(name),
                output_loading_info=True,
                **packing,
            )
        return loaded

    model, report = load_with_retries(load, model=name, backoff=backoff, say=say, preface=_preface(name))
    if missing := sorted(report["missing_keys"]):
        problem = f"its files lack {len(missing)} weights, such as {missing[0]}, which would be left random"
        raise ModelLoadError(model=name, cause_category="corrupt", problem=problem)
    return model


def without_weights(build: Callable[[], Any]) -> Any:
    """The model that ``build`` makes, its parameters on the meta device and its buffers computed."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = build()
    model.tie_weights()  # each meta parameter is made anew, also the tied ones
    return model


def tokenizer_for_config(config: Mapping[str, Any], rows: Sequence[Row]) -> Any:
    """A tokenizer learned from the training rows, as large as the configured ``vocab_size``."""
    vocab_size = config.get("vocab_size", DEFAULT_VOCAB_SIZE)
    if not isinstance(vocab_size, int) or isinstance(vocab_size, bool) or vocab_size < _LEAST_VOCAB_SIZE:
        expected = f"a whole number of at least {_LEAST_VOCAB_SIZE}: all bytes and the special tokens"
        raise InvalidSettingError(setting="model.config.vocab_size", value=vocab_size, expected=expected)
    return train_tokenizer(rows, vocab_size=vocab_size)


def build_model(config: Mapping[str, Any], tokenizer: Any, *, dtype: torch.dtype) -> Any:
    """A new causal language model from ``config``, its weights drawn from torch's global generator.

    Raises `InvalidSettingError` for an unknown type or key, and `ConfigurationError` when its values do not
    fit together.
    """
    from transformers import AutoModelForCausalLM

    settings = _model_config(config, tokenizer)
    with _config_refused():
        return AutoModelForCausalLM.from_config(settings, trust_remote_code=False).to(dtype)


def _model_config(config: Mapping[str, Any], tokenizer: Any) -> Any:
    from transformers import AutoConfig

    values = dict(config)
    model_type = values.pop("model_type", None)
    try:
        default = AutoConfig.for_model(model_type)
    except (ValueError, KeyError, TypeError) as error:
        expected = "a model type that transformers knows, such as llama, gpt2 or qwen3"
        raise InvalidSettingError(setting="model.config.model_type", value=model_type, expected=expected) from error
    known = {*default.to_dict(), *default.attribute_map}
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            expected = f"a setting of {model_type} models" + (f"; closest is {near[0]}" if near else "")
            raise InvalidSettingError(setting=f"model.config.{key}", value=values[key], expected=expected)
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    with _config_refused():
        return AutoConfig.for_model(model_type, **{"vocab_size": len(tokenizer), **ids, **values})


@contextmanager
def _config_refused() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # boundary: configuration and model classes raise whatever their own checks do
        if is_out_of_memory(error):
            raise
        raise ConfigurationError(place="model.config", problem=" ".join(str(error).split())) from error


def add_lora(model: Any, lora: LoraSettings, *, base: str | None) -> Any:
    """The model with adapters in float32 and all else frozen; one that has adapters stays as it is.

    ``base`` is where the adapter will say that its base model lies. Raises `InvalidSettingError` when no
    module matches ``target_modules``.
    """
    from peft import LoraConfig, PeftModel, TaskType, get_peft_model

    if isinstance(model, PeftModel):
        return model
    modules = lora.target_modules
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=modules if isinstance(modules, str) else list(modules),
        task_type=TaskType.CAUSAL_LM,
    )
    try:
        with warnings.catch_warnings():
            # peft (0.21) asks transformers (5.23) by a name that the one will drop and the other's users cannot help
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            adapted = get_peft_model(model, config)
    except ValueError as error:
        shown = modules if isinstance(modules, str) else list(modules)
        expected = f"modules that the model has ({first_line(error)})"
        raise InvalidSettingError(setting="lora_target_modules", value=shown, expected=expected) from error
    if base is not None:
        config.base_model_name_or_path = base  # peft takes the name of the model object, which a new one has not
    return adapted


def enable_checkpointing(model: Any) -> None:
    """Makes blocks keep their input only, and run again in the backward pass.

    Raises `InvalidSettingError` for a model whose class cannot.
    """
    try:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    except (AttributeError, ValueError) as error:
        expected = f"false: {type(model).__name__} has no gradient checkpointing"
        raise InvalidSettingError(setting="gradient_checkpointing", value=True, expected=expected) from error


def _existing(source: ModelSource) -> str:
    """The name to load. What is meant as a directory and is none is refused, not asked of the Hub."""
    name = str(source)
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path.resolve())  # an adapter names its base model, and is to be loaded from anywhere
    looks_like_path = isinstance(source, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_like_path or path.exists():
        problem = "it is a file, not a directory" if path.exists() else "there is no such directory"
        raise ModelLoadError(model=name, cause_category="not_found", problem=problem)
    return name


def _preface(name: str) -> str:
    return "" if _is_local(name) else "there is no such directory, and from the Hub: "


def _is_local(name: str) -> bool:
    return Path(name).is_dir()
