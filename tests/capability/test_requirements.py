"""``warden probe --require``: what is understood, what is refused with which words, and what meets it."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from trainwarden.capability import Quantity, Requirement, Status, Verdict, parse_requirement, parse_requirements
from trainwarden.capability.requirements import ABILITIES, KINDS, NOMINAL_SHARE, judge
from trainwarden.capability.verdict import degraded, supported, unknown, unsupported
from trainwarden.errors import InvalidSettingError

GIB = 2**30

sizes = st.builds(
    "{}{}{}".format,
    st.integers(0, 10**6),
    st.sampled_from(["", ".5", ".25"]),
    st.sampled_from(["MiB", "GiB", "TiB", "MB", "GB", "TB"]),
)
versions = st.lists(st.integers(0, 999), min_size=1, max_size=4).map(lambda parts: ".".join(map(str, parts)))
counts = st.integers(0, 10**6).map(str)
written = st.one_of(
    st.sampled_from(ABILITIES),
    st.builds("{}>={}".format, st.sampled_from(["vram", "ram", "disk"]), sizes),
    st.builds("{}>={}".format, st.sampled_from(["driver", "cuda"]), versions),
    st.builds("{}>={}".format, st.sampled_from(["sm", "gpus"]), counts),
)


@given(written)
def test_a_requirement_prints_as_it_is_parsed(text: str) -> None:
    parsed = parse_requirement(text)
    assert str(parsed) == text
    assert parse_requirement(str(parsed)) == parsed


@given(written, st.sampled_from(["", " ", "\t", "  "]))
def test_blanks_around_the_parts_do_not_matter(text: str, blank: str) -> None:
    spaced = blank + text.replace(">=", f"{blank}>={blank}") + blank
    assert parse_requirement(spaced) == parse_requirement(text)


@given(st.text(max_size=30))
@example("vram>=80")
@example("vram>=²GiB")
@example("sm>=٩٠")
@example("driver>=")
@example(">=")
@example("")
@example("a" * 5000)
def test_any_text_is_understood_or_refused_with_its_place_and_the_known_names(text: str) -> None:
    parsed = understood(text)
    if isinstance(parsed, Requirement):
        assert parsed.name in {*KINDS, *ABILITIES}
    else:
        assert parsed.details["setting"] == "requirements[3]"
        assert parsed.details["value"] == text
        assert all(name in parsed.suggestion for name in [*KINDS, *ABILITIES])


def understood(text: str) -> Requirement | InvalidSettingError:
    try:
        return parse_requirement(text, place="requirements[3]")
    except InvalidSettingError as error:
        return error


@pytest.mark.parametrize(
    ("text", "least"),
    [
        ("vram>=80GiB", 80 * GIB),
        ("vram>=80GB", 80 * 10**9),
        ("disk>=0.5TiB", 2**39),
        ("ram>=64GiB", 64 * GIB),
        ("sm>=90", 90),
        ("gpus>=2", 2),
        ("driver>=535", (535,)),
        ("driver>=535.104.05", (535, 104, 5)),
        ("cuda>=12.4", (12, 4)),
        ("cuda>=12.0", (12,)),
        ("fp8", None),
    ],
)
def test_amounts_are_read_in_their_units(text: str, least: object) -> None:
    assert parse_requirement(text).least == least


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("vram>=80", "a size such as 80GiB"),
        ("vram>=80gigs", "units: MiB, GiB, TiB, MB, GB, TB"),
        ("vram>=-1GiB", "a size such as 80GiB"),
        ("vram", "vram>= and a size"),
        ("vram>80GiB", ">= after vram"),
        ("vram==80GiB", ">= after vram"),
        ("sm>=9.0", "such as 90 for 9.0"),
        ("gpus>=two", "a whole number"),
        ("driver>=latest", "a version such as 12.4"),
        ("fp8>=1", "fp8 alone"),
        ("vrm>=80GiB", "did you mean vram?"),
        ("FP8", "did you mean fp8?"),
        ("flash-attention", "did you mean flash_attention?"),
        ("tpu", "a known name instead of 'tpu': vram>=…"),
        ("fp8 bf16", "NAME or NAME>=AMOUNT"),
    ],
)
def test_what_is_wrong_is_said_in_one_phrase(text: str, said: str) -> None:
    with pytest.raises(InvalidSettingError) as caught:
        parse_requirement(text)
    assert said in caught.value.details["expected"]


def test_the_place_of_a_wrong_one_among_many_is_named() -> None:
    with pytest.raises(InvalidSettingError, match=r"requirements\[1\] is bf-16"):
        parse_requirements(["fp8", "bf-16"])


def met(text: str, found: Quantity | Verdict) -> str:
    requirement = parse_requirement(text)
    if isinstance(found, Verdict):
        return judge(requirement, {requirement.name: found}, {}).status
    return judge(requirement, {}, {requirement.name: found}).status


@pytest.mark.parametrize(
    ("verdict", "status"),
    [
        (supported("right"), "met"),
        (degraded("only emulated"), "unmet"),
        (unsupported("no CUDA"), "unmet"),
        (unknown("no answer"), "unknown"),
    ],
)
def test_an_ability_is_met_by_nothing_less_than_supported(verdict: Verdict, status: str) -> None:
    assert met("bf16", verdict) == status


def test_an_outcome_names_what_was_found_and_why() -> None:
    outcome = judge(Requirement("fp8"), {"fp8": unsupported("compute capability 8.0", "train in bf16")}, {})
    assert str(outcome) == "fp8: found unsupported (compute capability 8.0)"
    assert outcome.to_dict() == {
        "requirement": "fp8",
        "status": "unmet",
        "found": "unsupported",
        "reason": "compute capability 8.0",
        "fix": "train in bf16",
    }


@given(st.integers(0, 10**13), st.integers(0, 10**4))
def test_disk_space_is_compared_exactly(free: int, least_mib: int) -> None:
    status = met(f"disk>={least_mib}MiB", Quantity(free, "", ""))
    assert status == ("met" if free >= least_mib * 2**20 else "unmet")


@given(st.integers(0, 10**12), st.integers(0, 10**4))
def test_memory_is_compared_as_parts_are_named_within_three_percent(found: int, least_gib: int) -> None:
    status = met(f"vram>={least_gib}GiB", Quantity(found, "", ""))
    assert status == ("met" if Fraction(found) >= least_gib * GIB * NOMINAL_SHARE else "unmet")


def test_an_h100_is_a_card_of_80_gib_and_the_reason_says_how() -> None:
    h100 = Quantity(81559 * 2**20, "79.65 GiB", "on cuda:0")
    outcome = judge(parse_requirement("vram>=80GiB"), {}, {"vram": h100})
    assert outcome.met
    assert "within 3 % of 80GiB" in outcome.reason
    assert met("vram>=96GiB", h100) == "unmet"


@given(st.lists(st.integers(0, 99), min_size=1, max_size=4), st.lists(st.integers(0, 99), min_size=1, max_size=4))
def test_versions_are_compared_number_by_number(found: list[int], least: list[int]) -> None:
    def padded(parts: list[int]) -> list[int]:
        return parts + [0] * (4 - len(parts))

    text = ".".join(map(str, least))
    amount = parse_requirement(f"driver>={'.'.join(map(str, found))}").least
    status = met(f"driver>={text}", Quantity(amount, "", ""))
    assert status == ("met" if padded(found) >= padded(least) else "unmet")


def test_a_newer_minor_version_is_newer_although_it_sorts_before_as_text() -> None:
    assert met("cuda>=12.4", Quantity((12, 10), "12.10", "")) == "met"


def test_what_is_not_there_is_unmet_and_what_could_not_be_read_is_unknown() -> None:
    assert met("driver>=535", Quantity(None, "none", "no driver", Status.UNSUPPORTED)) == "unmet"
    assert met("driver>=0", Quantity(None, "unknown", "the driver is silent", Status.UNKNOWN)) == "unknown"
