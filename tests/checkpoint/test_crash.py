"""Kill a save, or cut the power, at every operation it makes on the disk: nothing is ever lost."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from trainwarden.checkpoint import CheckpointStore

from . import faults, power_cut
from .states import is_intact, newest, saved, state_of

Scenario = Callable[[Path], Callable[[], object]]


def first(directory: Path) -> Callable[[], object]:
    return lambda: saved(directory, 2)


def another(directory: Path) -> Callable[[], object]:
    saved(directory, 1)
    return lambda: saved(directory, 2, keep_last=2)


def successor(directory: Path) -> Callable[[], object]:
    saved(directory, 1)
    return lambda: saved(directory, 2, keep_last=1)


def same_step(directory: Path) -> Callable[[], object]:
    saved(directory, 2)
    return lambda: saved(directory, 2, keep_last=1)


def retrained_step(directory: Path) -> Callable[[], object]:
    saved(directory, 1, 2)
    (directory / "step-00000002" / "optimizer.json").write_text("damaged")
    return lambda: saved(directory, 2, keep_last=1)


def after_a_kill(directory: Path) -> Callable[[], object]:
    saved(directory, 1)
    assert faults.killed_at(12, lambda: saved(directory, 2))
    return lambda: saved(directory, 2, keep_last=1)


SCENARIOS: dict[str, Scenario] = {
    scenario.__name__: scenario for scenario in (first, another, successor, same_step, retrained_step, after_a_kill)
}


def check(directory: Path, scenario: str) -> int:
    """The step that a new process would go on from; fails unless it is a whole, correct state."""
    rejected: list[tuple[str, str]] = []
    checkpoint = newest(directory, rejected)
    damaged = ["step-00000002"] if scenario == "retrained_step" else []
    assert [name for name, _ in rejected] in ([], damaged)
    if checkpoint is None:
        assert scenario == "first"
        return 0
    assert is_intact(checkpoint)
    return checkpoint.step


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_killed_at_any_operation_a_whole_state_is_left_and_the_next_save_cleans_up(
    tmp_path: Path, scenario: str
) -> None:
    template = tmp_path / "template" / "checkpoints"
    SCENARIOS[scenario](template)
    steps = []
    position, killed = 0, True
    while killed:
        position += 1
        directory = tmp_path / str(position) / "checkpoints"
        if template.exists():
            shutil.copytree(template, directory)
        else:
            directory.parent.mkdir()
        killed = faults.killed_at(position, partial(saved, directory, 2, keep_last=1))
        steps.append(check(directory, scenario))
        saved(directory, 3, keep_last=1)
        assert [path.name for path in directory.iterdir()] == ["step-00000003"]
        shutil.rmtree(directory.parent)
    assert position > 20
    assert steps == sorted(steps)  # once the new one is there it stays
    assert steps[-1] == 2


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_power_cut_after_any_operation_leaves_a_whole_state(tmp_path: Path, scenario: str) -> None:
    root = tmp_path / "run"
    root.mkdir()
    action = SCENARIOS[scenario](root / "checkpoints")
    disk = power_cut.Disk(root)
    fates = {"lost": power_cut.lost, "kept": power_cut.kept}
    fates |= {f"seed {seed}": power_cut.at_random(seed) for seed in range(4)}
    steps: dict[str, list[int]] = {fate: [] for fate in fates}

    def cut(name: str, real: Callable[..., object], arguments: tuple[object, ...]) -> object:
        result = disk.follow(name, real, arguments)
        for fate, survives in fates.items():
            target = tmp_path / "after"
            disk.after_power_cut(target, survives)
            steps[fate].append(check(target / "checkpoints", scenario))
            shutil.rmtree(target)
        return result

    with faults.operations(cut):
        action()
    assert len(steps["lost"]) > 20
    assert steps["lost"] == sorted(steps["lost"])
    assert {fate: seen[-1] for fate, seen in steps.items()} == dict.fromkeys(fates, 2)


def test_the_power_cut_loses_what_is_not_synced(tmp_path: Path) -> None:
    """The simulation itself: a writer without fsync must fail under it."""
    root = tmp_path / "run"
    root.mkdir()
    disk = power_cut.Disk(root)
    with faults.operations(disk.follow), pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainwarden.checkpoint.durable.os.fsync", int)
        saved(root / "checkpoints", 1)
    disk.after_power_cut(tmp_path / "lost", power_cut.lost)
    assert list((tmp_path / "lost").iterdir()) == []
    disk.after_power_cut(tmp_path / "kept", power_cut.kept)
    assert check(tmp_path / "kept" / "checkpoints", "another") == 1


def test_a_kill_between_two_saves_of_a_long_run_loses_at_most_the_save_it_hit(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=2)
    for step in range(1, 12):
        operations = 7 * step % 40 + 1
        if faults.killed_at(operations, partial(saved, tmp_path, step, keep_last=2)):
            assert check(tmp_path, "first") in (step - 1, step)
        store.save(step, state_of(step), {"step": step})
        assert check(tmp_path, "another") == step
