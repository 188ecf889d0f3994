from __future__ import annotations

from pathlib import Path

import pytest
import torch

from .campaigns import save_base, write_work


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # forked children must not wait for threads that were not forked with them


@pytest.fixture(scope="session")
def campaign_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved base model; nobody writes to it."""
    return save_base(tmp_path_factory.mktemp("campaign") / "base")


@pytest.fixture
def campaign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, campaign_base: Path) -> Path:
    """A directory, the current one, with a campaign to run."""
    monkeypatch.chdir(tmp_path)
    return write_work(tmp_path, campaign_base)
