"""Several saved adapters in their order: all are checked before the first byte is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from trainwarden import slao
from trainwarden.errors import (
    AdapterNotFoundError,
    InvalidSettingError,
    SLAOMergeDivergedError,
    SLAOMergeError,
    UsageError,
)
from trainwarden.slao import chain

from . import reference
from .adapters import fingerprint, same, saved, state, store_with


@pytest.fixture
def tasks(tmp_path: Path) -> list[Path]:
    return [saved(tmp_path / f"task-{seed}", state(seed)) for seed in (1, 2, 3)]


def expected(*seeds: int) -> reference.Arrays:
    return reference.merged(reference.arrays(state(seed)) for seed in seeds)


def test_the_ith_adapter_comes_in_with_its_weight(tmp_path: Path, tasks: list[Path]) -> None:
    snapshot, steps = slao.merge_adapters(tasks, tmp_path / "m")
    assert reference.distance(snapshot.merged, expected(1, 2, 3)) < 1e-6
    assert [step.record.index for step in steps] == [1, 2, 3]
    assert [step.record.weight for step in steps] == pytest.approx([1, 2**-0.5, 3**-0.5])
    assert same(load_file(tmp_path / "m" / "adapter_model.safetensors"), snapshot.exported())
    assert [r.kept for r in slao.SlaoStore(tmp_path / "m").history()] == ["kept", "kept", "current"]


@pytest.mark.parametrize("position", [0, 1, 2])
def test_one_that_has_diverged_leaves_nothing_written_wherever_it_stands(
    tmp_path: Path, tasks: list[Path], position: int
) -> None:
    bad = state(9)
    bad[next(key for key in bad if "lora_B" in key)][0, 0] = float("inf")
    save_file(bad, tasks[position] / "adapter_model.safetensors")
    with pytest.raises(SLAOMergeDivergedError) as raised:
        slao.merge_adapters(tasks, tmp_path / "m")
    assert raised.value.run_index == position + 1
    assert not (tmp_path / "m").exists()


def test_one_that_is_torn_leaves_an_older_output_as_it_was(tmp_path: Path, tasks: list[Path]) -> None:
    store_with(tmp_path / "m", 5, 6)
    before = fingerprint(tmp_path / "m")
    file = tasks[2] / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(SLAOMergeError, match="it is damaged"):
        slao.merge_adapters(tasks, tmp_path / "m")
    assert fingerprint(tmp_path / "m") == before


def test_an_output_of_ours_is_continued_in_place(tmp_path: Path, tasks: list[Path]) -> None:
    slao.merge_adapters(tasks[:2], tmp_path / "m")
    snapshot, steps = slao.merge_adapters([tmp_path / "m", tasks[2]], tmp_path / "m")
    assert [step.record.index for step in steps] == [3]
    assert reference.distance(snapshot.merged, expected(1, 2, 3)) < 1e-6
    assert snapshot.sequence == 3


def test_an_output_of_ours_is_continued_elsewhere_with_its_count_and_in_float32(tmp_path: Path) -> None:
    half = [saved(tmp_path / f"half-{s}", state(s, dtype=torch.bfloat16)) for s in (1, 2, 3)]
    slao.merge_adapters(half[:2], tmp_path / "m")
    before = fingerprint(tmp_path / "m")
    snapshot, steps = slao.merge_adapters([tmp_path / "m", half[2]], tmp_path / "n")
    whole, _ = slao.merge_adapters(half, tmp_path / "whole")
    assert same(snapshot.merged, whole.merged)  # not from the rounded export
    assert [(step.record.action, step.record.index) for step in steps] == [("start", 2), ("merge", 3)]
    assert fingerprint(tmp_path / "m") == before


def test_a_new_chain_into_an_older_output_keeps_what_was_there(tmp_path: Path, tasks: list[Path]) -> None:
    old, _ = slao.merge_adapters(tasks[:2], tmp_path / "m")
    again, _ = slao.merge_adapters([tasks[2], tasks[0]], tmp_path / "m")
    assert (again.sequence, again.index) == (4, 2)
    assert reference.distance(again.merged, expected(3, 1)) < 1e-6
    store = slao.SlaoStore(tmp_path / "m")
    assert [r.action for r in store.history()] == ["start", "merge", "start", "merge"]
    assert same(store.rollback(2).merged, old.merged)


def test_the_same_command_again_gives_the_same_adapter(tmp_path: Path, tasks: list[Path]) -> None:
    policy = slao.MergePolicy(mode="dare", seed=3)
    one, _ = slao.merge_adapters(tasks, tmp_path / "m", policy)
    two, _ = slao.merge_adapters(tasks, tmp_path / "m", policy)
    assert same(one.merged, two.merged)
    assert two.sequence == 6


def test_without_a_recorded_lineage_the_overlap_is_reported(tmp_path: Path, tasks: list[Path]) -> None:
    _, steps = slao.merge_adapters(tasks, tmp_path / "m")
    assert [len(step.notes) for step in steps] == [0, 1, 1]
    found = slao.overlap(state(1), state(2))
    mean = sum(found.values()) / len(found)
    assert f"no recorded lineage; its A subspaces overlap by {mean:.2f} on average" in steps[1].notes[0]
    assert f"least {min(found.values()):.2f}" in steps[1].notes[0]
    assert steps[1].record.overlap == pytest.approx(mean)


def test_a_recorded_lineage_is_believed_when_it_is_right(tmp_path: Path, tasks: list[Path]) -> None:
    for position in (1, 2):
        digest = slao.read_adapter(tasks[position - 1]).digest()
        slao.record_lineage(tasks[position], slao.Start(index=position + 1, started_from=digest))
    _, steps = slao.merge_adapters(tasks, tmp_path / "m")
    assert [step.record.recorded_lineage for step in steps] == [False, True, True]
    assert all(not step.notes and step.record.overlap is None for step in steps)
    _, wrong = slao.merge_adapters([tasks[1], tasks[0], tasks[2]], tmp_path / "wrong-order")
    assert "says that it was started from another adapter" in wrong[2].notes[0]


def test_adapters_of_two_base_models_are_announced(tmp_path: Path, tasks: list[Path]) -> None:
    other = saved(tmp_path / "other", state(4), base_model_name_or_path="another")
    _, steps = slao.merge_adapters([tasks[0], other], tmp_path / "m")
    assert any("was trained on another, the first one on base" in note for note in steps[1].notes)


def test_another_configuration_is_refused(tmp_path: Path, tasks: list[Path]) -> None:
    other = saved(tmp_path / "other", state(4), lora_alpha=32)
    with pytest.raises(SLAOMergeError, match="lora_alpha is 32, and 6 in the accumulator"):
        slao.merge_adapters([*tasks, other], tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_an_output_that_is_not_ours_is_refused_before_anything_is_read(tmp_path: Path, tasks: list[Path]) -> None:
    before = fingerprint(tasks[0])
    with pytest.raises(InvalidSettingError, match="a new directory, or one that an earlier merge wrote"):
        slao.merge_adapters([tmp_path / "nowhere", tasks[1]], tasks[0])
    assert fingerprint(tasks[0]) == before


@pytest.mark.parametrize("count", [0, 1])
def test_two_adapters_are_the_least(tmp_path: Path, tasks: list[Path], count: int) -> None:
    with pytest.raises(UsageError, match="at least two adapters"):
        slao.merge_adapters(tasks[:count], tmp_path / "m")


def test_an_output_that_a_kill_left_empty_cannot_be_continued(tmp_path: Path, tasks: list[Path]) -> None:
    with slao.SlaoStore(tmp_path / "m").writing():
        pass  # claimed, and nothing committed
    with pytest.raises(AdapterNotFoundError, match="nothing has been merged yet"):
        slao.merge_adapters([tmp_path / "m", tasks[1]], tmp_path / "m")
    assert slao.merge_adapters(tasks, tmp_path / "m")[0].index == 3


def test_an_adapter_that_changes_between_check_and_merge_is_noticed(
    tmp_path: Path, tasks: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[Path] = []
    real = chain.read_adapter

    def changing(path: Path) -> slao.Adapter:
        reads.append(path)
        if len(reads) == 5:  # the second one, read again
            saved(path, state(99))
        return real(path)

    monkeypatch.setattr(chain, "read_adapter", changing)
    with pytest.raises(SLAOMergeError, match="it was changed while it was being merged"):
        slao.merge_adapters(tasks, tmp_path / "m")
    assert not (tmp_path / "m" / "adapter_model.safetensors").exists()  # no half of a chain is taken for the whole
