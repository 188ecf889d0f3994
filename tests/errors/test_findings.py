"""A preflight is a list of findings: all at once, each with its code, and a waiver for who knows better."""

from __future__ import annotations

import json

import pytest

from trainwarden.errors import (
    ConfigurationError,
    Finding,
    Findings,
    PreflightHostMemoryError,
    PreflightMemoryError,
    PreflightRefusedError,
    Severity,
    UnknownCodeError,
)

GIB = 2**30


def memory(severity: Severity = Severity.ERROR) -> Finding:
    condition = PreflightMemoryError(
        needed_bytes=30 * GIB, available_bytes=24 * GIB, peak_bytes=28 * GIB, phase="backward", remedy=None
    )
    return Finding(condition, severity, "RTX 4090")


def host() -> Finding:
    return Finding(PreflightHostMemoryError(needed_bytes=64 * GIB, available_bytes=32 * GIB), Severity.ERROR, "host")


def note() -> Finding:
    return Finding(ConfigurationError(place="x", problem="y"), Severity.NOTE, "a.yaml")


def test_all_refusing_findings_are_in_the_one_error() -> None:
    with pytest.raises(PreflightRefusedError) as caught:
        Findings.of([note(), memory(), host()]).require({"model": "tiny"})
    error = caught.value
    assert [finding["code"] for finding in error.details["findings"]] == [
        "PREFLIGHT_MEMORY",
        "PREFLIGHT_HOST_MEMORY",
        "CONFIG_INVALID",
    ]
    assert "2 of 3 findings" in error.message
    assert "30.00 GiB" in error.message
    assert "64.00 GiB" in error.message
    assert error.details["report"] == {"model": "tiny"}
    assert "--waive PREFLIGHT_MEMORY --waive PREFLIGHT_HOST_MEMORY" in error.suggestion
    assert error.exit_code == 78


def test_warnings_and_notes_refuse_nothing() -> None:
    found = Findings.of([memory(Severity.WARNING), note()])
    found.require()
    assert len(found) == 2
    assert not found.refusing


def test_nothing_found_refuses_nothing() -> None:
    Findings().require()


def test_the_worst_comes_first_and_the_order_of_the_rules_stays() -> None:
    found = Findings.of([note(), memory(Severity.WARNING), host(), memory()])
    assert [str(finding.severity) for finding in found] == ["error", "error", "warning", "note"]
    assert found.items[0].code == "PREFLIGHT_HOST_MEMORY"


@pytest.mark.parametrize("code", ["PREFLIGHT_MEMORY", "preflight_memory"])
def test_a_waived_finding_is_still_listed(code: str) -> None:
    found = Findings.of([memory(), host()]).waive([code])
    assert [finding.waived for finding in found] == [True, False]
    with pytest.raises(PreflightRefusedError, match="PREFLIGHT_HOST_MEMORY"):
        found.require()
    found.waive(["PREFLIGHT_MEMORY", "PREFLIGHT_HOST_MEMORY"]).require()
    assert "(waived)" in str(found.items[0])


def test_a_waiver_with_a_typing_error_is_refused() -> None:
    with pytest.raises(UnknownCodeError) as caught:
        Findings.of([memory()]).waive(["PREFLIGHT_MEMRY"])
    assert "PREFLIGHT_MEMORY" in caught.value.details["closest"]


def test_a_waiver_that_matches_nothing_is_none() -> None:
    assert len(Findings.of([host()]).waive(["PREFLIGHT_MEMORY"]).refusing) == 1


def test_a_finding_is_one_json_object_and_redacted() -> None:
    condition = ConfigurationError(place="/home/ann/run.yaml", problem="hf_abcdefghijklmnopqrstuv is no key")
    written = Finding(condition, Severity.WARNING, "/home/ann/run.yaml").to_dict()
    assert set(written) == {"severity", "code", "place", "message", "fix", "waived", "details"}
    text = json.dumps(written)
    assert "ann" not in text
    assert "hf_abc" not in text


def test_github_shows_each_finding_on_its_job() -> None:
    lines = Findings.of([memory(), memory(Severity.WARNING), note()]).github_lines()
    assert [line.partition(" ")[0] for line in lines] == ["::error", "::warning", "::notice"]
    assert lines[0].startswith("::error title=PREFLIGHT_MEMORY at RTX 4090::the run needs 30.00 GiB")
    assert Findings.of([memory()]).waive(["PREFLIGHT_MEMORY"]).github_lines()[0].startswith("::notice ")


def test_github_gets_no_line_break_out_of_a_message() -> None:
    condition = ConfigurationError(place="x", problem="one\ntwo: 100%")
    [line] = Findings.of([Finding(condition, Severity.ERROR, "a:b,c")]).github_lines()
    assert "\n" not in line
    assert "title=CONFIG_INVALID at a%3Ab%2Cc::" in line
    assert "one%0Atwo: 100%25" in line
