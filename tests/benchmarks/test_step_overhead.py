"""The overhead benchmark's loops take turns, and their figures are paired with the bare loop's."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import step_overhead
import torch
from step_overhead import BARE, CLIP, GUARD, Case, Chain, Measurement, Spread, Timing, TurnTaker
from torch import nn

pytestmark = pytest.mark.filterwarnings("ignore")  # the peers' own warnings are not ours to fix

TINY = Case("tiny", lambda: Chain(2, 4), lambda: torch.randn(2, 4), steps=2, rounds=3, uncounted=1)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[Measurement]:
    pytest.importorskip("lightning")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WARDEN_HOME", str(tmp_path_factory.mktemp("home")))
        return step_overhead.measure(TINY, step_overhead.contestants(), seed=0)


def test_every_loop_runs_its_rounds(measured: list[Measurement]) -> None:
    assert [m.contestant for m in measured] == [
        BARE, CLIP, GUARD, step_overhead.TRANSFORMERS, step_overhead.LIGHTNING
    ]  # fmt: skip
    assert all(m.rounds == 3 and m.wall_us.median > 0 and m.cpu_us.median > 0 for m in measured)


def test_the_bare_loop_adds_nothing_to_itself(measured: list[Measurement]) -> None:
    assert measured[0].added_cpu_us == Spread(0.0, 0.0, 0.0)
    assert measured[0].ratio_wall == Spread(1.0, 1.0, 1.0)


def test_no_loop_outlives_its_measurement(measured: list[Measurement]) -> None:
    assert not [thread for thread in threading.enumerate() if "_run" in thread.name]


def test_all_loops_train_the_same_way() -> None:
    loops = {BARE: step_overhead.bare, GUARD: step_overhead.guarded, CLIP: step_overhead.bare_with_clip}
    weights = {}
    for name, loop in loops.items():
        taker = TurnTaker(TINY, loop, seed=0, device="cpu")
        taker.start()
        taker.turn()
        taker.stop()
        weights[name] = nn.utils.parameters_to_vector(taker._model.parameters()).detach()
    assert torch.equal(weights[GUARD], weights[BARE])
    assert torch.equal(weights[CLIP], weights[BARE])


def test_a_difference_is_taken_within_a_round_so_that_a_slow_moment_cancels_out() -> None:
    base = [Timing(1.0, 1.0), Timing(9.0, 9.0), Timing(2.0, 2.0)]
    own = [Timing(1.5, 1.25), Timing(9.5, 9.25), Timing(2.5, 2.25)]
    found = step_overhead._measurement(TINY, GUARD, own, base)
    assert found.added_wall_us == Spread(0.5e6, 0.5e6, 0.5e6)
    assert found.added_cpu_us == Spread(0.25e6, 0.25e6, 0.25e6)
    assert found.added_least_cpu_us == 0.25e6
    assert step_overhead.guard_added_us([found]) == {"tiny": {"median": 0.25e6, "least": 0.25e6}}


def test_a_loop_that_fails_fails_the_measurement() -> None:
    def broken(loader: object, model: nn.Module) -> None:
        raise ValueError("no loop")

    with pytest.raises(ValueError, match="no loop"):
        step_overhead.measure(TINY, {BARE: broken}, seed=0)


def test_a_language_model_learns_from_a_step() -> None:
    torch.manual_seed(0)
    model = step_overhead.LanguageModel(1, 16, 32)
    model(torch.randint(32, (2, 9)))["loss"].backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_report_is_written_and_its_status_tells_whether_the_limit_holds(
    measured: list[Measurement], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(step_overhead, "CASES", (TINY,))
    monkeypatch.setattr(step_overhead, "LIMIT_US", float("1e9"))
    assert step_overhead._report(measured, 0, "cpu", tmp_path) == 0
    monkeypatch.setattr(step_overhead, "LIMIT_US", -1e9)
    assert step_overhead._report(measured, 0, "cpu", tmp_path) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"step_overhead.json", "step_overhead.md"}
    assert GUARD in capsys.readouterr().out


def test_the_profile_names_the_functions_of_the_guard(capsys: pytest.CaptureFixture[str]) -> None:
    step_overhead.profile(TINY, seed=0, device="cpu", steps=4)
    assert "backward" in capsys.readouterr().out
