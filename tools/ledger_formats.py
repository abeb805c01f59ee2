"""The formats that a site's ledger has had: one function a step, from an empty file to the present tables.

A step never changes later: its tables are what that format was. None loses a charge, and none changes a figure of one.
The tables of the present format, as new ledgers have them, are in ``client/ledger/schema.py``.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Callable

Step = Callable[[sqlite3.Connection], None]


class ConversionError(Exception):
    """A ledger is left as it is, for this reason."""


def run_script(db: sqlite3.Connection, script: str) -> None:
    """Run statements inside the caller's transaction; ``executescript`` would commit it first."""
    statement = ""
    for line in script.splitlines():
        statement += line + "\n"
        if sqlite3.complete_statement(statement):
            db.execute(statement)
            statement = ""


def m1_charges(db: sqlite3.Connection) -> None:
    """Begin with charges, whose figures are columns."""
    run_script(
        db,
        """
CREATE TABLE charges (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    dataset TEXT NOT NULL,
    run TEXT NOT NULL,
    round INTEGER NOT NULL,
    kind TEXT NOT NULL,
    noise_multiplier REAL NOT NULL CHECK (noise_multiplier > 0),
    sample_rate REAL NOT NULL CHECK (sample_rate > 0 AND sample_rate <= 1),
    count INTEGER NOT NULL CHECK (count >= 1),
    delta REAL NOT NULL,
    clip_norm REAL NOT NULL,
    charged_at TEXT NOT NULL
);
CREATE TRIGGER no_update BEFORE UPDATE ON charges BEGIN SELECT RAISE(ABORT, 'charges are only ever added'); END;
CREATE TRIGGER no_delete BEFORE DELETE ON charges BEGIN SELECT RAISE(ABORT, 'charges are only ever added'); END;
""",
    )


def m2_budgets_and_records(db: sqlite3.Connection) -> None:
    """Add budgets, keyed hashes of records, and the ledger's own random key."""
    run_script(
        db,
        f"""
CREATE TABLE budgets (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    dataset TEXT NOT NULL,
    epsilon REAL NOT NULL CHECK (epsilon > 0),
    delta REAL NOT NULL CHECK (delta > 0 AND delta < 0.5),
    set_at TEXT NOT NULL
);
CREATE TRIGGER no_budget_update BEFORE UPDATE ON budgets BEGIN SELECT RAISE(ABORT, 'budgets are only ever added'); END;
CREATE TRIGGER no_budget_delete BEFORE DELETE ON budgets BEGIN SELECT RAISE(ABORT, 'budgets are only ever added'); END;
CREATE TABLE records (hash INTEGER NOT NULL, dataset TEXT NOT NULL, PRIMARY KEY (hash, dataset)) WITHOUT ROWID;
CREATE TRIGGER no_record_update BEFORE UPDATE ON records BEGIN SELECT RAISE(ABORT, 'records are only ever added'); END;
CREATE TRIGGER no_record_delete BEFORE DELETE ON records BEGIN SELECT RAISE(ABORT, 'records are only ever added'); END;
CREATE TABLE secrets (key BLOB NOT NULL);
INSERT INTO secrets VALUES (X'{os.urandom(32).hex()}');
""",
    )


def m3_exposures(db: sqlite3.Connection) -> None:
    """Add rounds without privacy, and the data set that caused a charge to another one."""
    run_script(
        db,
        """
CREATE TABLE exposures (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    dataset TEXT NOT NULL,
    run TEXT NOT NULL,
    round INTEGER NOT NULL,
    steps INTEGER NOT NULL CHECK (steps >= 0),
    released_at TEXT NOT NULL
);
CREATE TRIGGER no_exposure_update BEFORE UPDATE ON exposures
    BEGIN SELECT RAISE(ABORT, 'exposures are only ever added'); END;
CREATE TRIGGER no_exposure_delete BEFORE DELETE ON exposures
    BEGIN SELECT RAISE(ABORT, 'exposures are only ever added'); END;
ALTER TABLE charges ADD COLUMN caused_by TEXT;
""",
    )


def m4_failures(db: sqlite3.Connection) -> None:
    """Add rounds that were answered by noise alone."""
    run_script(
        db,
        """
CREATE TABLE failures (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    dataset TEXT NOT NULL,
    run TEXT NOT NULL,
    round INTEGER NOT NULL,
    reason TEXT NOT NULL,
    failed_at TEXT NOT NULL
);
CREATE TRIGGER no_failure_update BEFORE UPDATE ON failures
    BEGIN SELECT RAISE(ABORT, 'failures are only ever added'); END;
CREATE TRIGGER no_failure_delete BEFORE DELETE ON failures
    BEGIN SELECT RAISE(ABORT, 'failures are only ever added'); END;
""",
    )


def m5_releases_as_data(db: sqlite3.Connection) -> None:
    """Turn the figures of a charge from columns into data: the kind of its event, and figures by name as JSON.

    The unit that a charge protects is written down, too: until then it was one record. Every row keeps its number, and
    every float its bits: JSON holds the shortest decimal that reads back as it.

    Raises:
        ConversionError: a row did not come over as it was.
    """
    run_script(
        db,
        """
CREATE TABLE releases (
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
""",
    )
    old = db.execute(
        "SELECT id, dataset, run, round, kind, noise_multiplier, sample_rate, clip_norm, count, delta, charged_at, "
        "caused_by FROM charges ORDER BY id"
    ).fetchall()
    for number, dataset, run, round_number, purpose, noise, rate, clip, *rest in old:
        figures = {"clip_norm": clip, "noise_multiplier": noise, "sample_rate": rate}
        db.execute(
            "INSERT INTO releases VALUES (?, ?, ?, ?, ?, 'record', 'sampled-gaussian', ?, ?, ?, ?, ?)",
            (number, dataset, run, round_number, purpose, json.dumps(figures, separators=(",", ":")), *rest),
        )
    new = db.execute(
        "SELECT id, dataset, run, round, purpose, figures, count, delta, charged_at, caused_by "
        "FROM releases ORDER BY id"
    ).fetchall()
    columns = [
        (*row[:5], *(json.loads(row[5])[name] for name in ("noise_multiplier", "sample_rate", "clip_norm")), *row[6:])
        for row in new
    ]
    if columns != old:
        raise ConversionError("the charges did not come over as they were: ask for help")
    run_script(
        db,
        """
DROP TABLE charges;
ALTER TABLE releases RENAME TO charges;
CREATE TRIGGER no_update BEFORE UPDATE ON charges BEGIN SELECT RAISE(ABORT, 'charges are only ever added'); END;
CREATE TRIGGER no_delete BEFORE DELETE ON charges BEGIN SELECT RAISE(ABORT, 'charges are only ever added'); END;
""",
    )


def m6_mask_keys(db: sqlite3.Connection) -> None:
    """Add the keys under which a vector of a secure sum was charged for: no second one may be under the same masks."""
    run_script(
        db,
        """
CREATE TABLE mask_keys (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    key BLOB NOT NULL UNIQUE CHECK (length(key) = 32),
    dataset TEXT NOT NULL,
    run TEXT NOT NULL,
    round INTEGER NOT NULL,
    charged_at TEXT NOT NULL
);
CREATE TRIGGER no_mask_key_update BEFORE UPDATE ON mask_keys
    BEGIN SELECT RAISE(ABORT, 'mask keys are only ever added'); END;
CREATE TRIGGER no_mask_key_delete BEFORE DELETE ON mask_keys
    BEGIN SELECT RAISE(ABORT, 'mask keys are only ever added'); END;
""",
    )


def m7_holds(db: sqlite3.Connection) -> None:
    """Add budget that is kept for a run, and data sets that their steward has withdrawn."""
    run_script(
        db,
        """
CREATE TABLE reservations (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    dataset TEXT NOT NULL,
    run TEXT NOT NULL CHECK (run != ''),
    epsilon REAL NOT NULL CHECK (epsilon >= 0),
    until TEXT NOT NULL,
    set_at TEXT NOT NULL
);
CREATE TRIGGER no_reservation_update BEFORE UPDATE ON reservations
    BEGIN SELECT RAISE(ABORT, 'reservations are only ever added'); END;
CREATE TRIGGER no_reservation_delete BEFORE DELETE ON reservations
    BEGIN SELECT RAISE(ABORT, 'reservations are only ever added'); END;
CREATE TABLE withdrawals (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    dataset TEXT NOT NULL CHECK (dataset != ''),
    reason TEXT NOT NULL CHECK (reason != ''),
    withdrawn_at TEXT NOT NULL
);
CREATE TRIGGER no_withdrawal_update BEFORE UPDATE ON withdrawals
    BEGIN SELECT RAISE(ABORT, 'withdrawals are only ever added'); END;
CREATE TRIGGER no_withdrawal_delete BEFORE DELETE ON withdrawals
    BEGIN SELECT RAISE(ABORT, 'withdrawals are only ever added'); END;
""",
    )


def m8_what_was_charged_before(db: sqlite3.Connection) -> None:
    """Add to a reservation the last charge that was made before it; an earlier one counts all charges of its run."""
    db.execute("ALTER TABLE reservations ADD COLUMN last_charge INTEGER NOT NULL DEFAULT 0")


def m9_one_part_in_a_sum(db: sqlite3.Connection) -> None:
    """Add to a key of masks whose it is, and the lists of survivors that were signed: of one attempt, one."""
    run_script(
        db,
        """
ALTER TABLE mask_keys ADD COLUMN site TEXT NOT NULL DEFAULT '';
CREATE TABLE signed_lists (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    context BLOB NOT NULL UNIQUE CHECK (length(context) = 32),
    survivors TEXT NOT NULL CHECK (survivors != ''),
    signed_at TEXT NOT NULL
);
CREATE TRIGGER no_signed_list_update BEFORE UPDATE ON signed_lists
    BEGIN SELECT RAISE(ABORT, 'signed lists are only ever added'); END;
CREATE TRIGGER no_signed_list_delete BEFORE DELETE ON signed_lists
    BEGIN SELECT RAISE(ABORT, 'signed lists are only ever added'); END;
""",
    )


def m10_first_plans(db: sqlite3.Connection) -> None:
    """Add what the first run of a data set planned, by which all that it releases is priced."""
    run_script(
        db,
        """
CREATE TABLE plans (
    dataset TEXT PRIMARY KEY CHECK (dataset != ''),
    run TEXT NOT NULL,
    releases TEXT NOT NULL CHECK (releases != ''),
    committed_at TEXT NOT NULL
);
CREATE TRIGGER no_plan_update BEFORE UPDATE ON plans BEGIN SELECT RAISE(ABORT, 'plans are only ever added'); END;
CREATE TRIGGER no_plan_delete BEFORE DELETE ON plans BEGIN SELECT RAISE(ABORT, 'plans are only ever added'); END;
""",
    )


def m11_held_out_rows(db: sqlite3.Connection) -> None:
    """Add the rules by which rows were held out of training; what was charged before had none."""
    run_script(
        db,
        """
CREATE TABLE held_out (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    dataset TEXT NOT NULL CHECK (dataset != ''),
    rule TEXT NOT NULL,
    set_at TEXT NOT NULL
);
CREATE TRIGGER no_held_out_update BEFORE UPDATE ON held_out
    BEGIN SELECT RAISE(ABORT, 'held out rules are only ever added'); END;
CREATE TRIGGER no_held_out_delete BEFORE DELETE ON held_out
    BEGIN SELECT RAISE(ABORT, 'held out rules are only ever added'); END;
""",
    )


STEPS: tuple[Step, ...] = (
    m1_charges,
    m2_budgets_and_records,
    m3_exposures,
    m4_failures,
    m5_releases_as_data,
    m6_mask_keys,
    m7_holds,
    m8_what_was_charged_before,
    m9_one_part_in_a_sum,
    m10_first_plans,
    m11_held_out_rows,
)
"""The step that each format is made by, the first one's first."""
FORMAT = len(STEPS)
