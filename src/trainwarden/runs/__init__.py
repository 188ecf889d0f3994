"""Where a run lives and what is remembered of it: its directory, its event log, the ledger of all runs."""

from trainwarden.runs.directory import RunDirectory
from trainwarden.runs.event_log import EventLog, read_events
from trainwarden.runs.ledger import Ledger, RunRecord
from trainwarden.runs.lookup import FoundRun, find_run
from trainwarden.runs.manifest import RunManifest
from trainwarden.runs.process import ProcessIdentity

__all__ = [
    "EventLog",
    "FoundRun",
    "Ledger",
    "ProcessIdentity",
    "RunDirectory",
    "RunManifest",
    "RunRecord",
    "find_run",
    "read_events",
]
