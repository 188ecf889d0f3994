from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainwarden.device import Xid
from trainwarden.device.xid import XidAction, xid_action, xid_meaning


@pytest.mark.parametrize(
    ("action", "codes"),
    [
        ("restart_job", [13, 31, 94]),
        ("reset_gpu", [64, 95, 119, 120, 140]),
        ("reboot_node", [79]),
        ("inspect", [48, 74, 154]),
        ("record", [43, 63]),
        ("support", [61]),
        ("unlisted", [0, 1, 9999]),
    ],
)
def test_an_xid_has_the_action_of_nvidias_catalogue(action: str, codes: list[int]) -> None:
    assert {xid_action(code) for code in codes} == {action}


@given(st.integers(0, 10_000))
def test_every_xid_has_an_action_and_a_meaning(code: int) -> None:
    assert xid_action(code) in get_args(XidAction)
    assert xid_meaning(code)


def test_an_xid_that_the_table_does_not_list_is_not_called_harmless() -> None:
    assert Xid(1, 4242, 0, "GPU-0", 0.0).action == "unlisted"
    assert "catalogue" in str(Xid(1, 4242, 0, "GPU-0", 0.0))


def test_an_xid_prints_as_one_sentence() -> None:
    assert str(Xid(1, 79, 3, "GPU-3", 0.0)) == "Xid 79 on GPU 3: GPU has fallen off the bus"
    assert str(Xid(2, 31, None, None, 0.0)) == "Xid 31 on an unidentified GPU: GPU memory page fault"
