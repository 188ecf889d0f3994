"""Whether bitsandbytes packs weights and keeps 8-bit states: tried in a process of its own, on the run's device."""

from __future__ import annotations

import importlib.util

import pytest

from tests.capability.scripted import ScriptedMachine, without_gpu
from trainwarden.capability import Machine, require_quantized
from trainwarden.capability.verdict import unknown
from trainwarden.errors import QuantizationUnavailableError


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="it needs bitsandbytes")
def test_on_this_machine_both_really_work_on_the_cpu() -> None:
    found = require_quantized(["nf4", "adam8bit"], on_cpu=True)
    assert found["nf4"].supported
    assert found["nf4"].reason == "a 4-bit layer of bitsandbytes on cpu is right"
    assert found["adam8bit"].reason == "a step of bitsandbytes' AdamW8bit on cpu is right"


def test_on_a_gpu_it_is_tried_there() -> None:
    machine = ScriptedMachine(installed=("torch", "bitsandbytes"))
    require_quantized(["nf4", "adam8bit"], on_cpu=False, machine=machine)
    assert machine.tasks == {"nf4", "adam8bit"}


def test_on_a_cpu_that_was_asked_for_it_is_tried_there_though_there_is_a_gpu() -> None:
    machine = ScriptedMachine(installed=("torch", "bitsandbytes"))
    require_quantized(["nf4"], on_cpu=True, machine=machine)
    assert machine.tasks == {"nf4_on_cpu"}


def test_without_a_usable_gpu_it_is_tried_on_the_cpu() -> None:
    machine = without_gpu(installed=("torch", "bitsandbytes"))
    require_quantized(["adam8bit"], on_cpu=False, machine=machine)
    assert machine.tasks == {"adam8bit_on_cpu"}


def test_without_bitsandbytes_nothing_is_tried() -> None:
    machine: Machine = without_gpu()
    with pytest.raises(QuantizationUnavailableError) as caught:
        require_quantized(["adam8bit"], on_cpu=True, machine=machine)
    assert caught.value.details["what"] == "8-bit optimizer states"
    assert caught.value.details["fix"] == "pip install bitsandbytes"
    assert caught.value.exit_code == 69


def test_what_cannot_be_found_out_is_refused_too() -> None:
    machine = ScriptedMachine(installed=("torch", "bitsandbytes"), answers={"nf4": unknown("no answer within 120 s")})
    with pytest.raises(QuantizationUnavailableError, match="4-bit weights are not available on cuda: no answer"):
        require_quantized(["nf4"], on_cpu=False, machine=machine)
