"""Damage that the driver reports: what ends a run, what is only told, and what was so before."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainwarden.device import RecoveryAction, RemappedRows, Unknown, Unsupported, Xid, unreadable
from trainwarden.guards.health import Checkup, Finding, HealthPolicy, HealthState, xid_finding
from trainwarden.testing import healthy_reading

POLICY = HealthPolicy()
GOOD_ROWS = RemappedRows(0, 0, pending=False, failed=False)
WELL = Checkup(ecc_uncorrected=0, rows=GOOD_ROWS, recovery=RecoveryAction.decode(0))
NOTHING_READ = Checkup()

checkups = st.builds(
    Checkup,
    lost=st.booleans(),
    reset_required=st.booleans(),
    ecc_uncorrected=st.none() | st.integers(0, 5),
    rows=st.none() | st.builds(RemappedRows, st.just(0), st.just(0), st.booleans(), st.booleans()),
    recovery=st.none() | st.integers(0, 9).map(RecoveryAction.decode),
)


def xid(code: int, sequence: int = 1) -> Xid:
    return Xid(sequence, code, 0, "GPU-fake-0", 1.0)


def play(trace: Iterable[Checkup], policy: HealthPolicy = POLICY) -> list[list[Finding]]:
    state, found = HealthState(), []
    for checkup in trace:
        state, findings = policy.step(state, checkup)
        found.append(list(findings))
    return found


def last(*trace: Checkup) -> tuple[str, str, str]:
    """(condition, severity, action) of the one finding at the end; nothing was found before it."""
    *before, findings = play(trace)
    assert not any(before)
    (finding,) = findings
    return finding.condition, finding.severity, finding.action


class TestDamageDuringTheRun:
    def test_a_lost_gpu_ends_it_and_the_node_needs_a_reboot(self) -> None:
        assert last(WELL, Checkup(lost=True)) == ("lost", "abort", "reboot_node")

    def test_a_gpu_that_old_drivers_refuse_to_read_until_a_reset_ends_it(self) -> None:
        assert last(WELL, Checkup(reset_required=True)) == ("reset_required", "abort", "reset_gpu")

    def test_uncorrectable_ecc_errors_end_it(self) -> None:
        assert last(WELL, replace(WELL, ecc_uncorrected=1)) == ("uncorrectable_ecc", "abort", "reset_gpu")

    def test_a_failed_row_remapping_ends_it_and_the_card_goes_back(self) -> None:
        failed = replace(WELL, rows=replace(GOOD_ROWS, failed=True))
        assert last(WELL, failed) == ("row_remap_failed", "abort", "return_card")

    def test_rows_that_wait_for_a_reset_are_told_and_can_wait(self) -> None:
        pending = replace(WELL, rows=replace(GOOD_ROWS, pending=True))
        assert last(WELL, pending) == ("row_remap_pending", "warn", "reset_gpu")

    @pytest.mark.parametrize(
        ("code", "action", "trusted"),
        [
            (1, "reset_gpu", False),
            (2, "reboot_node", False),
            (3, "restart_job", True),
            (4, "reset_gpu", True),
            (5, "recover_imex_domain", False),
            (6, "reset_gpu", False),
            (7, "reboot_node", False),
            (9, "inspect", False),
        ],
    )
    def test_every_recovery_action_of_the_driver_ends_it_and_one_that_only_drains_leaves_time_for_a_checkpoint(
        self, code: int, action: str, trusted: bool
    ) -> None:
        recovery = replace(WELL, recovery=RecoveryAction.decode(code))
        assert last(WELL, recovery) == ("recovery_action", "abort", action)
        assert play([WELL, recovery])[1][0].memory_trusted is trusted

    def test_a_recovery_action_that_becomes_another_is_found_again(self) -> None:
        first, second = (replace(WELL, recovery=RecoveryAction.decode(code)) for code in (1, 2))
        assert [[each.action for each in found] for found in play([WELL, first, second, second])] == [
            [],
            ["reset_gpu"],
            ["reboot_node"],
            [],
        ]

    def test_is_found_once_as_long_as_it_lasts_and_again_when_it_comes_back(self) -> None:
        lost = Checkup(lost=True)
        assert [len(found) for found in play([WELL, lost, lost, WELL, lost])] == [0, 1, 0, 0, 1]

    def test_outlives_a_sensor_that_cannot_be_read_meanwhile(self) -> None:
        failed = replace(WELL, rows=replace(GOOD_ROWS, failed=True))
        assert [len(found) for found in play([WELL, failed, NOTHING_READ, failed])] == [0, 1, 0, 0]

    def test_of_several_kinds_is_found_whole(self) -> None:
        worst = Checkup(lost=True, ecc_uncorrected=2, rows=replace(GOOD_ROWS, failed=True), recovery=WELL.recovery)
        found = play([WELL, worst])[1]
        assert {each.condition for each in found} == {"lost", "uncorrectable_ecc", "row_remap_failed"}
        assert max(found, key=lambda each: each.gravity).action == "return_card"

    def test_is_only_told_when_the_policy_says_so(self) -> None:
        found = play([WELL, Checkup(lost=True, xids=(xid(79),))], HealthPolicy(abort=False))[1]
        assert {each.severity for each in found} == {"warn"}


class TestDamageBeforeTheRun:
    @pytest.mark.parametrize(
        "checkup",
        [
            Checkup(lost=True),
            Checkup(reset_required=True),
            replace(WELL, ecc_uncorrected=3),
            replace(WELL, rows=replace(GOOD_ROWS, failed=True)),
            replace(WELL, rows=replace(GOOD_ROWS, pending=True)),
            replace(WELL, recovery=RecoveryAction.decode(2)),
        ],
        ids=["lost", "reset", "ecc", "failed rows", "pending rows", "recovery"],
    )
    def test_is_told_once_and_ends_nothing(self, checkup: Checkup) -> None:
        first, *later = play([checkup] * 5)
        assert [each.severity for each in first] == ["warn"]
        assert "when the run began" in first[0].problem
        assert not any(later)

    def test_is_what_a_sensor_shows_when_it_can_first_be_read(self) -> None:
        found = play([NOTHING_READ, replace(WELL, ecc_uncorrected=3)])
        assert [each.severity for each in found[1]] == ["warn"]

    def test_does_not_excuse_what_is_added_to_it(self) -> None:
        found = play([replace(WELL, ecc_uncorrected=3), replace(WELL, ecc_uncorrected=4)])
        assert [(each.severity, each.problem) for each in found[1]] == [
            ("abort", "1 uncorrectable ECC error during the run")
        ]

    def test_is_forgotten_by_a_counter_that_starts_over(self) -> None:
        trace = [replace(WELL, ecc_uncorrected=count) for count in (3, 0, 2)]
        assert [[each.severity for each in found] for found in play(trace)] == [["warn"], [], ["abort"]]


class TestXids:
    @pytest.mark.parametrize("code", [13, 31, 32, 39, 69, 94])
    def test_of_one_program_end_the_job(self, code: int) -> None:
        assert last(WELL, replace(WELL, xids=(xid(code),))) == ("xid", "abort", "restart_job")

    @pytest.mark.parametrize("code", [46, 62, 64, 95, 109, 110, 119, 120, 136, 140, 143, 155, 156, 158])
    def test_that_need_a_reset_end_it(self, code: int) -> None:
        assert last(WELL, replace(WELL, xids=(xid(code),))) == ("xid", "abort", "reset_gpu")

    @pytest.mark.parametrize("code", [79, 151])
    def test_that_need_a_reboot_end_it(self, code: int) -> None:
        assert last(WELL, replace(WELL, xids=(xid(code),))) == ("xid", "abort", "reboot_node")

    @pytest.mark.parametrize("code", [48, 74])
    def test_of_the_workflow_class_for_which_a_gpu_is_failed_end_it(self, code: int) -> None:
        assert last(WELL, replace(WELL, xids=(xid(code),))) == ("xid", "abort", "inspect")

    @pytest.mark.parametrize("code", [144, 150, 154, 61, 142, 777])
    def test_whose_meaning_depends_on_more_or_is_not_listed_are_told(self, code: int) -> None:
        assert last(WELL, replace(WELL, xids=(xid(code),)))[:2] == ("xid", "warn")

    @pytest.mark.parametrize("code", [43, 45, 63, 92, 121, 137, 157])
    def test_to_be_recorded_never_act(self, code: int) -> None:
        assert last(WELL, replace(WELL, xids=(xid(code),)))[:2] == ("xid", "record")

    def test_of_one_program_on_a_card_shared_by_tenants_are_only_told(self) -> None:
        shared = replace(WELL, shared_card=True, xids=(xid(31),))
        assert last(WELL, shared) == ("xid", "warn", "restart_job")

    def test_of_the_whole_card_end_the_run_of_every_tenant(self) -> None:
        shared = replace(WELL, shared_card=True, xids=(xid(79),))
        assert last(WELL, shared) == ("xid", "abort", "reboot_node")

    def test_that_repeat_are_told_once(self) -> None:
        found = play([replace(WELL, xids=(xid(43, 1), xid(43, 2))), replace(WELL, xids=(xid(43, 3),))])
        assert [len(each) for each in found] == [1, 0]

    def test_say_number_and_meaning(self) -> None:
        assert xid_finding(xid(79)).problem == "Xid 79: GPU has fallen off the bus"

    @given(st.integers(0, 400), st.booleans())
    def test_of_any_number_get_a_verdict(self, code: int, shared: bool) -> None:
        finding = xid_finding(xid(code), shared_card=shared)
        assert finding.severity in ("record", "warn", "abort")
        assert not finding.memory_trusted
        assert (xid(code).action in ("record", "unlisted")) <= (finding.severity != "abort")


class TestForAnyTrace:
    @given(st.lists(checkups, max_size=40))
    def test_the_first_checkup_ends_no_run(self, trace: list[Checkup]) -> None:
        for findings in play(trace[:1]):
            assert "abort" not in [each.severity for each in findings]

    @given(st.lists(checkups, min_size=1, max_size=40))
    def test_a_run_ends_only_for_what_the_last_checkup_shows(self, trace: list[Checkup]) -> None:
        for checkup, findings in zip(trace, play(trace), strict=True):
            shown = {
                "lost": checkup.lost,
                "reset_required": checkup.reset_required,
                "uncorrectable_ecc": bool(checkup.ecc_uncorrected),
                "row_remap_failed": checkup.rows is not None and checkup.rows.failed,
                "row_remap_pending": checkup.rows is not None and checkup.rows.pending,
                "recovery_action": checkup.recovery is not None and checkup.recovery.needed,
            }
            assert all(shown[each.condition] for each in findings)

    @given(st.lists(checkups, max_size=20), checkups)
    def test_a_checkup_that_changes_nothing_finds_nothing(self, trace: list[Checkup], again: Checkup) -> None:
        assert play([*trace, again, again])[-1] == []

    @given(st.lists(st.just(NOTHING_READ) | st.just(WELL), max_size=40))
    def test_losing_sensors_is_no_damage(self, trace: list[Checkup]) -> None:
        assert not any(play(trace))


class TestWhatIsReadOfADevice:
    def test_a_healthy_one_is_well(self) -> None:
        assert Checkup.of(healthy_reading()) == WELL

    def test_a_missing_value_is_neither_damage_nor_health(self) -> None:
        reading = unreadable(0, "GPU-fake-0", "Fake GPU", Unknown("no permission", 4), 0.0)
        assert Checkup.of(reading) == NOTHING_READ

    def test_the_codes_behind_a_missing_value_say_lost_or_reset_required(self) -> None:
        assert Checkup.of(unreadable(0, "GPU-fake-0", "Fake GPU", Unknown("lost", 15), 0.0)).lost
        assert Checkup.of(healthy_reading(power_w=Unknown("reset required", 16))).reset_required

    def test_a_mig_part_shares_its_card(self) -> None:
        assert Checkup.of(healthy_reading(mig_enabled=True)).shared_card
        assert not Checkup.of(healthy_reading(mig_enabled=Unsupported("x"))).shared_card
