"""A manifest is read exactly as it was written, or not at all."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainwarden.checkpoint.manifest import FileRecord, Manifest


def manifest(**changes: Any) -> Manifest:
    files = {name: FileRecord(7, "ab" * 32) for name in ("model.safetensors", "model.json")}
    described = Manifest.describe(40, files, ("model",), {"loss": 0.5})
    return dataclasses.replace(described, **changes)


def sealed(fields: dict[str, Any]) -> bytes:
    """A manifest with any entries, and a right checksum."""
    text = json.dumps({**fields, "manifest_sha256": "0" * 64}, indent=2)
    return text.replace("0" * 64, hashlib.sha256(text.encode()).hexdigest()).encode()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
    max_leaves=4,
)


@given(st.dictionaries(st.text(), json_values), st.integers(0, 10**9))
@settings(deadline=None)
def test_what_is_written_is_read(meta: dict[str, Any], step: int) -> None:
    written = manifest(meta=meta, step=step)
    assert Manifest.parse(written.to_bytes()) == written


def test_a_meta_that_looks_like_the_seal_does_no_harm() -> None:
    written = manifest(meta={"manifest_sha256": "0" * 64, "x": [{"manifest_sha256": "0" * 64}]})
    assert Manifest.parse(written.to_bytes()) == written


def test_it_is_json_that_a_person_can_read_and_names_versions_and_time() -> None:
    fields = json.loads(manifest().to_bytes())
    assert fields["step"] == 40
    assert fields["files"]["model.json"] == {"size_bytes": 7, "sha256": "ab" * 32}
    assert {"torch_version", "trainwarden_version", "created_at", "format_version"} <= fields.keys()
    assert fields["created_at"].endswith("+00:00")


def test_a_change_of_any_single_byte_is_noticed() -> None:
    content = manifest().to_bytes()
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        with pytest.raises(ValueError, match=r"readable JSON|checksum|no.* manifest"):
            Manifest.parse(bytes(damaged))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"{}", b"\xff", b"[" * 9999, b'{"manifest_sha256": 5}'])
def test_what_is_no_manifest_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match="it is not"):
        Manifest.parse(content)


def test_a_manifest_cut_anywhere_is_refused() -> None:
    content = manifest().to_bytes()
    for length in range(len(content)):
        with pytest.raises(ValueError, match="it is not"):
            Manifest.parse(content[:length])


def test_another_format_version_is_refused_by_its_number() -> None:
    with pytest.raises(ValueError, match="format version 2, not 1"):
        Manifest.parse(manifest(format_version=2).to_bytes())


def test_the_helper_of_this_file_seals_as_the_code_does() -> None:
    assert sealed(dataclasses.asdict(manifest())) == manifest().to_bytes()


RECORD = {"size_bytes": 7, "sha256": "ab" * 32}


@pytest.mark.parametrize(
    "changes",
    [
        {"files": None},
        {"files": {"model.json": RECORD}},
        {"files": {"model.json": RECORD, "model.safetensors": {"size_bytes": 7}}},
        {"parts": None},
        {"parts": []},
        {"parts": ["model", "optimizer"]},
        {"parts": ["model", "model"]},
        {"parts": [5]},
        {"parts": ["../m"], "files": {"../m.json": RECORD, "../m.safetensors": RECORD}},
        {"parts": ["/etc/m"], "files": {"/etc/m.json": RECORD, "/etc/m.safetensors": RECORD}},
        {"step": "40"},
        {"step": True},
        {"meta": []},
        {"unknown": 1},
    ],
    ids=str,
)
def test_a_forged_manifest_with_a_right_checksum_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="make no sense"):
        Manifest.parse(sealed(dataclasses.asdict(manifest()) | changes))


@given(st.dictionaries(st.sampled_from(sorted(dataclasses.asdict(manifest()))), json_values))
@settings(deadline=None)
def test_any_forged_manifest_is_read_or_refused(changes: dict[str, Any]) -> None:
    with suppress(ValueError):
        Manifest.parse(sealed(dataclasses.asdict(manifest()) | changes))
