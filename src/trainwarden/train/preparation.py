"""What has to be there before the first step: rows, tokenizer, model, token ids. Bad input ends here."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trainwarden.errors import ConfigurationError, InvalidSettingError, ModelLoadError
from trainwarden.train import models
from trainwarden.train.data import EncodedDataset, read_rows, source_name, split_rows
from trainwarden.train.encode import encode_rows
from trainwarden.train.gates import device_asked
from trainwarden.train.hub import Backoff
from trainwarden.train.precision import Precision, choose_device
from trainwarden.train.publish import publish, read_marker
from trainwarden.train.quantized import pack, prepare_packed
from trainwarden.train.rows import Row
from trainwarden.train.tokenizer import ensure_chat_template

if TYPE_CHECKING:
    from trainwarden.train.foresight import Foresight
    from trainwarden.train.trainer import Trainer

TOKENIZER_FOLDER = "tokenizer"
BASE_MODEL_FOLDER = "base_model"
MODEL_FOLDER = "model"


@dataclass
class Prepared:
    """What a training starts from. ``new_base`` makes the untrained base model again, if nothing else can."""

    model: Any
    tokenizer: Any
    train: EncodedDataset
    evaluation: EncodedDataset | None
    tokenizer_facts: dict[str, Any] | None
    new_base: Callable[[], Any] | None
    notices: list[str] = field(default_factory=list)

    @property
    def pad_token_id(self) -> int:
        """Masked wherever it is used, so any valid id serves."""
        tokenizer = self.tokenizer
        candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        return next(int(token) for token in candidates if token is not None)

    def publish_tokenizer(self, output_dir: Path) -> None:
        """Keeps a tokenizer that was learned from the data, so that a resumed run uses the very same."""
        folder = output_dir / TOKENIZER_FOLDER
        if self.tokenizer_facts is not None and not _matches(read_marker(folder), self.tokenizer_facts):
            publish(folder, self.tokenizer.save_pretrained, facts=self.tokenizer_facts)


def prepare(
    trainer: Trainer,
    precision: Precision,
    *,
    backoff: Backoff,
    say: models.Say,
    weights: bool = True,
    foresight: Foresight | None = None,
) -> Prepared:
    """Reads, loads, builds and encodes, cheap things first. Without ``weights`` parameters are on the meta device.

    Raises the ``Dataset…`` errors, `ModelLoadError`, `InvalidSettingError` and `ConfigurationError`.
    """
    rows, evaluation_rows = _rows(trainer)
    notices: list[str] = []
    tokenizer, facts = _tokenizer(trainer, rows, backoff, say)
    if ensure_chat_template(tokenizer):
        notices.append("the tokenizer has no chat template: ChatML is used, and saved with the model")
    if foresight is not None:
        foresight.before_load(tokenizer)
    model, new_base = _model(trainer, tokenizer, precision, backoff, say, notices, weights=weights)
    if foresight is not None:
        foresight.after_load(model)
    max_length = _max_length(trainer, model, notices)

    def encoded(which: list[Row], name: str) -> EncodedDataset:
        result = encode_rows(which, tokenizer, max_length=max_length, name=name)
        notices.extend(result.notices(name, max_length))
        return EncodedDataset(result.rows)

    train = encoded(rows, source_name(trainer.train_dataset))
    evaluation = encoded(evaluation_rows, _evaluation_name(trainer)) if evaluation_rows else None
    for dataset in filter(None, (train, evaluation)):
        _require_embeddings(model, dataset)
    return Prepared(model, tokenizer, train, evaluation, facts, new_base, notices)


def _rows(trainer: Trainer) -> tuple[list[Row], list[Row]]:
    rows = read_rows(trainer.train_dataset, limit=trainer.limit)
    if trainer.eval_dataset is not None:
        return rows, read_rows(trainer.eval_dataset)
    if trainer.eval_rows:
        return split_rows(rows, trainer.eval_rows, seed=trainer.seed)
    return rows, []


def _evaluation_name(trainer: Trainer) -> str:
    if trainer.eval_dataset is not None:
        return source_name(trainer.eval_dataset)
    return "rows drawn for evaluation"


def _tokenizer(
    trainer: Trainer, rows: Sequence[Row], backoff: Backoff, say: models.Say
) -> tuple[Any, dict[str, Any] | None]:
    """The tokenizer, and for one learned from the data the facts by which it is recognised later."""
    if trainer.tokenizer is not None:
        models.require_fast(trainer.tokenizer, models.source_name(trainer.model))
        return trainer.tokenizer, None
    if not isinstance(trainer.model, Mapping):
        return models.load_tokenizer(trainer.model, backoff=backoff, say=say), None
    facts = {
        "rows_sha256": hashlib.sha256(repr(rows).encode()).hexdigest(),
        "vocab_size": trainer.model.get("vocab_size", models.DEFAULT_VOCAB_SIZE),
    }
    folder = Path(trainer.output_dir) / TOKENIZER_FOLDER
    if _matches(read_marker(folder), facts):
        try:
            return models.load_tokenizer(folder, backoff=backoff, say=say), facts
        except ModelLoadError as error:
            say(f"{folder} is damaged ({error.details['problem']}): the tokenizer is learned again")
    return models.tokenizer_for_config(trainer.model, rows), facts


def _matches(marker: Mapping[str, Any] | None, facts: Mapping[str, Any]) -> bool:
    return marker is not None and all(marker.get(key) == value for key, value in facts.items())


def _model(
    trainer: Trainer,
    tokenizer: Any,
    precision: Precision,
    backoff: Backoff,
    say: models.Say,
    notices: list[str],
    *,
    weights: bool,
) -> tuple[Any, Callable[[], Any] | None]:
    source = trainer.model
    new_base: Callable[[], Any] | None = None
    base: str | None = None
    if isinstance(source, torch.nn.Module):
        model: Any = source
    elif isinstance(source, Mapping):

        def build(config: Mapping[str, Any] = source) -> Any:
            torch.default_generator.manual_seed(trainer.seed)
            return models.build_model(config, tokenizer, dtype=precision.weights)

        model = build() if weights else models.without_weights(build)
        if trainer.mode != "full":
            notices.append("LoRA on a new model learns little, as its frozen weights are random: use mode full")
            new_base = build
            base = str((Path(trainer.output_dir) / MODEL_FOLDER / BASE_MODEL_FOLDER).resolve())
    else:
        packed_on = choose_device(device_asked(trainer.device, trainer.backend))[0] if trainer.mode == "qlora" else None
        model = models.load_model(
            source, dtype=precision.weights, backoff=backoff, say=say, weights=weights, packed_on=packed_on
        )
    if trainer.mode == "qlora" and weights:
        pack(model, precision.compute)
    if trainer.mode != "full":
        prepare_packed(model)
        lora = models.LoraSettings(
            trainer.lora_rank, trainer.lora_alpha, trainer.lora_dropout, trainer.lora_target_modules
        )
        model = models.add_lora(model, lora, base=base)
    if trainer.gradient_checkpointing:
        models.enable_checkpointing(model)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        expected = "a model with parameters that may be trained (requires_grad)"
        raise InvalidSettingError(setting="model", value=models.source_name(source), expected=expected)
    return model, new_base


def _max_length(trainer: Trainer, model: Any, notices: list[str]) -> int:
    most = getattr(model.config, "max_position_embeddings", None)
    if isinstance(most, int) and 2 <= most < trainer.max_length:
        notices.append(f"max_length is {most} instead of {trainer.max_length}: the model has no more positions")
        return most
    return trainer.max_length


def _require_embeddings(model: Any, dataset: EncodedDataset) -> None:
    """A token beyond the embedding table would end a GPU run in a device assertion without a name."""
    known = int(model.get_input_embeddings().weight.shape[0])
    largest = max(max(row.input_ids) for row in dataset.rows)
    if largest >= known:
        problem = f"its tokenizer writes token {largest}, and it has embeddings for {known}"
        raise ConfigurationError(place="model", problem=problem)
