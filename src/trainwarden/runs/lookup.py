"""From what a person types to a run: an id, its beginning, or a run directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trainwarden.errors import LedgerError, RunNotFoundError
from trainwarden.runs.ledger import Ledger, RunRecord
from trainwarden.runs.manifest import RunManifest


@dataclass(frozen=True)
class FoundRun:
    """A run by all that is left of it: at least one of its ledger row and its ``run.json``."""

    path: Path
    record: RunRecord | None
    manifest: RunManifest | None

    @property
    def resume_command(self) -> str | None:
        """How to continue it; ``None`` when its directory is gone."""
        return None if self.manifest is None else self.manifest.resume_command(self.path)


def find_run(reference: str, ledger: Ledger) -> FoundRun:
    """The run that ``reference`` means. A run directory is known by its ``run.json``, whatever the ledger says.

    Raises:
        RunNotFoundError: no run, or more than one, is meant; it names the runs that could be.
        ConfigurationError: the directory's ``run.json`` is damaged or not ours.
        LedgerError: the ledger is damaged, and ``reference`` is no run directory.
    """
    place = Path(reference)
    manifest = RunManifest.read(place) if reference and place.is_dir() else None
    if manifest is not None:
        return FoundRun(place, _row_of(manifest, ledger), manifest)
    record = ledger.find(reference)
    directory = Path(record.path)
    manifest = RunManifest.read(directory)
    # The directory may have been removed, and used for another run since.
    mine = manifest is not None and manifest.run_id == record.run_id
    return FoundRun(directory, record, manifest if mine else None)


def _row_of(manifest: RunManifest, ledger: Ledger) -> RunRecord | None:
    try:
        record = ledger.find(manifest.run_id)
    except (RunNotFoundError, LedgerError):  # the directory tells enough without it
        return None
    return record if record.run_id == manifest.run_id else None
