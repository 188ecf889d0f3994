"""Memory and temperature in the log lines: read, or unknown."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from trainwarden.device import DeviceList, Reading, Sampler, Unknown, Unsupported, unreadable
from trainwarden.train.sensors import Sensors

CUDA = torch.device("cuda", 1)


class Card:
    """A GPU whose temperature is scripted."""

    def __init__(self, index: int, temperatures: list[Any]) -> None:
        self.index, self.uuid, self.name = index, f"GPU-{index}", "scripted"
        self.temperatures = temperatures
        self.read_all = threading.Event()

    def read(self) -> Reading:
        import dataclasses

        value = self.temperatures.pop(0) if len(self.temperatures) > 1 else self.temperatures[0]
        if len(self.temperatures) == 1:
            self.read_all.set()
        blank = unreadable(self.index, self.uuid, self.name, Unsupported("not scripted"), 0.0)
        return dataclasses.replace(blank, temperature_c=value)


class Cards:
    """A source of scripted cards."""

    def __init__(self, *cards: Card) -> None:
        self.cards = cards

    def open(self) -> DeviceList:
        return DeviceList(self.cards, "")

    def drain_xids(self) -> Sequence[tuple[int, str | None]]:
        return ()

    def unwatched(self) -> Mapping[str, Any]:
        return {}


def readings(*temperatures: Any) -> tuple[float | None, float | None]:
    """The temperature that training on device 1 reports in the end, and the highest."""
    other, own = Card(0, [99.0]), Card(1, [*temperatures])
    with Sampler(Cards(other, own)) as sampler:
        sensors = Sensors(CUDA, sampler)
        assert own.read_all.wait(10.0)
        for _ in range(1000):
            value = sensors.temperature_c()
            if value is not None:
                break
            threading.Event().wait(0.005)
        return value, sensors.max_temperature_c


def test_the_temperature_is_that_of_the_device_that_trains() -> None:
    assert readings(61.0) == (61.0, 61.0)


@pytest.mark.parametrize("missing", [Unsupported("no sensor"), Unknown("timed out")])
def test_a_temperature_that_cannot_be_read_is_unknown_and_never_zero(missing: Any) -> None:
    own = Card(1, [missing])
    with Sampler(Cards(Card(0, [99.0]), own)) as sampler:
        sensors = Sensors(CUDA, sampler)
        assert own.read_all.wait(10.0)
        assert sensors.temperature_c() is None
        assert sensors.max_temperature_c is None


def test_a_cpu_has_memory_and_no_temperature() -> None:
    sensors = Sensors(torch.device("cpu"), None)
    sensors.forget_peak_memory()
    assert sensors.temperature_c() is None
    assert (sensors.memory_bytes() or 0) > 2**20
    assert (sensors.peak_memory_bytes() or 0) >= 2**20


def test_before_the_guard_has_started_its_sampler_the_temperature_is_unknown() -> None:
    assert Sensors(CUDA, Sampler(Cards(Card(1, [61.0])))).temperature_c() is None


def test_a_gpus_peak_is_counted_from_the_beginning_of_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    forgotten: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", forgotten.append)
    Sensors(CUDA, None).forget_peak_memory()
    Sensors(torch.device("cpu"), None).forget_peak_memory()
    assert forgotten == [CUDA]
