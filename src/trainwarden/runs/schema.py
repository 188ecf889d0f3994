"""How the ledger file came to its shape: one entry a version, applied in order, never edited."""

from __future__ import annotations

MIGRATIONS: list[tuple[str, ...]] = [
    (
        # Numbers that may be NaN are text: SQLite turns a NaN into NULL.
        """
        CREATE TABLE runs (
            run_id TEXT PRIMARY KEY,
            path TEXT NOT NULL,
            command TEXT NOT NULL,
            status TEXT NOT NULL,
            pid INTEGER NOT NULL,
            process_start TEXT NOT NULL,
            host TEXT NOT NULL,
            started_at TEXT NOT NULL,
            ended_at TEXT,
            starts INTEGER NOT NULL DEFAULT 1,
            steps_completed INTEGER,
            steps_skipped INTEGER,
            shrinks INTEGER,
            final_loss TEXT,
            exit_code INTEGER,
            code TEXT,
            checkpoint_path TEXT,
            model TEXT
        )
        """,
    ),
    (
        # Predicted and real peaks of finished runs, in bytes: what the overheads of a prediction are calibrated by.
        """
        CREATE TABLE run_memory (
            run_id TEXT PRIMARY KEY REFERENCES runs (run_id),
            recorded_at TEXT NOT NULL,
            device TEXT NOT NULL,
            predicted_bytes INTEGER NOT NULL,
            allocated_bytes INTEGER,
            reserved_bytes INTEGER,
            context_bytes INTEGER
        )
        """,
    ),
    ("ALTER TABLE runs ADD COLUMN data_skipped INTEGER",),
]
"""Version ``n`` of ``PRAGMA user_version`` is the state after the first ``n`` entries."""
