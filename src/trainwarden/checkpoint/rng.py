"""The random number generators that a training step draws from, captured and restored.

Cheap enough for every step: about 2 µs on the CPU; about 10 µs more for Python's generator and 25 µs for numpy's, whose
624 words are copied one by one, when they were drawn from (numpy's with ``reuse_numpy``). Nothing is imported for it: a
generator that was never loaded was never drawn from.
"""

from __future__ import annotations

import ctypes
import functools
import random
import struct
import sys
from typing import Any

import torch


def capture_rng(*, reuse_numpy: bool = False) -> dict[str, Any]:
    """The state of Python's `random`, numpy's global generator, and torch's CPU and CUDA generators.

    numpy is left out if `numpy.random` was never imported, CUDA if it is not initialised. The result is an
    independent copy and can be stored in a checkpoint.
    """
    state: dict[str, Any] = {"python": _capture_python(), "torch": torch.get_rng_state()}
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        state["numpy"] = _capture_numpy(numpy_random) if reuse_numpy else numpy_random.get_state(legacy=False)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


_PYTHON_HEAD_BYTES = object.__basicsize__  # of the C object, before its index (int) and words (uint32)
_PYTHON_STATE_BYTES = 4 + 624 * 4
_last_python: tuple[bytes, Any, Any] | None = None


def _capture_python() -> Any:
    """`random.getstate()`; the tuple of the last time if nothing was drawn since, for making its 625 numbers is slow.

    The words are compared where the generator keeps them, if it is seen to keep them there.
    """
    global _last_python
    generator: Any = random._inst  # the one behind the functions of the module
    if type(generator) is not random.Random or not _words_are_visible():
        return random.getstate()
    words = ctypes.string_at(id(generator) + _PYTHON_HEAD_BYTES, _PYTHON_STATE_BYTES)
    kept_back = vars(generator)["gauss_next"]  # a deviate that needs no new words
    if _last_python is None or _last_python[0] != words or _last_python[1] != kept_back:
        _last_python = words, kept_back, random.getstate()
    return _last_python[2]


@functools.cache
def _words_are_visible() -> bool:
    """Whether this Python lays its generator out as CPython does."""
    if sys.implementation.name != "cpython":
        return False
    probe = random.Random(1)
    probe.random()
    _, words, _ = probe.getstate()
    index, *found = struct.unpack("=i624I", ctypes.string_at(id(probe) + _PYTHON_HEAD_BYTES, _PYTHON_STATE_BYTES))
    return (*found, index) == tuple(words)


_MT19937_STATE_BYTES = 624 * 4 + 4  # its words and the position in them
_last_numpy: tuple[bytes, dict[str, Any]] | None = None


def _capture_numpy(numpy_random: Any) -> dict[str, Any]:
    """The state of numpy's legacy generator; the dictionary of the last time if nothing was drawn since.

    What it cannot see: a generator that is set back (seeded, or `numpy.random.set_state`) between two captures and then
    comes to the very words of the first with a kept-back deviate that was not there then.
    """
    global _last_numpy
    generator = numpy_random.get_bit_generator()
    if type(generator).__name__ != "MT19937":
        found: dict[str, Any] = numpy_random.get_state(legacy=False)
        return found
    words = ctypes.string_at(generator.ctypes.state_address, _MT19937_STATE_BYTES)
    if _last_numpy is None or _last_numpy[0] != words:
        found = numpy_random.get_state(legacy=False)
        # A normal deviate kept back for the next call can be drawn without the words changing.
        _last_numpy = None if found["has_gauss"] else (words, found)
        return found
    return _last_numpy[1]


def restore_rng(state: dict[str, Any]) -> None:
    """Put every generator that `capture_rng` saw back, so that the same draws follow.

    Generators of CUDA devices that this machine lacks are skipped: continuing bit-identically needs the same
    hardware anyway. Raises KeyError, TypeError, ValueError or RuntimeError for a state that `capture_rng`
    did not make.
    """
    global _last_numpy
    _last_numpy = None
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if "numpy" in state:
        import numpy as np

        np.random.set_state(state["numpy"])
    for device, device_state in enumerate(state.get("cuda", ())[: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(device_state, device)
