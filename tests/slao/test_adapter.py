"""An adapter is read as peft wrote it, and refused when it is anything else."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch

from trainwarden import slao
from trainwarden.errors import AdapterNotFoundError, SLAOMergeError
from trainwarden.slao.adapter import digest_of

from .adapters import CONFIG, same, saved, state

WEIGHTS = "adapter_model.safetensors"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_directory_is_read_as_it_was_written(tmp_path: Path, dtype: torch.dtype) -> None:
    found = slao.read_adapter(saved(tmp_path / "a", state(1, dtype=dtype)))
    assert same(found.tensors, state(1, dtype=dtype))
    assert found.config == CONFIG
    assert found.source == str(tmp_path / "a")
    assert found.started_from is None


def test_the_digest_is_of_the_tensors_however_they_are_kept(tmp_path: Path) -> None:
    found = slao.read_adapter(saved(tmp_path / "a", state(1)))
    shuffled = dict(reversed(state(1).items()))
    assert found.digest() == digest_of(shuffled)
    assert found.digest() != digest_of(state(2))
    assert digest_of({"a": torch.zeros(2, 3)}) != digest_of({"a": torch.zeros(3, 2)})
    assert digest_of({"a": torch.zeros(2)}) != digest_of({"b": torch.zeros(2)})
    assert digest_of({"a": torch.zeros(2)}) != digest_of({"a": torch.zeros(2, dtype=torch.int32)})


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(AdapterNotFoundError, match="there is no such directory"):
        slao.read_adapter(tmp_path / "a")
    (tmp_path / "file").write_text("")
    with pytest.raises(AdapterNotFoundError, match="it is a file"):
        slao.read_adapter(tmp_path / "file")
    (tmp_path / "a").mkdir()
    with pytest.raises(AdapterNotFoundError, match=r"adapter_config.json is missing$"):
        slao.read_adapter(tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").write_text("{}")
    with pytest.raises(AdapterNotFoundError, match="adapter_model.safetensors is missing"):
        slao.read_adapter(tmp_path / "a")


def test_the_directory_of_a_run_is_answered_with_where_its_adapter_is(tmp_path: Path) -> None:
    saved(tmp_path / "run" / "model", state(1))
    with pytest.raises(AdapterNotFoundError, match=r"there is one in .*run/model"):
        slao.read_adapter(tmp_path / "run")


def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    saved(tmp_path / "a", state(1))
    (tmp_path / "a" / WEIGHTS).rename(tmp_path / "a" / "adapter_model.bin")
    with pytest.raises(SLAOMergeError, match="is a pickle, which can run code"):
        slao.read_adapter(tmp_path / "a")


@pytest.mark.parametrize("config", ["", "{", "[1]", "null", '{"peft_type": "LOHA"}', "{}"])
def test_only_a_lora_configuration_is_one(tmp_path: Path, config: str) -> None:
    saved(tmp_path / "a", state(1))
    (tmp_path / "a" / "adapter_config.json").write_text(config)
    with pytest.raises(SLAOMergeError):
        slao.read_adapter(tmp_path / "a")


def test_every_cut_of_the_file_is_noticed(tmp_path: Path) -> None:
    path = saved(tmp_path / "a", state(1)) / WEIGHTS
    for size_bytes in range(path.stat().st_size - 1, -1, -97):
        os.truncate(path, size_bytes)
        with pytest.raises(SLAOMergeError, match="it is damaged"):
            slao.read_adapter(tmp_path / "a")


def test_a_published_adapter_is_held_to_its_checksum(tmp_path: Path) -> None:
    """One flipped bit in a weight leaves a well-formed file; only a checksum tells."""
    path = saved(tmp_path / "a", state(1)) / WEIGHTS
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    (tmp_path / "a" / "trainwarden.json").write_text(json.dumps({"files": {WEIGHTS: sha256}}))
    assert slao.read_adapter(tmp_path / "a")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(SLAOMergeError, match="not the one it was published with"):
        slao.read_adapter(tmp_path / "a")


def test_a_file_that_may_not_be_read_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "a", state(1))

    def denied(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(SLAOMergeError, match="it cannot be read: Permission denied"):
        slao.read_adapter(tmp_path / "a")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"started_from": 3}'])
def test_a_lineage_that_says_nothing_is_damage(tmp_path: Path, content: str) -> None:
    saved(tmp_path / "a", state(1))
    (tmp_path / "a" / "slao_lineage.json").write_text(content)
    with pytest.raises(SLAOMergeError, match="it is damaged"):
        slao.read_adapter(tmp_path / "a")


def test_all_problems_are_in_the_details_and_the_first_in_the_message(tmp_path: Path) -> None:
    broken = {key: value.double() for key, value in state(1).items()}
    with pytest.raises(SLAOMergeError, match=r"\(and 7 more\)") as raised:
        slao.read_adapter(saved(tmp_path / "a", broken))
    assert len(raised.value.problems) == 8
