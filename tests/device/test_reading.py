from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from trainwarden.device import ClocksEventReasons, RecoveryAction, Unknown, Unsupported, unreadable
from trainwarden.device.reading import SENSORS
from trainwarden.testing.fake_device import healthy_reading

MISSING = st.builds(Unsupported, st.text()) | st.builds(Unknown, st.text(), st.none() | st.integers(0, 999))


def test_no_bit_means_no_reason() -> None:
    reasons = ClocksEventReasons.decode(0)
    assert reasons.names == frozenset()
    assert str(reasons) == "none"
    assert not reasons.thermal


def test_the_bits_of_the_header_have_names() -> None:
    reasons = ClocksEventReasons.decode(0x1 | 0x8 | 0x40)
    assert reasons.names == {"gpu_idle", "hw_slowdown", "hw_thermal_slowdown"}
    assert str(reasons) == "gpu_idle, hw_slowdown, hw_thermal_slowdown"


def test_heat_is_told_by_the_thermal_bits_and_not_by_hw_slowdown_which_has_other_causes() -> None:
    assert ClocksEventReasons.decode(0x20).thermal
    assert ClocksEventReasons.decode(0x40).thermal
    assert not ClocksEventReasons.decode(0x8 | 0x4 | 0x80).thermal


@given(st.integers(0, 2**64 - 1))
def test_every_set_bit_gets_exactly_one_name_also_bits_of_the_future(raw: int) -> None:
    reasons = ClocksEventReasons.decode(raw)
    assert len(reasons.names) == raw.bit_count()
    assert reasons.raw == raw


def test_recovery_actions_of_the_header_have_names() -> None:
    assert [RecoveryAction.decode(code).name for code in (0, 1, 2, 7)] == [
        "none",
        "gpu_reset",
        "node_reboot",
        "system_reboot",
    ]


@given(st.integers(1, 2**31))
def test_any_recovery_action_but_none_is_needed_also_one_that_nobody_knows_yet(code: int) -> None:
    action = RecoveryAction.decode(code)
    assert action.needed
    assert action.name != "none"


def test_no_recovery_action_is_needed_at_none() -> None:
    assert not RecoveryAction.decode(0).needed


@given(st.sampled_from(SENSORS), MISSING)
def test_a_sensor_that_is_missing_is_listed_and_serialises_with_its_reason(
    sensor: str, missing: Unsupported | Unknown
) -> None:
    changes: dict[str, Any] = {sensor: missing}
    reading = healthy_reading(**changes)
    assert reading.missing() == {sensor: missing}
    assert json.loads(json.dumps(reading.to_dict()))[sensor] == {str(missing): missing.reason}


def test_a_whole_reading_serialises_with_units_in_its_names() -> None:
    stored = json.loads(json.dumps(healthy_reading().to_dict()))
    assert stored["temperature_c"] == 60.0
    assert stored["remapped_rows"] == {"corrected": 0, "uncorrected": 0, "pending": False, "failed": False}
    assert stored["clocks_event_reasons"] == {"raw": 0, "names": []}
    assert stored["recovery_action"] == {"code": 0, "name": "none"}


def test_a_device_of_which_nothing_can_be_read_says_so_in_every_sensor() -> None:
    gone = Unknown("GPU is lost", nvml_code=15)
    reading = unreadable(1, "GPU-1", "H100", gone, 5.0)
    assert reading.missing() == dict.fromkeys(SENSORS, gone)
    assert reading.lost
    assert reading.headroom_source == "none"
    assert reading.headroom_note == "GPU is lost"


def test_one_sensor_that_answers_lost_is_a_lost_gpu() -> None:
    assert healthy_reading(power_w=Unknown("GPU is lost", nvml_code=15)).lost
    assert not healthy_reading(power_w=Unknown("timeout", nvml_code=10)).lost


def test_one_sensor_that_asks_for_a_reset_is_a_gpu_that_needs_one() -> None:
    reading = healthy_reading(power_w=Unknown("GPU requires restart", nvml_code=16))
    assert reading.reset_required
    assert not reading.lost
