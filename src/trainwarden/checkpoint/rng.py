"""The random number generators that a training step draws from, captured and restored.

Cheap enough for every step: about 2 µs on the CPU; about 10 µs more for Python's generator and 25 µs for numpy's, whose
624 words are copied one by one, when they were drawn from (numpy's with ``reuse_numpy``). Nothing is imported for it: a
generator that was never loaded was never drawn from.
"""

from __future__ import annotations

import ctypes
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
    state: dict[str, Any] = {"python": _capture_python(), "torch": torch.default_generator.get_state()}
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        state["numpy"] = _capture_numpy(numpy_random) if reuse_numpy else numpy_random.get_state(legacy=False)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


_WITNESS_BYTES = 64
"""How much of a Mersenne twister is compared to tell whether it was drawn from: its index and 15 of its 624 words.

A draw moves the index; when that is back where it was, every word has been made anew, and the chance that 15 of them
are the same is 2⁻⁴⁸⁰.
"""


class _Witness:
    """A view of that part of ``generator``, which it keeps alive; ``words`` is ``None`` where it cannot be seen.

    A view, since a call through `ctypes` costs a step ten times as much.
    """

    def __init__(self, generator: Any, address: int | None) -> None:
        self.generator = generator
        self.words = None if address is None else memoryview((ctypes.c_uint8 * _WITNESS_BYTES).from_address(address))


_PYTHON_HEAD_BYTES = object.__basicsize__  # of the C object, before its index (int) and words (uint32)
_python_witness = _Witness(None, None)
_last_python: tuple[bytes, Any, Any] | None = None


def _capture_python() -> Any:
    """`random.getstate()`; the tuple of the last time if nothing was drawn since, for making its 625 numbers is slow.

    The words are compared where the generator keeps them, if it is seen to keep them there.
    """
    global _last_python, _python_witness
    generator: Any = random._inst  # the one behind the functions of the module
    if _python_witness.generator is not generator:
        visible = type(generator) is random.Random and _words_are_visible()
        _python_witness = _Witness(generator, id(generator) + _PYTHON_HEAD_BYTES if visible else None)
    if _python_witness.words is None:
        return random.getstate()
    words = _python_witness.words.tobytes()
    kept_back = generator.gauss_next  # a deviate that needs no new words
    if _last_python is None or _last_python[0] != words or _last_python[1] != kept_back:
        _last_python = words, kept_back, random.getstate()
    return _last_python[2]


def _words_are_visible() -> bool:
    """Whether this Python lays its generator out as CPython does."""
    if sys.implementation.name != "cpython":
        return False
    probe = random.Random(1)
    probe.random()
    _, words, _ = probe.getstate()
    index, *found = struct.unpack("=i624I", ctypes.string_at(id(probe) + _PYTHON_HEAD_BYTES, 4 + 624 * 4))
    return (*found, index) == tuple(words)


_MT19937_STATE_BYTES = 624 * 4 + 4  # its words and the position in them
_numpy_witness = _Witness(None, None)
_last_numpy: tuple[bytes, dict[str, Any]] | None = None


def _capture_numpy(numpy_random: Any) -> dict[str, Any]:
    """The state of numpy's legacy generator; the dictionary of the last time if nothing was drawn since.

    What it cannot see: a generator that is set back (seeded, or `numpy.random.set_state`) between two captures and then
    comes to the very words of the first with a kept-back deviate that was not there then.
    """
    global _last_numpy, _numpy_witness
    generator = numpy_random.get_bit_generator()
    if _numpy_witness.generator is not generator:
        end = generator.ctypes.state_address + _MT19937_STATE_BYTES
        twister = type(generator).__name__ == "MT19937"
        _numpy_witness, _last_numpy = _Witness(generator, end - _WITNESS_BYTES if twister else None), None
    if _numpy_witness.words is None:
        found: dict[str, Any] = numpy_random.get_state(legacy=False)
        return found
    words = _numpy_witness.words.tobytes()
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
