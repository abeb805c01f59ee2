"""The file of a ledger: who may read it, what it refuses, and what no statement changes in it."""

from __future__ import annotations

import os
import re
import sqlite3
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from ledgers import DELTA, ROUND, charge, charge_for, cost_of, no_special_rights, texts

from fedveil.client.ledger.file import only_ledger, withdrawn_in
from fedveil.client.ledger.ledger import Ledger
from fedveil.client.ledger.schema import APPLICATION_ID, FORMAT
from fedveil.common.errors import LedgerError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "site.sqlite"


def test_rows_can_neither_be_changed_nor_removed(path: Path) -> None:
    with Ledger(path) as ledger:
        charge(ledger, 1)
    connection = sqlite3.connect(path)
    for statement in ("UPDATE charges SET count = 1", "DELETE FROM charges"):
        with pytest.raises(sqlite3.IntegrityError, match="only ever added"):
            connection.execute(statement)
    connection.close()


def test_the_file_is_its_owners_alone_and_survives_power_loss_by_its_settings(path: Path) -> None:
    with Ledger(path) as ledger:
        charge(ledger, 1)
        settings = [
            ledger._file._connection.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("journal_mode", "synchronous", "temp_store")
        ]
    assert settings == ["delete", 3, 2]  # 3 is EXTRA; 2 is MEMORY: no hash of a record is in a temporary file
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(path.parent) == [path.name], "a copy of the one file must be a copy of the ledger"


def write_text(path: Path) -> None:
    path.write_text("site,epsilon\nward,0\n" * 200)


def write_nothing(path: Path) -> None:
    path.touch()


def write_other_database(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE charges (id INTEGER)")
    connection.close()


def write_newer_format(path: Path, number: int = FORMAT + 1) -> None:
    Ledger(path).close()
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA user_version = {number}")
    connection.close()


def write_older_format(path: Path) -> None:
    write_newer_format(path, FORMAT - 1)


def write_damaged(path: Path) -> None:
    with Ledger(path) as ledger:
        charge(ledger, 1)
    content = bytearray(path.read_bytes())
    content[4096 : 4096 + 64] = b"\xff" * 64
    path.write_bytes(content)


def write_damaged_where_no_charge_looks(path: Path) -> None:
    """Leave a row that its table does not allow: SQLite's check then returns what it found, and raises nothing."""
    Ledger(path).close()
    connection = sqlite3.connect(path)
    connection.executescript(
        "PRAGMA ignore_check_constraints = ON; INSERT INTO reservations (dataset, run, epsilon, until, set_at) "
        "VALUES ('ward', 'run-1', -1, '2026-01-01', '2026-01-01');"
    )
    connection.close()


def write_marked_and_empty(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    connection.close()


def write_cut_short(path: Path) -> None:
    with Ledger(path) as ledger:
        charge(ledger, 1)
    os.truncate(path, path.stat().st_size // 2)


def write_impossible_figure(path: Path) -> None:
    with Ledger(path) as ledger:
        charge(ledger, 1)
    connection = sqlite3.connect(path)
    figures = ROUND.event.having(noise_multiplier=-1).text()
    connection.executescript(f"DROP TRIGGER no_update; UPDATE charges SET figures = '{figures}';")
    connection.close()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (write_text, "not a ledger"),
        (write_nothing, "not a FedVeil ledger"),
        (write_other_database, "not a FedVeil ledger"),
        (write_older_format, f"format {FORMAT - 1}, this FedVeil reads format {FORMAT} alone: install the FedVeil"),
        (write_newer_format, f"format {FORMAT + 1}, this FedVeil reads format {FORMAT} alone: install"),
        (write_marked_and_empty, f"format 0, this FedVeil reads format {FORMAT} alone: install"),
        (write_damaged, "damaged"),
        (write_damaged_where_no_charge_looks, "damaged"),
        (write_cut_short, "damaged"),
        (write_impossible_figure, "damaged"),
    ],
)
def test_a_file_that_cannot_be_trusted_stops_the_site_in_one_line(
    path: Path, spoil: Callable[[Path], None], reason: str
) -> None:
    spoil(path)
    before = path.read_bytes()
    with pytest.raises(LedgerError, match=reason) as error, Ledger(path) as ledger:
        charge(ledger, 1)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    assert path.read_bytes() == before


def test_a_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes").touch()
    with pytest.raises(LedgerError, match=r"cannot be made") as error:
        Ledger(tmp_path / "notes" / "site.sqlite")
    assert "\n" not in str(error.value)


@pytest.mark.skipif(
    not Path("/proc/self").is_dir() and not os.environ.get("FEDVEIL_CI"),
    reason="needs Linux's /proc, where not even root can write",
)
def test_a_folder_that_cannot_be_written_is_named() -> None:
    with pytest.raises(LedgerError, match=r"/proc/site\.sqlite cannot be made"):
        Ledger(Path("/proc/site.sqlite"))


def test_a_ledger_that_cannot_be_written_charges_nothing() -> None:
    # Not in pytest's folder, which only its owner may enter.
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "site.sqlite"
        Ledger(path).close()
        path.chmod(0o444)
        path.parent.chmod(0o555)
        cost_of(1)  # loads the accountant's libraries, which nobody without rights might read
        with no_special_rights(), pytest.raises(LedgerError), Ledger(path) as ledger:
            charge(ledger, 1)
        path.parent.chmod(0o755)
        path.chmod(0o600)
        with Ledger(path) as ledger:
            assert ledger.entries() == []


def test_a_folder_that_nobody_may_look_into_is_none_without_a_ledger() -> None:
    """Not an error of its own kind either: where a failure is noted only a LedgerError is let be."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "site.sqlite"
        Ledger(path).close()
        for rights, asks in ((0o600, (Ledger, withdrawn_in)), (0o333, (lambda file: only_ledger(file.parent),))):
            path.parent.chmod(rights)
            for ask in asks:
                with no_special_rights(), pytest.raises(LedgerError, match="Permission denied") as error:
                    ask(path)
                assert "\n" not in str(error.value)
        path.parent.chmod(0o700)
        assert only_ledger(path.parent) == path
        with pytest.raises(LedgerError, match="File name too long"):
            withdrawn_in(path.with_name("x" * 300))


def test_a_folder_that_is_missing_is_made(tmp_path: Path) -> None:
    path = tmp_path / "node #1?" / "ledgers" / "site.sqlite"
    with Ledger(path) as ledger:
        charge(ledger, 1)
    with Ledger(path) as ledger:
        assert len(ledger.entries()) == 1


def test_the_files_mark_is_the_documented_one(path: Path) -> None:
    Ledger(path).close()
    assert path.read_bytes()[68:72] == APPLICATION_ID.to_bytes(4, "big") == b"FVLD"


def test_every_table_but_that_of_the_key_refuses_changes_and_removals(path: Path) -> None:
    Ledger(path).close()
    connection = sqlite3.connect(path)
    held = connection.execute("SELECT type, tbl_name, sql FROM sqlite_master WHERE name NOT LIKE 'sqlite_%'").fetchall()
    connection.close()
    tables = {table for kind, table, _ in held if kind == "table"} - {"secrets"}
    assert {"charges", "reservations", "withdrawals", "mask_keys", "signed_lists", "plans"} <= tables
    for table in tables:
        for verb in ("UPDATE", "DELETE"):
            stop = rf"BEFORE {verb} ON {table}\s+BEGIN SELECT RAISE\(ABORT, '[a-z ]+ are only ever added'\); END"
            assert any(kind == "trigger" and re.search(stop, said) for kind, _, said in held), (verb, table)


@pytest.mark.parametrize("table", ["budgets", "records"])
def test_budgets_and_hashes_can_neither_be_changed_nor_removed(path: Path, table: str) -> None:
    charge_for(path, "ward", texts(1, 2, 3))
    with Ledger(path) as ledger:
        ledger.set_budget("ward", 3.0, DELTA)
    connection = sqlite3.connect(path)
    for statement in (f"UPDATE {table} SET dataset = 'x'", f"DELETE FROM {table}"):
        with pytest.raises(sqlite3.IntegrityError, match="only ever added"):
            connection.execute(statement)
    connection.close()
