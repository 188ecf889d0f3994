"""Kill a merge, or cut the power, at every operation it makes on the disk: nothing is ever lost."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from tests.checkpoint import faults, power_cut
from trainwarden import slao
from trainwarden.errors import SLAOCheckpointError

from .adapters import adapter, same, saved, state, store_with


@dataclass(frozen=True)
class Scenario:
    """What is there before, and what is then done to it; both are given the store's path."""

    prepare: Callable[[Path], object]
    act: Callable[[Path], object]


def sources(path: Path) -> list[Path]:
    return [saved(path.parent / f"task-{seed}", state(seed, layers=1)) for seed in (1, 2)]


SCENARIOS = {
    "second": Scenario(lambda path: store_with(path, 1, layers=1), lambda path: merged(path, 2)),
    "chain": Scenario(sources, lambda path: slao.merge_adapters([path.parent / f"task-{s}" for s in (1, 2)], path)),
    "first": Scenario(lambda path: None, lambda path: merged(path, 1)),
    "retiring": Scenario(lambda path: store_with(path, 1, 2, layers=1), lambda path: merged(path, 3, keep_last=1)),
    "rollback": Scenario(lambda path: store_with(path, 1, 2, layers=1), lambda path: slao.SlaoStore(path).rollback(1)),
}


def in_ci(*names: str) -> pytest.MarkDecorator:
    """All scenarios, of which CI runs these; a kill costs a process, and a hundred of them a busy machine's minute."""
    chosen = [name if name in names else pytest.param(name, marks=pytest.mark.torture) for name in SCENARIOS]
    return pytest.mark.parametrize("scenario", chosen)


def merged(path: Path, seed: int, **options: Any) -> slao.Snapshot:
    return slao.merge_trained(slao.SlaoStore(path, **options), adapter(seed, layers=1))


def accumulators(*seeds: int) -> dict[str, Tensor]:
    result = slao.begin(state(seeds[0], layers=1))
    for index, seed in enumerate(seeds[1:], start=2):
        result = slao.merge(result.tensors, state(seed, layers=1), index)
    return result.tensors


POSSIBLE = {index: accumulators(*range(1, index + 1)) for index in (1, 2, 3)}


def check(path: Path) -> tuple[int, int]:
    """What a new process finds: its number and how many adapters; fails unless accumulator and export are whole."""

    def rejected(found: Path, reason: str) -> None:
        raise AssertionError(f"{found.name}: {reason}")

    snapshot = slao.SlaoStore(path, on_rejected=rejected).current()
    weights = path / "adapter_model.safetensors"
    exported = load_file(weights) if weights.exists() else None
    assert exported is None or any(same(exported, one) for one in POSSIBLE.values())
    if snapshot is None:
        assert exported is None
        return 0, 0
    assert same(snapshot.merged, POSSIBLE[snapshot.index])
    assert same(snapshot.finetuned, state(snapshot.index, layers=1))
    return snapshot.sequence, snapshot.index


@in_ci("second")
def test_killed_at_any_operation_the_old_or_the_new_accumulator_is_left_whole(tmp_path: Path, scenario: str) -> None:
    template = tmp_path / "template"
    template.mkdir()
    SCENARIOS[scenario].prepare(template / "m")
    before = check(template / "m")
    found = []
    position, killed = 0, True
    while killed:
        position += 1
        root = tmp_path / str(position)
        shutil.copytree(template, root)
        killed = faults.killed_at(position, partial(SCENARIOS[scenario].act, root / "m"))
        found.append(check(root / "m"))
        assert found[-1][0] >= before[0]
        follow_up(root / "m", index=found[-1][1])
        shutil.rmtree(root)
    assert position > 20
    assert found == sorted(found, key=lambda one: one[0])  # once the new one is there it stays
    print(f"{scenario}: killed at {position - 1} operations")


def follow_up(path: Path, *, index: int) -> None:
    """Whatever was left, the export is made up for and the next merge goes through."""
    store = slao.SlaoStore(path)
    store.export()
    current = store.current()
    assert (path / "adapter_model.safetensors").exists() == (current is not None)
    assert store.exported_sequence == (current.sequence if current else None)
    if current is not None:
        assert same(load_file(path / "adapter_model.safetensors"), current.exported())
    assert merged(path, 9).index == index + 1


@in_ci("second", "chain")
def test_a_power_cut_after_any_operation_leaves_the_old_or_the_new_accumulator(tmp_path: Path, scenario: str) -> None:
    root = tmp_path / "run"
    root.mkdir()
    SCENARIOS[scenario].prepare(root / "m")
    disk = power_cut.Disk(root)
    fates = {"lost": power_cut.lost, "kept": power_cut.kept}
    fates |= {f"seed {seed}": power_cut.at_random(seed) for seed in range(2)}
    found: dict[str, list[tuple[int, int]]] = {fate: [] for fate in fates}

    def cut(name: str, real: Callable[..., object], arguments: tuple[object, ...]) -> object:
        result = disk.follow(name, real, arguments)
        for fate, survives in fates.items():
            target = tmp_path / "after"
            disk.after_power_cut(target, survives)
            found[fate].append(check(target / "m"))
            shutil.rmtree(target)
        return result

    with faults.operations(cut):
        SCENARIOS[scenario].act(root / "m")
    assert len(found["lost"]) > 20
    assert [sequence for sequence, _ in found["lost"]] == sorted(sequence for sequence, _ in found["lost"])
    assert len({seen[-1] for seen in found.values()}) == 1


def test_a_disk_that_fails_at_any_operation_leaves_the_old_or_the_new_accumulator(tmp_path: Path) -> None:
    template = tmp_path / "template"
    store_with(template, 1, layers=1)
    counted = shutil.copytree(template, tmp_path / "counted")
    refused = 0
    for position in range(1, faults.count(lambda: merged(counted, 2)) + 1):
        path = shutil.copytree(template, tmp_path / str(position))
        try:
            with faults.operations(faults.failing_at(position, errno.EIO)):
                merged(path, 2)
        except SLAOCheckpointError:
            refused += 1
        assert check(path) in ((1, 1), (2, 2))
        shutil.rmtree(path)
    assert refused > 10
