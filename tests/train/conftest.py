"""Fixtures of the room's tests. Models and tokenizers are real, and so small that making them costs nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.pool import RankPool
from tests.train.tiny import GPT2, LLAMA, corpus
from trainwarden.train.models import build_model
from trainwarden.train.tokenizer import train_tokenizer


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return train_tokenizer(corpus(), vocab_size=300)


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[RankPool]:
    """Two processes that stay: what they have imported once serves all tests."""
    pool = RankPool(2)
    yield pool
    pool.close()


def _saved(folder: Path, config: Any, tokenizer: Any) -> Path:
    torch.manual_seed(7)
    build_model(config, tokenizer, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A checkpoint directory as Hugging Face writes it."""
    return _saved(tmp_path_factory.mktemp("models") / "llama", LLAMA, tokenizer)


@pytest.fixture(scope="session")
def gpt2_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    return _saved(tmp_path_factory.mktemp("models") / "gpt2", GPT2, tokenizer)
