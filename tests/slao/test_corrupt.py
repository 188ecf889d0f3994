"""No corrupt input gets past the check or changes the accumulator: NaN, Inf, keys, shapes, dtypes, torn files.

A few hundred inputs here; ten thousand with ``pytest -m torture -s tests/slao/test_corrupt.py``.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from trainwarden import slao
from trainwarden.errors import AdapterNotFoundError, SLAOMergeDivergedError, SLAOMergeError

from .adapters import CONFIG, adapter, fingerprint, same, state, store_with

REFUSED = (SLAOMergeError, SLAOMergeDivergedError, AdapterNotFoundError)
KEYS = sorted(state())
DTYPES = (torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int8, torch.bool, torch.float8_e4m3fn)

Corruption = Callable[[st.DataObject, dict[str, Tensor]], None]


def not_finite(data: st.DataObject, tensors: dict[str, Tensor]) -> None:
    for key in data.draw(st.lists(st.sampled_from(KEYS), min_size=1, max_size=4, unique=True)):
        position = data.draw(st.integers(0, tensors[key].numel() - 1))
        tensors[key].view(-1)[position] = data.draw(st.sampled_from([float("nan"), float("inf"), float("-inf")]))


def missing(data: st.DataObject, tensors: dict[str, Tensor]) -> None:
    for key in data.draw(st.lists(st.sampled_from(KEYS), min_size=1, unique=True)):
        del tensors[key]


def extra(data: st.DataObject, tensors: dict[str, Tensor]) -> None:
    stem = data.draw(st.sampled_from(KEYS))
    name = data.draw(st.sampled_from(["x", f"{stem}.weight", stem.replace("layers.0", "layers.7").replace("1", "9")]))
    if name in tensors:
        name += "x"
    tensors[name] = torch.zeros(data.draw(st.sampled_from([(), (3,), (3, 8)])))


def renamed(data: st.DataObject, tensors: dict[str, Tensor]) -> None:
    key = data.draw(st.sampled_from(KEYS))
    changes: list[Callable[[str], str]] = [
        lambda k: k.removeprefix("base_model."),
        lambda k: k.replace(".weight", ".default.weight"),
        lambda k: k.replace("lora_A", "lora_Q").replace("lora_B", "lora_Q"),
        lambda k: k.upper(),
        lambda k: k + " ",
    ]
    tensors[data.draw(st.sampled_from(changes))(key)] = tensors.pop(key)


def exchanged(data: st.DataObject, tensors: dict[str, Tensor]) -> None:
    one = data.draw(st.sampled_from(KEYS))
    other = data.draw(st.sampled_from([key for key in KEYS if tensors[key].shape != tensors[one].shape]))
    tensors[one], tensors[other] = tensors[other], tensors[one]


def wrong_shape(data: st.DataObject, tensors: dict[str, Tensor]) -> None:
    key = data.draw(st.sampled_from(KEYS))
    value = tensors[key]
    shapes: list[Callable[[], Tensor]] = [
        value.T.contiguous,
        lambda: value.reshape(-1),
        value[:, :-1].contiguous,
        value[:-1].contiguous,
        value[:0].contiguous,
        lambda: value.unsqueeze(0),
        lambda: torch.cat([value, value]),
    ]
    tensors[key] = data.draw(st.sampled_from(shapes))()


def wrong_rank(data: st.DataObject, tensors: dict[str, Tensor]) -> None:
    rank = data.draw(st.integers(1, 9).filter(lambda r: r != 3))
    tensors.update(state(data.draw(st.integers(0, 99)), rank=rank))


def wrong_dtype(data: st.DataObject, tensors: dict[str, Tensor]) -> None:
    for key in data.draw(st.lists(st.sampled_from(KEYS), min_size=1, unique=True)):
        tensors[key] = tensors[key].to(data.draw(st.sampled_from(DTYPES)))


def exploded(data: st.DataObject, tensors: dict[str, Tensor]) -> None:
    key = data.draw(st.sampled_from([key for key in KEYS if "lora_B" in key]))
    tensors[key] *= data.draw(st.sampled_from([1e3, 1e12, 1e30]))


CORRUPTIONS: list[Corruption] = [
    not_finite, missing, extra, renamed, exchanged, wrong_shape, wrong_rank, wrong_dtype, exploded
]  # fmt: skip


def torn(data: st.DataObject, content: bytes) -> bytes:
    """A file as a full disk, a broken copy or a killed writer leaves it; its header always tells."""
    (length,) = struct.unpack("<Q", content[:8])
    how = data.draw(st.sampled_from(["cut", "longer", "no header", "wrong length", "not JSON", "hole"]))
    if how == "cut":
        return content[: data.draw(st.integers(0, len(content) - 1))]
    if how == "longer":
        return content + data.draw(st.binary(min_size=1, max_size=64))
    if how == "no header":
        return b"\0" * len(content)
    if how == "wrong length":
        other = data.draw(st.integers(0, 2**63).filter(lambda n: n != length))
        # A shorter length may end at the same JSON: padding is part of the header.
        return struct.pack("<Q", other if other < 2 or other > len(content) else 2) + content[8:]
    if how == "not JSON":
        position = data.draw(st.integers(8, 8 + length - 1))
        return content[:position] + b"\xff" + content[position + 1 :]
    header = json.loads(content[8 : 8 + length])
    key = data.draw(st.sampled_from(sorted(set(header) - {"__metadata__"})))
    header[key]["data_offsets"][0] += data.draw(st.sampled_from([-4, 4, 2**40]))
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


class Place:
    """A store with two adapters, and a directory for the next one to come from."""

    def __init__(self, root: Path) -> None:
        self.store = store_with(root / "m", 1, 2)
        self.source = root / "incoming"
        self.source.mkdir()
        self.before = fingerprint(root / "m")
        current = self.store.current()
        assert current is not None
        self.accumulator = current.merged
        self.copy = {key: value.clone() for key, value in current.merged.items()}
        self.refused = 0

    @contextmanager
    def must_refuse(self) -> Iterator[None]:
        with pytest.raises(REFUSED):
            yield
        self.refused += 1

    def is_untouched(self) -> bool:
        return same(self.accumulator, self.copy) and fingerprint(self.store.path) == self.before

    def write(self, content: bytes, **config: Any) -> None:
        (self.source / "adapter_config.json").write_text(json.dumps({**CONFIG, "use_dora": False, **config}))
        (self.source / "adapter_model.safetensors").write_bytes(content)


def corrupt(data: st.DataObject, place: Place) -> None:
    """One corrupt input, through memory or through a file, at the pure merge and at the transaction."""
    if data.draw(st.integers(0, 4)) == 0:
        place.write(torn(data, save(state(data.draw(st.integers(0, 99))))))
        with place.must_refuse():
            slao.merge_trained(place.store, place.source)
        return
    tensors = state(data.draw(st.integers(0, 99)))
    for corruption in data.draw(st.lists(st.sampled_from(CORRUPTIONS), min_size=1, max_size=1)):
        corruption(data, tensors)
    with place.must_refuse():
        slao.merge(place.accumulator, tensors, 3, dtypes=dict.fromkeys(KEYS, torch.float32))
    with pytest.raises(REFUSED):
        if data.draw(st.booleans()):
            place.write(save({key: value.contiguous() for key, value in tensors.items()}))
            slao.merge_trained(place.store, place.source)
        else:
            slao.merge_trained(place.store, slao.Adapter(tensors, adapter(0).config, "corrupt"))


def run(tmp_path: Path, count: int) -> Place:
    place = Place(tmp_path)

    @settings(
        deadline=None,
        max_examples=count,
        print_blob=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def refused_and_untouched(data: st.DataObject) -> None:
        corrupt(data, place)
        assert place.is_untouched()

    refused_and_untouched()
    assert place.refused >= count
    return place


def test_no_corrupt_input_gets_past_the_check_or_changes_the_accumulator(tmp_path: Path) -> None:
    run(tmp_path, 300)


@pytest.mark.torture
def test_none_of_ten_thousand_corrupt_inputs_does(tmp_path: Path) -> None:
    place = run(tmp_path, 10_000)
    print(f"{place.refused} corrupt inputs, all refused; the accumulator is unchanged in memory and on disk")


@pytest.mark.parametrize("corruption", CORRUPTIONS, ids=lambda c: c.__name__)
def test_every_kind_of_corruption_is_really_generated_and_refused(tmp_path: Path, corruption: Corruption) -> None:
    place = Place(tmp_path)

    @settings(deadline=None, max_examples=15, print_blob=True, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def refused(data: st.DataObject) -> None:
        tensors = state(5)
        corruption(data, tensors)
        assert not (tensors.keys() == state(5).keys() and same(tensors, state(5)))
        with pytest.raises(REFUSED):
            slao.merge_trained(place.store, slao.Adapter(tensors, adapter(0).config, "corrupt"))

    refused()
    assert place.is_untouched()


def test_the_uncorrupted_adapter_is_merged(tmp_path: Path) -> None:
    """Else the tests above would hold for a store that refuses everything."""
    place = Place(tmp_path)
    place.write(save(state(5)))
    assert slao.merge_trained(place.store, place.source).index == 3
