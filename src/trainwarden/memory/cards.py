"""The memory of common cards, by the names people use."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass

MIB = 2**20


@dataclass(frozen=True)
class Card:
    """A card and its memory in bytes, as ``nvidia-smi`` or ``rocm-smi`` lists it (with ECC where it is always on)."""

    name: str
    memory_bytes: int
    nominal_gb: int
    """What the vendor's name for it says."""
    bfloat16: bool = True
    """Whether it has matrix units for bfloat16 (NVIDIA: from compute capability 8.0 on)."""


def _card(name: str, mib: int, nominal_gb: int, *, bfloat16: bool = True) -> Card:
    return Card(name, mib * MIB, nominal_gb, bfloat16)


CARDS: tuple[Card, ...] = (
    _card("RTX 3060", 12288, 12),
    _card("RTX 3070", 8192, 8),
    _card("RTX 3080", 10240, 10),
    _card("RTX 3090", 24576, 24),
    _card("RTX 4060", 8188, 8),
    _card("RTX 4060 Ti 16GB", 16380, 16),
    _card("RTX 4070", 12282, 12),
    _card("RTX 4070 Ti SUPER", 16376, 16),
    _card("RTX 4080", 16376, 16),
    _card("RTX 4090", 24564, 24),
    _card("RTX 5070", 12227, 12),
    _card("RTX 5070 Ti", 16303, 16),
    _card("RTX 5080", 16303, 16),
    _card("RTX 5090", 32607, 32),
    _card("RTX A4000", 16376, 16),
    _card("RTX A5000", 24564, 24),
    _card("RTX A6000", 49140, 48),
    _card("RTX 6000 Ada", 49140, 48),
    _card("RTX PRO 6000", 97887, 96),
    _card("T4", 15360, 16, bfloat16=False),
    _card("V100 16GB", 16384, 16, bfloat16=False),
    _card("V100 32GB", 32768, 32, bfloat16=False),
    _card("A10", 23028, 24),
    _card("A10G", 23028, 24),
    _card("L4", 23034, 24),
    _card("L40S", 46068, 48),
    _card("A100 40GB", 40960, 40),
    _card("A100 80GB", 81920, 80),
    _card("H100", 81559, 80),
    _card("H100 NVL", 95830, 94),
    _card("GH200", 97871, 96),
    _card("H200", 143771, 141),
    _card("B200", 183359, 192),
    _card("MI300X", 196592, 192),
)
COMMON: tuple[str, ...] = (
    "RTX 4060",
    "RTX 3060",
    "RTX 4080",
    "RTX 4090",
    "RTX 5090",
    "A100 40GB",
    "RTX A6000",
    "H100",
    "RTX PRO 6000",
    "H200",
    "MI300X",
)
"""One of each size, smallest first: what ``warden ceilings --all`` lists."""

_EMPTY = re.compile(
    r"nvidia|geforce|tesla|quadro|amd|instinct|generation|sxm\d?|pcie|hbm\d?e?|blackwell|workstation|server|edition|oam"
)
"""Words of drivers and vendors that do not say which card it is."""


class UnknownCardError(Exception):
    """No card has this name; ``closest`` are those that are meant perhaps."""

    def __init__(self, name: str, closest: list[str]) -> None:
        super().__init__(name)
        self.name = name
        self.closest = closest


def find_card(name: str) -> Card:
    """The card that is meant: case, blanks, the maker's words and those for form factors do not matter.

    Where a card exists in several sizes, a name without one means the smallest. Raises UnknownCardError.
    """
    wanted = _plain(name)
    unsized = _plain(re.sub(r"\b\d+ ?gb\b", " ", name.lower()))
    tests: tuple[Callable[[str], bool], ...] = (
        lambda card: card == wanted,
        lambda card: card.removeprefix("rtx") == wanted,
        lambda card: re.fullmatch(rf"(?:rtx)?{re.escape(wanted)}\d+gb", card) is not None,
        lambda card: card == unsized,  # a driver's name has the size of a card that exists in one size only
    )
    for matches in tests if wanted else ():
        found = [card for card in CARDS if matches(_plain(card.name))]
        if found:
            return min(found, key=lambda card: card.memory_bytes)
    plain = {_plain(card.name): card.name for card in CARDS}
    close = difflib.get_close_matches(wanted, plain, n=3, cutoff=0.5)
    raise UnknownCardError(name, [plain[one] for one in close])


def _plain(name: str) -> str:
    words = re.findall(r"[a-z0-9]+", name.lower())
    return "".join(word for word in words if not _EMPTY.fullmatch(word))
