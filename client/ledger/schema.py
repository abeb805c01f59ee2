"""The tables of a ledger, in the one format that is read and written.

The number of the format goes on and never restarts. A change of a table gives it the next number here, and a ledger of
another format is refused.
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing

FORMAT = 11
APPLICATION_ID = 0x46564C44
"""``FVLD``, in the file's header."""
TABLES = """
CREATE TABLE charges (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    dataset TEXT NOT NULL,
    run TEXT NOT NULL,
    round INTEGER NOT NULL,
    purpose TEXT NOT NULL,
    unit TEXT NOT NULL CHECK (unit != ''),
    kind TEXT NOT NULL CHECK (kind != ''),
    figures TEXT NOT NULL CHECK (figures != ''),
    count INTEGER NOT NULL CHECK (count >= 1),
    delta REAL NOT NULL,
    charged_at TEXT NOT NULL,
    caused_by TEXT
);
CREATE TABLE plans (
    dataset TEXT PRIMARY KEY CHECK (dataset != ''),
    run TEXT NOT NULL,
    releases TEXT NOT NULL CHECK (releases != ''),
    committed_at TEXT NOT NULL
);
CREATE TABLE exposures (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    dataset TEXT NOT NULL,
    run TEXT NOT NULL,
    round INTEGER NOT NULL,
    steps INTEGER NOT NULL CHECK (steps >= 0),
    released_at TEXT NOT NULL
);
CREATE TABLE failures (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    dataset TEXT NOT NULL,
    run TEXT NOT NULL,
    round INTEGER NOT NULL,
    reason TEXT NOT NULL,
    failed_at TEXT NOT NULL
);
CREATE TABLE budgets (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    dataset TEXT NOT NULL,
    epsilon REAL NOT NULL CHECK (epsilon > 0),
    delta REAL NOT NULL CHECK (delta > 0 AND delta < 0.5),
    set_at TEXT NOT NULL
);
CREATE TABLE reservations (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    dataset TEXT NOT NULL,
    run TEXT NOT NULL CHECK (run != ''),
    epsilon REAL NOT NULL CHECK (epsilon >= 0),
    until TEXT NOT NULL,
    set_at TEXT NOT NULL,
    last_charge INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE withdrawals (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    dataset TEXT NOT NULL CHECK (dataset != ''),
    reason TEXT NOT NULL CHECK (reason != ''),
    withdrawn_at TEXT NOT NULL
);
CREATE TABLE held_out (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    dataset TEXT NOT NULL CHECK (dataset != ''),
    rule TEXT NOT NULL,
    set_at TEXT NOT NULL
);
CREATE TABLE mask_keys (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    key BLOB NOT NULL UNIQUE CHECK (length(key) = 32),
    dataset TEXT NOT NULL,
    run TEXT NOT NULL,
    round INTEGER NOT NULL,
    charged_at TEXT NOT NULL,
    site TEXT NOT NULL DEFAULT ''
);
CREATE TABLE signed_lists (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    context BLOB NOT NULL UNIQUE CHECK (length(context) = 32),
    survivors TEXT NOT NULL CHECK (survivors != ''),
    signed_at TEXT NOT NULL
);
CREATE TABLE records (hash INTEGER NOT NULL, dataset TEXT NOT NULL, PRIMARY KEY (hash, dataset)) WITHOUT ROWID;
CREATE TABLE secrets (key BLOB NOT NULL);
"""
"""A reservation counts what its run adds after ``last_charge``."""
ONLY_ADDED = {
    "charges": ("", "charges"),
    "plans": ("plan_", "plans"),
    "exposures": ("exposure_", "exposures"),
    "failures": ("failure_", "failures"),
    "budgets": ("budget_", "budgets"),
    "reservations": ("reservation_", "reservations"),
    "withdrawals": ("withdrawal_", "withdrawals"),
    "held_out": ("held_out_", "held out rules"),
    "mask_keys": ("mask_key_", "mask keys"),
    "signed_lists": ("signed_list_", "signed lists"),
    "records": ("record_", "records"),
}
"""Tables whose rows no statement changes or removes, with the names of their triggers and what these say."""


def lay_out(db: sqlite3.Connection) -> None:
    """Make the tables of a new ledger, with a random key for hashes of records, in one transaction."""
    triggers = [
        f"CREATE TRIGGER no_{name}{verb.lower()} BEFORE {verb} ON {table} "
        f"BEGIN SELECT RAISE(ABORT, '{rows} are only ever added'); END;"
        for table, (name, rows) in ONLY_ADDED.items()
        for verb in ("UPDATE", "DELETE")
    ]
    secret = f"INSERT INTO secrets VALUES (X'{os.urandom(32).hex()}');"
    marks = f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {FORMAT};"
    db.executescript("\n".join(["BEGIN;", TABLES, *triggers, secret, marks, "COMMIT;"]))


def is_laid_out(db: sqlite3.Connection) -> bool:
    """Return whether a file has the tables, columns and triggers of the present format, whatever its number says."""
    with closing(sqlite3.connect(":memory:")) as new:
        lay_out(new)
        return _layout(db) == _layout(new)


def _layout(db: sqlite3.Connection) -> list[tuple[object, ...]]:
    triggers = db.execute("SELECT name, tbl_name FROM sqlite_master WHERE type = 'trigger' ORDER BY name").fetchall()
    columns = db.execute(
        'SELECT t.name, c.name, c.type, c."notnull", c.pk FROM sqlite_master AS t JOIN pragma_table_info(t.name) AS c '
        "WHERE t.type = 'table' AND t.name NOT LIKE 'sqlite_%' ORDER BY t.name, c.cid"
    ).fetchall()
    return [*triggers, *columns]
