"""What the machine offers, tried out and with its reason."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from trainwarden import device
from trainwarden.capability import Outcome, ProbeReport, Quantity, Requirement, Status, Verdict
from trainwarden.report import environment

REPORT = ProbeReport(
    {"bf16": Verdict(Status.SUPPORTED, "a matrix product on cuda:0 is right")},
    {"vram": Quantity(2**36, "64.00 GiB", "on cuda:0")},
    [Outcome(Requirement("bf16"), "met", "supported", "a matrix product on cuda:0 is right")],
)


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return environment.describe(REPORT)


def test_everything_found_is_strict_json(found: dict[str, Any]) -> None:
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_packages_are_listed_by_their_versions(found: dict[str, Any]) -> None:
    assert found["packages"]["torch"] == torch.__version__
    assert environment._version("no-such-package") is None


def test_the_text_has_every_part(found: dict[str, Any]) -> None:
    shown = environment.probe_text(found, REPORT)
    for title in ("machine", "devices", "abilities", "amounts", "requirements", "packages"):
        assert f"{title}\n" in shown
    assert "  bf16  supported: a matrix product on cuda:0 is right\n" in shown


def test_requirements_that_nobody_has_made_are_left_out(found: dict[str, Any]) -> None:
    nothing_asked = ProbeReport(REPORT.verdicts, REPORT.quantities)
    assert "requirements" not in environment.probe_text(found, nothing_asked)


def test_a_device_whose_sensors_are_silent_is_shown_with_unknowns(found: dict[str, Any]) -> None:
    silent = device.unreadable(0, "GPU-1", "H200", device.Unknown("the driver does not answer"), 0.0)
    row = environment.probe_text({**found, "devices": [silent.to_dict()], "devices_note": ""}, REPORT)
    assert "cuda:0  H200, unknown, unknown" in row


def test_a_driver_that_is_not_there_says_why() -> None:
    assert environment._said(device.Unsupported("no driver")) == "unsupported (no driver)"
    assert environment._said("570.86.15") == "570.86.15"
