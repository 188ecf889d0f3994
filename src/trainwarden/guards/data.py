"""Data that cannot be loaded: how much of it a run may leave out, and when leaving out has gone too far."""

from __future__ import annotations

from dataclasses import dataclass

from trainwarden.errors import InvalidSettingError


@dataclass(frozen=True)
class DataLosses:
    """What one pass through a loader has left out so far.

    ``seen`` counts batches, those left out included; ``batches`` those left out whole, ``samples`` the single samples
    left out of other batches, and ``lost`` is both in batches: a sample of a batch of eight is an eighth.
    """

    seen: int = 0
    batches: int = 0
    samples: int = 0
    lost: float = 0.0

    @property
    def count(self) -> int:
        """Samples and whole batches left out, each counted as one."""
        return self.batches + self.samples

    @property
    def share(self) -> float:
        """The part of the data that was left out, 0 to 1."""
        return self.lost / self.seen if self.seen else 0.0


@dataclass(frozen=True)
class DataPolicy:
    """What cannot be read, decoded or collated is left out and recorded; above ``max_share`` the run ends.

    Args:
        max_share: part of the data that may be left out, 0 to 1. 1 % is the rule of the third seed document.
        min_count: samples or batches that may be left out before the share is judged at all, for the first bad sample
            of a run is a large share of little. With 10, a data set of which 0.2 % is bad never crosses 1 % by chance,
            one of 0.5 % in about one run of twenty, one of 2 % always, after about 500 batches; and one of which
            nothing can be read ends the run at its tenth batch.
        worker_timeout_s: how long the worker processes of a ``DataLoader`` may deliver nothing before they count as
            hung, where the loader has no ``timeout`` of its own; ``None`` waits for ever. The default is longer than a
            batch should take and shorter than the ten minutes after which NCCL gives up on a rank that waits for data.

    Raises:
        InvalidSettingError: a value is out of range.
    """

    max_share: float = 0.01
    min_count: int = 10
    worker_timeout_s: float | None = 300.0

    def __post_init__(self) -> None:
        if not _is_number(self.max_share) or not 0.0 <= self.max_share <= 1.0:
            raise InvalidSettingError(setting="data.max_share", value=self.max_share, expected="a part from 0 to 1")
        if not isinstance(self.min_count, int) or isinstance(self.min_count, bool) or self.min_count < 1:
            expected = "a whole number of at least 1"
            raise InvalidSettingError(setting="data.min_count", value=self.min_count, expected=expected)
        timeout_s = self.worker_timeout_s
        if timeout_s is not None and (not _is_number(timeout_s) or timeout_s <= 0.0):
            expected = "a positive number of seconds, or None"
            raise InvalidSettingError(setting="data.worker_timeout_s", value=timeout_s, expected=expected)

    def exceeded(self, losses: DataLosses) -> bool:
        """Whether more was left out than may be."""
        return losses.count >= self.min_count and losses.share > self.max_share


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
