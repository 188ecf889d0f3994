"""Bad input ends in its typed error before anything is trained, and nothing is written over."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from tests.train.tiny import LLAMA, instructions, settings, write_jsonl
from trainwarden.errors import (
    ConfigurationError,
    DatasetError,
    DatasetFormatError,
    DatasetNotFoundError,
    DatasetParseError,
    DatasetValidationError,
    GPUNotAvailableError,
    InvalidSettingError,
    ModelLoadError,
    WardenError,
)
from trainwarden.train import Trainer

ROWS = instructions(12)


def train(model: Any, rows: Any, run_dir: Path, **changes: Any) -> Any:
    return Trainer(model, rows, output_dir=run_dir, **settings(**changes)).train()


def tree(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def occupied(tmp_path: Path) -> Path:
    """An output directory in which a user keeps things."""
    folder = tmp_path / "out"
    (folder / "sub").mkdir(parents=True)
    for name in ("notes.txt", "sub/weights.bin", "model.safetensors", "config.json", "run.log", ".hidden"):
        (folder / name).write_text(f"mine: {name}")
    return folder


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"nonsense\n", DatasetParseError),
        (b'{"text": ""}\n', DatasetValidationError),
        (b'{"foo": 1}\n', DatasetFormatError),
        (b"", DatasetError),
        (b'{"prompt": "' + b"red " * 300 + b'", "completion": "x"}\n', DatasetError),
        (None, DatasetNotFoundError),
    ],
)
def test_bad_data_writes_nothing(
    tmp_path: Path, occupied: Path, content: bytes | None, error: type[WardenError]
) -> None:
    path = tmp_path / "data.jsonl"
    if content is not None:
        path.write_bytes(content)
    before = tree(occupied)
    with pytest.raises(error):
        train(LLAMA, path, occupied)
    assert tree(occupied) == before


def test_bad_evaluation_data_is_found_before_training(tmp_path: Path) -> None:
    with pytest.raises(DatasetNotFoundError):
        train(LLAMA, ROWS, tmp_path / "out", eval_dataset=tmp_path / "nowhere.jsonl")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model", ["./nowhere", {"model_type": "lama"}, {**LLAMA, "hiden_size": 3}])
def test_a_bad_model_writes_nothing(occupied: Path, model: Any) -> None:
    before = tree(occupied)
    with pytest.raises((ModelLoadError, InvalidSettingError)):
        train(model, ROWS, occupied)
    assert tree(occupied) == before


def test_unrelated_files_survive_a_whole_training(occupied: Path) -> None:
    before = tree(occupied)
    train(LLAMA, ROWS, occupied)
    train(LLAMA, ROWS, occupied)
    after = tree(occupied)
    assert {name: after.get(name) for name in before} == before
    assert "model/model.safetensors" in after


@pytest.mark.parametrize("name", ["model", "tokenizer"])
def test_a_folder_that_would_be_written_over_is_refused_before_training(occupied: Path, name: str) -> None:
    (occupied / name).mkdir()
    (occupied / name / "config.json").write_text("mine")
    before = tree(occupied)
    with pytest.raises(InvalidSettingError, match="did not write"):
        train(LLAMA, ROWS, occupied)
    assert tree(occupied) == before


@pytest.mark.parametrize("below", ["", "model"])
def test_a_model_is_not_trained_into_its_own_directory(tmp_path: Path, llama_dir: Path, below: str) -> None:
    source = Path(shutil.copytree(llama_dir, tmp_path / "run" / below))
    with pytest.raises(InvalidSettingError, match="output_dir"):
        train(source, ROWS, tmp_path / "run")


def test_a_gpu_that_is_not_there_is_said(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(GPUNotAvailableError) as caught:
        train(LLAMA, ROWS, tmp_path, device="cuda")
    assert caught.value.exit_code == 69
    assert not list(tmp_path.iterdir())


def test_float16_on_a_cpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettingError, match="float16"):
        train(LLAMA, ROWS, tmp_path, dtype="float16")


def test_a_tokenizer_larger_than_the_embeddings_is_refused(tmp_path: Path, tokenizer: Any, llama_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama_dir)
    model.resize_token_embeddings(100)
    with pytest.raises(ConfigurationError, match="embeddings for 100"):
        train(model, ROWS, tmp_path, tokenizer=tokenizer)


def test_a_model_of_which_nothing_may_be_trained_is_refused(tmp_path: Path, tokenizer: Any, llama_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama_dir).requires_grad_(False)
    with pytest.raises(InvalidSettingError, match="requires_grad"):
        train(model, ROWS, tmp_path, tokenizer=tokenizer)


def test_more_evaluation_rows_than_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettingError, match="eval_rows"):
        train(LLAMA, ROWS, tmp_path, eval_rows=12)


def test_an_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(WardenError):
        train(LLAMA, write_jsonl(tmp_path / "rows.jsonl", ROWS), tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"
