"""Captured generators, restored, draw the same again."""

from __future__ import annotations

import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from trainwarden.checkpoint import capture_rng, restore_rng

from .states import round_trip, same


def draws() -> list[object]:
    return [
        random.random(),
        random.gauss(0, 1),
        random.sample(range(100), 5),
        np.random.rand(),
        np.random.randn(3).tolist(),
        torch.rand(3).tolist(),
        torch.randn(5).tolist(),
        torch.randperm(9).tolist(),
        torch.nn.functional.dropout(torch.ones(20)).tolist(),
    ]


def test_the_same_draws_follow_a_restored_state() -> None:
    draws()
    state = capture_rng()
    expected = draws()
    assert draws() != expected
    restore_rng(state)
    assert draws() == expected


def test_the_same_draws_follow_a_state_from_a_checkpoint() -> None:
    state = capture_rng()
    stored = round_trip(state)
    assert same(stored, state)
    expected = draws()
    restore_rng(stored)
    assert draws() == expected


def test_a_pending_second_half_of_a_gaussian_pair_is_part_of_the_state() -> None:
    random.gauss(0, 1)
    np.random.randn()
    torch.randn(1)
    state = round_trip(capture_rng())
    expected = (random.gauss(0, 1), np.random.randn(), torch.randn(1).item())
    restore_rng(state)
    assert (random.gauss(0, 1), np.random.randn(), torch.randn(1).item()) == expected


def test_a_captured_state_does_not_move_with_the_generators() -> None:
    state = capture_rng()
    stored = round_trip(state)
    draws()
    assert same(state, stored)


def test_capturing_and_restoring_draw_nothing() -> None:
    state = capture_rng()
    restore_rng(capture_rng())
    assert same(capture_rng(), state)


def test_cuda_is_not_asked_before_it_is_used() -> None:
    assert ("cuda" in capture_rng()) == torch.cuda.is_initialized()


def test_a_state_with_devices_that_are_not_here_restores_the_others() -> None:
    state = capture_rng()
    expected = draws()
    restore_rng(
        state | {"cuda": [torch.zeros(16, dtype=torch.uint8)] * 100} if not torch.cuda.is_available() else state
    )
    assert draws() == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_same_draws_follow_on_every_cuda_device() -> None:
    def draw() -> list[list[float]]:
        return [torch.rand(4, device=device).tolist() for device in range(torch.cuda.device_count())]

    draw()
    state = round_trip(capture_rng())
    expected = draw()
    restore_rng(state)
    assert draw() == expected


def test_numpy_random_is_neither_imported_nor_missed() -> None:
    script = """if True:
        import sys, torch
        from trainwarden.checkpoint import capture_rng, restore_rng
        loaded = "numpy.random" in sys.modules
        state = capture_rng()
        assert ("numpy.random" in sys.modules) == loaded == ("numpy" in state)
        restore_rng(state)
        import numpy as np
        np.random.seed(1)
        state = capture_rng()
        first = np.random.rand()
        restore_rng(state)
        assert np.random.rand() == first
    """
    subprocess.run([sys.executable, "-c", script], check=True)


@example(draws=["normal", "keep", "normal", "none", "restore", "none"], seed=0)
@given(
    draws=st.lists(st.sampled_from(["none", "uniform", "normal", "integers", "seed", "keep", "restore"]), max_size=30),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_capture_of_numpy_is_the_present_state_whatever_was_drawn_since_the_last(draws: list[str], seed: int) -> None:
    """Captures reuse an earlier one when nothing was drawn; a kept-back normal deviate must not be overlooked."""
    np.random.seed(seed)
    earlier = capture_rng()
    capture_rng(reuse_numpy=True)  # or the last example's may be reused: setting back between two captures is not seen
    for draw in draws:
        if draw == "uniform":
            np.random.rand()
        elif draw == "normal":
            np.random.randn()
        elif draw == "integers":
            np.random.randint(0, 10, size=3)
        elif draw == "seed":
            np.random.seed(seed)
        elif draw == "keep":
            earlier = capture_rng()
        elif draw == "restore":
            restore_rng(earlier)
        captured = capture_rng(reuse_numpy=True)["numpy"]
        truth = np.random.get_state(legacy=False)
        assert captured["has_gauss"] == truth["has_gauss"]
        assert captured["gauss"] == truth["gauss"]
        assert captured["state"]["pos"] == truth["state"]["pos"]
        assert (captured["state"]["key"] == truth["state"]["key"]).all()


@given(
    draws=st.lists(st.sampled_from(["none", "random", "gauss", "sample", "seed", "keep", "restore"]), max_size=30),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_capture_of_python_is_the_present_state_whatever_was_drawn_since_the_last(
    draws: list[str], seed: int
) -> None:
    random.seed(seed)
    earlier = capture_rng()
    for draw in draws:
        if draw == "random":
            random.random()
        elif draw == "gauss":
            random.gauss(0, 1)
        elif draw == "sample":
            random.sample(range(50), 5)
        elif draw == "seed":
            random.seed(seed)
        elif draw == "keep":
            earlier = capture_rng()
        elif draw == "restore":
            restore_rng(earlier)
        assert capture_rng()["python"] == random.getstate()
