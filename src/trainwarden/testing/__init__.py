"""Faults and devices on purpose, for testing a loop and its guard: shipped to users and used by our own tests."""

from trainwarden.testing.fake_device import FakeDevice, FakeSource, healthy_reading
from trainwarden.testing.faults import FailingAllocation, MemoryCeiling, NonFinite, out_of_memory_error

__all__ = [
    "FailingAllocation",
    "FakeDevice",
    "FakeSource",
    "MemoryCeiling",
    "NonFinite",
    "healthy_reading",
    "out_of_memory_error",
]
