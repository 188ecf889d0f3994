"""Continual LoRA merging as transactions: checked, computed beside the accumulator, checked again, committed or not."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .adapter import Adapter, adapter_of, read_adapter
from .chain import ChainStep, merge_adapters
from .merging import MergeResult, begin, merge
from .norms import TensorNorms
from .orthogonal import init_adapter, overlap
from .peft_api import install
from .policy import MODES, SCHEDULES, MergePolicy
from .records import Record, Snapshot
from .store import SlaoStore
from .transaction import Proposal, Start, merge_trained, next_start, propose, record_lineage

if TYPE_CHECKING:
    from .campaign import Campaign, run_campaign
    from .campaign_config import CampaignConfig, load_campaign
    from .campaign_result import CampaignResult

__all__ = [
    "MODES",
    "SCHEDULES",
    "Adapter",
    "Campaign",
    "CampaignConfig",
    "CampaignResult",
    "ChainStep",
    "MergePolicy",
    "MergeResult",
    "Proposal",
    "Record",
    "SlaoStore",
    "Snapshot",
    "Start",
    "TensorNorms",
    "adapter_of",
    "begin",
    "init_adapter",
    "install",
    "load_campaign",
    "merge",
    "merge_adapters",
    "merge_trained",
    "next_start",
    "overlap",
    "propose",
    "read_adapter",
    "record_lineage",
    "run_campaign",
]

_HOMES = {
    "Campaign": ".campaign",
    "CampaignConfig": ".campaign_config",
    "CampaignResult": ".campaign_result",
    "load_campaign": ".campaign_config",
    "run_campaign": ".campaign",
}
"""Looked up when used: a campaign trains, and merging alone needs nothing that training brings."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'trainwarden.slao' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)
