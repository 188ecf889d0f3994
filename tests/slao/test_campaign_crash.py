"""A campaign that is killed with SIGKILL, wherever it is: the same command goes on, and the result is the same."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from torch import Tensor

from tests.checkpoint import faults
from trainwarden import slao
from trainwarden.events import Event, StepCompleted
from trainwarden.slao import campaign as campaign_module
from trainwarden.slao import export
from trainwarden.slao.campaign import Campaign
from trainwarden.slao.campaign_record import CampaignLog

from .adapters import same
from .campaigns import TWO, Told, accumulator, merged_tasks, run, write_work

pytestmark = pytest.mark.usefixtures("campaign")
STEPS = 6
"""Of the whole campaign: two tasks of three."""


def die(*_: object, **__: object) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def in_step(task: str, step: int) -> Callable[[Event], None]:
    """An observer that kills its process in that step of that task."""
    place: list[str] = []

    def observe(event: Event) -> None:
        if event.name == "run_started":
            place[:] = [Path(event.run_dir).name]  # type: ignore[attr-defined]
        if isinstance(event, StepCompleted) and (place, event.step) == ([task], step):
            die()

    return observe


@contextmanager
def watching(observer: Callable[[Event], None]) -> Iterator[Callable[[Event], None]]:
    yield observer


@contextmanager
def at_call(owner: Any, name: str, number: int, *, after: bool = False) -> Iterator[None]:
    """The process dies in the ``number``-th call, before or after what it does."""
    real, calls = getattr(owner, name), 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number and not after:
            die()
        result = real(*args, **kwargs)
        return die() if calls == number else result

    with mock.patch.object(owner, name, counted):
        yield


def killed(action: Callable[[], object]) -> bool:
    """Run it in a forked child; whether that was killed rather than came to its end."""
    child = os.fork()
    if not child:
        try:
            action()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, campaign_base: Path) -> dict[str, Tensor]:
    """What an undisturbed campaign merges."""
    work = write_work(tmp_path_factory.mktemp("undisturbed"), campaign_base)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WARDEN_HOME", str(work / "home"))
        patch.chdir(work)
        run(TWO)
        return accumulator()


def goes_on(expected: dict[str, Tensor], *, at_most: int) -> None:
    """Run it again: it comes to the same end, with so many steps at most."""
    told = Told()
    result = run(TWO, observers=[told])
    assert [task.state for task in result.tasks] == ["merged", "merged"]
    assert merged_tasks() == ["a", "b"]
    assert same(accumulator(), expected)
    assert slao.SlaoStore(result.merged_path).exported_sequence == 2
    assert told.steps_trained() <= at_most


PLACES: dict[str, tuple[Callable[[], AbstractContextManager[Any]], list[str], int]] = {
    "in the second step of a": (lambda: watching(in_step("a", 2)), [], 5),
    "in the second step of b": (lambda: watching(in_step("b", 2)), ["a"], 2),
    "before the training of b": (lambda: at_call(campaign_module, "trainer_from_config", 2), ["a"], 3),
    "between the training of b and its merge": (lambda: at_call(Campaign, "_merge", 2), ["a"], 0),
    "before the evaluation is recorded": (lambda: at_call(CampaignLog, "write", 5), ["a"], 0),
    "before the commit": (lambda: at_call(slao.SlaoStore, "commit", 2), ["a"], 0),
    "between the commit and the export": (lambda: at_call(export, "export", 2), ["a", "b"], 0),
    "after the commit": (lambda: at_call(slao.SlaoStore, "commit", 2, after=True), ["a", "b"], 0),
}
"""Where it is killed; the tasks that are merged then; the steps that are left at most: the checkpoint of the step
itself is not written yet."""


@pytest.mark.parametrize("place", PLACES)
def test_killed_anywhere_it_goes_on_and_finished_stages_are_not_trained_again(
    place: str, expected: dict[str, Tensor]
) -> None:
    fault, merged, at_most = PLACES[place]
    with fault() as observer:
        assert killed(lambda: run(TWO, observers=[observer] if observer else []))
    assert merged_tasks() == merged
    goes_on(expected, at_most=at_most)


def drawn(seed: int, count: int) -> list[float]:
    """Places of kills, as shares of all operations on the disk."""
    places = [random.Random(seed * 1000 + number).random() for number in range(count)]
    print(f"seed {seed}: {places}")
    return places


@pytest.mark.parametrize(
    ("seed", "kills"), [(1, 3), *(pytest.param(seed, 25, marks=pytest.mark.torture) for seed in range(2, 6))]
)
def test_killed_at_drawn_operations_on_the_disk_and_once_more_when_it_goes_on(
    seed: int, kills: int, expected: dict[str, Tensor]
) -> None:
    operations = faults.count(lambda: run(TWO, "output_dir=counted"))
    for place in drawn(seed, kills):
        faults.killed_at(1 + int(place * operations), lambda: run(TWO))
        faults.killed_at(1 + int(place * operations / 4), lambda: run(TWO))
        goes_on(expected, at_most=STEPS)
        Path("campaign").rename(f"campaign-{place}")
