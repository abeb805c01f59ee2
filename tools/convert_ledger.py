"""Bring a ledger of an earlier format to the present one: ``python -m tools.convert_ledger LEDGER...``.

It is run in a checkout of the repository and needs Python's standard library alone. It takes a site's ledger (SQLite)
and a trusted server's (JSON). The product refuses such a file and names this command.

Guarantees. Every charge, exposure, failure, plan, budget, reservation, withdrawal, mask key, record hash and key comes
over as it is: rows are compared before anything is final. The file is changed in its place, in one transaction of
SQLite or by one rename. So an interrupted conversion leaves the old ledger whole, and there is never a second one that
counts less. A file whose tables are not those of the format that it names is left as it is.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from tools.ledger_formats import FORMAT, STEPS, ConversionError

APPLICATION_ID = 0x46564C44
"""``FVLD``, in the header of a site's ledger."""
SQLITE = b"SQLite format 3\0"
SECONDS = 60.0
"""How long a lock that others hold is waited for."""
SERVER_FORMAT = 2
"""Of a trusted server's ledger; the one before had no plan."""

Rows = dict[str, tuple[list[str], list[tuple[Any, ...]]]]
"""Of each table its columns and its rows."""


def convert(path: Path) -> str:
    """Bring one ledger to the present format in its place; return what was done, in one line.

    Raises:
        ConversionError: it is left as it is.
    """
    with _one_line():
        if path.stat().st_nlink > 1:
            raise ConversionError(
                "it has another name (a hard link): remove all but one, and keep the one that has a file of its name "
                "with '-journal' beside it, if any has"
            )
        with path.open("rb") as file:
            is_sites = file.read(len(SQLITE)) == SQLITE
        return _convert_site(path) if is_sites else _convert_server(path)


def _convert_site(path: Path) -> str:
    place = f"{path.absolute().as_uri()}?mode=rw"
    with closing(sqlite3.connect(place, timeout=SECONDS, isolation_level=None, uri=True)) as db:
        for pragma in ("journal_mode=DELETE", "synchronous=EXTRA", "temp_store=MEMORY"):
            db.execute(f"PRAGMA {pragma}")
        with _transaction(db):
            application, present = _mark(db, "application_id"), _mark(db, "user_version")
            if application != APPLICATION_ID:
                raise ConversionError("it is not a FedVeil ledger: name another file")
            if finding := [row for row in db.execute("PRAGMA quick_check") if row != ("ok",)]:
                raise ConversionError(f"it is damaged ({finding[0][0]}): do not train, ask for help")
            if present == FORMAT:
                return f"has format {FORMAT} already, nothing was changed"
            if not 1 <= present < FORMAT:
                raise ConversionError(f"it has format {present}, which is not known here: take a newer FedVeil")
            before = rows_of(db)
            if layout(db) != layout_of(present):
                raise ConversionError(f"its tables are not those of format {present}, which it names: ask for help")
            for step in STEPS[present:]:
                step(db)
            db.execute(f"PRAGMA user_version = {FORMAT}")
            _compare(before, rows_of(db), figures_are_columns=present < 5)
            if layout(db) != layout_of(FORMAT):
                raise ConversionError("its tables did not become those of the present format: ask for help")
        counts = ", ".join(f"{len(rows)} {table}" for table, (_, rows) in sorted(before.items()) if table != "secrets")
    return f"format {present} became {FORMAT}: {counts}"


def layout_of(number: int) -> list[tuple[Any, ...]]:
    """Return the layout of a new ledger of a format."""
    with closing(sqlite3.connect(":memory:")) as db:
        for step in STEPS[:number]:
            step(db)
        return layout(db)


def layout(db: sqlite3.Connection) -> list[tuple[Any, ...]]:
    """Return the names of a file's triggers, and the columns of its tables, in order."""
    triggers = db.execute("SELECT name, tbl_name FROM sqlite_master WHERE type = 'trigger' ORDER BY name").fetchall()
    columns = db.execute(
        'SELECT t.name, c.name, c.type, c."notnull", c.pk FROM sqlite_master AS t JOIN pragma_table_info(t.name) AS c '
        "WHERE t.type = 'table' AND t.name NOT LIKE 'sqlite_%' ORDER BY t.name, c.cid"
    ).fetchall()
    return [*triggers, *columns]


def rows_of(db: sqlite3.Connection) -> Rows:
    """Return all rows of all tables of a file."""
    names = [
        name
        for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'")
    ]
    found: Rows = {}
    for name in names:
        cursor = db.execute(f'SELECT * FROM "{name}"')
        found[name] = ([column for column, *_ in cursor.description], sorted(cursor.fetchall(), key=repr))
    return found


def _compare(before: Rows, after: Rows, *, figures_are_columns: bool) -> None:
    """Raise ConversionError unless every row is there as it was, in the columns that there were.

    The charges of formats before 5 have their figures in columns, which the step to 5 compares itself.
    """
    for table, (columns, _) in before.items():
        if table == "charges" and figures_are_columns:
            columns = ["id", "dataset", "run", "round", "count", "delta", "charged_at"]
        elif table not in after:
            raise ConversionError(f"the table {table} did not come over: ask for help")
        if _in_columns(before[table], columns) != _in_columns(after[table], columns):
            raise ConversionError(f"the rows of {table} did not come over as they were: ask for help")


def _in_columns(table: tuple[list[str], list[tuple[Any, ...]]], columns: list[str]) -> list[tuple[Any, ...]]:
    places = [table[0].index(column) for column in columns]
    return sorted((tuple(row[place] for place in places) for row in table[1]), key=repr)


def _mark(db: sqlite3.Connection, name: str) -> int:
    return int(db.execute(f"PRAGMA {name}").fetchone()[0])


@contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    """Hold the write lock until the commit; undo everything if anything fails."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def _convert_server(path: Path) -> str:
    """Write down as the first plan all that was charged, by which a ledger without a plan was priced."""
    if path.is_symlink():
        raise ConversionError("it is a symbolic link: name the file that it leads to")
    if _present_of_server(path)["format"] == SERVER_FORMAT:
        return f"has format {SERVER_FORMAT} already, nothing was changed"
    with _alone(path):
        ledger = _present_of_server(path)
        plan: list[dict[str, Any]] = []
        for charge in ledger["charges"]:
            planned = next((release for release in plan if release["event"] == charge["event"]), None)
            if planned is None:
                plan.append({"event": charge["event"], "count": 1, "purpose": "training"})
            else:
                planned["count"] += 1
        if not plan:
            raise ConversionError("it holds no charge: move it away, and the first charge makes a new one")
        _replace(path, json.dumps({**ledger, "format": SERVER_FORMAT, "first_plan": plan}, indent=1) + "\n")
    return f"format {ledger['format']} became {SERVER_FORMAT}: {len(ledger['charges'])} charges"


def _present_of_server(path: Path) -> dict[str, Any]:
    """Return what a trusted server's ledger holds, of the present format or the one before."""
    ledger = json.loads(path.read_bytes())
    if (
        not isinstance(ledger, dict)
        or type(ledger.get("format")) is not int
        or not isinstance(ledger.get("charges"), list)
    ):
        raise ConversionError("it is not a FedVeil ledger: name another file")
    if ledger["format"] not in (SERVER_FORMAT - 1, SERVER_FORMAT):
        raise ConversionError(f"it has format {ledger['format']}, which is not known here: take a newer FedVeil")
    if bool(ledger.get("first_plan")) != (ledger["format"] == SERVER_FORMAT):
        raise ConversionError(f"it does not hold what format {ledger['format']} holds: ask for help")
    return ledger


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold the lock that a server holds while it charges."""
    lock = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(lock)


def _replace(path: Path, text: str) -> None:
    """Put a file in the place of another by one rename, on disk before and after; rights stay."""
    descriptor, draft = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            os.fchmod(descriptor, stat.S_IMODE(path.stat().st_mode))
            file.write(text)
            file.flush()
            os.fsync(descriptor)
        Path(draft).replace(path.resolve())
    finally:
        Path(draft).unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(folder)
    os.close(folder)


@contextmanager
def _one_line() -> Iterator[None]:
    """Turn what SQLite, JSON and the file system raise into a ConversionError of one line."""
    try:
        yield
    except BlockingIOError as error:
        raise ConversionError("it is in use by a server: stop that, and try again") from error
    except sqlite3.OperationalError as error:
        why = "check permissions and space, of its folder too" if "locked" not in str(error) else "stop who uses it"
        raise ConversionError(f"it cannot be converted ({error}): {why}") from error
    except (sqlite3.DatabaseError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ConversionError(f"it is damaged or not a ledger ({reason}): do not train, ask for help") from error
    except OSError as error:
        raise ConversionError(f"it cannot be converted ({error.strerror}): check its name and permissions") from error


def main(names: list[str]) -> int:
    """Convert each named ledger; return the exit code."""
    if not names:
        print("name a ledger: python -m tools.convert_ledger LEDGER...", file=sys.stderr)
        return 2
    failed = 0
    for name in names:
        try:
            print(f"{name}: {convert(Path(name))}")
        except ConversionError as error:
            print(f"{name} is left as it was: {error}", file=sys.stderr)
            failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
