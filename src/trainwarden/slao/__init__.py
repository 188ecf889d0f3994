"""Continual LoRA merging as transactions: checked, computed beside the accumulator, checked again, committed or not."""

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

__all__ = [
    "MODES",
    "SCHEDULES",
    "Adapter",
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
    "merge",
    "merge_adapters",
    "merge_trained",
    "next_start",
    "overlap",
    "propose",
    "read_adapter",
    "record_lineage",
]
