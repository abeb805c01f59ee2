"""Ledgers of other formats are refused, and the converter brings them over with all that they hold, or not at all."""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import random
import shlex
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ledgers import no_special_rights

from fedveil.client.ledger.file import withdrawn_in
from fedveil.client.ledger.ledger import Ledger
from fedveil.client.ledger.rows import Charge, Receipt, Terms
from fedveil.client.ledger.schema import APPLICATION_ID, FORMAT, is_laid_out
from fedveil.common.errors import LedgerError
from fedveil.privacy.accounting import Release, gaussian_release
from fedveil.privacy.events import sampled_gaussian
from fedveil.privacy.privacy_filter import Commitment, commitment_to, price, promised
from fedveil.server.ledger import FORMAT as SERVER_FORMAT
from fedveil.server.ledger import ServerLedger
from tools import convert_ledger, ledger_formats
from tools.convert_ledger import convert, layout_of, main
from tools.ledger_formats import STEPS, ConversionError, run_script

ROOT = Path(__file__).parents[2]
WHISPER = gaussian_release(noise_multiplier=20.0, sample_rate=0.01, count=1)
# fork: a child that has to import the libraries again takes seconds.
processes = multiprocessing.get_context("fork")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "site.sqlite"


def charge(path: Path, round_number: int, release: Release = WHISPER, dataset: str = "ward", **more: Any) -> Receipt:
    with Ledger(path) as ledger:
        return ledger.charge(Charge(dataset, "1", round_number, (release,), 1e-5, 50.0, **more))


FIRST_FORMAT = """
CREATE TABLE charges (
    id INTEGER PRIMARY KEY AUTOINCREMENT, dataset TEXT NOT NULL, run TEXT NOT NULL, round INTEGER NOT NULL,
    kind TEXT NOT NULL, noise_multiplier REAL NOT NULL CHECK (noise_multiplier > 0),
    sample_rate REAL NOT NULL CHECK (sample_rate > 0 AND sample_rate <= 1),
    count INTEGER NOT NULL CHECK (count >= 1), delta REAL NOT NULL, clip_norm REAL NOT NULL, charged_at TEXT NOT NULL
);
CREATE TRIGGER no_update BEFORE UPDATE ON charges BEGIN SELECT RAISE(ABORT, 'charges are only ever added'); END;
CREATE TRIGGER no_delete BEFORE DELETE ON charges BEGIN SELECT RAISE(ABORT, 'charges are only ever added'); END;
INSERT INTO charges (dataset, run, round, kind, noise_multiplier, sample_rate, count, delta, clip_norm, charged_at)
VALUES ('ward', 'old', 1, 'training', 1.0, 0.1, 5, 1e-5, 0.5, '2026-01-02T03:04:05+00:00');
PRAGMA application_id = 0x46564C44;
PRAGMA user_version = 1;
"""


SECOND_FORMAT = """
CREATE TABLE charges (
    id INTEGER PRIMARY KEY AUTOINCREMENT, dataset TEXT NOT NULL, run TEXT NOT NULL, round INTEGER NOT NULL,
    kind TEXT NOT NULL, noise_multiplier REAL NOT NULL CHECK (noise_multiplier > 0),
    sample_rate REAL NOT NULL CHECK (sample_rate > 0 AND sample_rate <= 1),
    count INTEGER NOT NULL CHECK (count >= 1), delta REAL NOT NULL, clip_norm REAL NOT NULL, charged_at TEXT NOT NULL
);
CREATE TRIGGER no_update BEFORE UPDATE ON charges BEGIN SELECT RAISE(ABORT, 'charges are only ever added'); END;
CREATE TRIGGER no_delete BEFORE DELETE ON charges BEGIN SELECT RAISE(ABORT, 'charges are only ever added'); END;
CREATE TABLE budgets (
    id INTEGER PRIMARY KEY AUTOINCREMENT, dataset TEXT NOT NULL, epsilon REAL NOT NULL CHECK (epsilon > 0),
    delta REAL NOT NULL CHECK (delta > 0 AND delta < 0.5), set_at TEXT NOT NULL
);
CREATE TRIGGER no_budget_update BEFORE UPDATE ON budgets BEGIN SELECT RAISE(ABORT, 'budgets are only ever added'); END;
CREATE TRIGGER no_budget_delete BEFORE DELETE ON budgets BEGIN SELECT RAISE(ABORT, 'budgets are only ever added'); END;
CREATE TABLE records (hash INTEGER NOT NULL, dataset TEXT NOT NULL, PRIMARY KEY (hash, dataset)) WITHOUT ROWID;
CREATE TRIGGER no_record_update BEFORE UPDATE ON records BEGIN SELECT RAISE(ABORT, 'records are only ever added'); END;
CREATE TRIGGER no_record_delete BEFORE DELETE ON records BEGIN SELECT RAISE(ABORT, 'records are only ever added'); END;
CREATE TABLE secrets (key BLOB NOT NULL);
INSERT INTO secrets VALUES (x'000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f');
INSERT INTO charges (dataset, run, round, kind, noise_multiplier, sample_rate, count, delta, clip_norm, charged_at)
VALUES ('ward', 'old', 1, 'training', 20.0, 0.01, 1, 1e-5, 0.5, '2026-01-02T03:04:05+00:00');
INSERT INTO budgets (dataset, epsilon, delta, set_at) VALUES ('ward', 3.0, 1e-5, '2026-01-02T03:04:05+00:00');
INSERT INTO records VALUES (7, 'ward');
PRAGMA application_id = 0x46564C44;
PRAGMA user_version = 2;
"""


THIRD_FORMAT = f"""{SECOND_FORMAT}
CREATE TABLE exposures (
    id INTEGER PRIMARY KEY AUTOINCREMENT, dataset TEXT NOT NULL, run TEXT NOT NULL, round INTEGER NOT NULL,
    steps INTEGER NOT NULL CHECK (steps >= 0), released_at TEXT NOT NULL
);
CREATE TRIGGER no_exposure_update BEFORE UPDATE ON exposures
    BEGIN SELECT RAISE(ABORT, 'exposures are only ever added'); END;
CREATE TRIGGER no_exposure_delete BEFORE DELETE ON exposures
    BEGIN SELECT RAISE(ABORT, 'exposures are only ever added'); END;
ALTER TABLE charges ADD COLUMN caused_by TEXT;
INSERT INTO exposures (dataset, run, round, steps, released_at)
VALUES ('lab', 'open', 1, 2, '2026-01-02T03:04:05+00:00');
PRAGMA user_version = 3;
"""


def laid_out(path: Path, script: str) -> Path:
    connection = sqlite3.connect(path)
    connection.executescript(script)
    connection.close()
    return path


def content(path: Path) -> dict[str, Any]:
    """Return the format, the tables' columns and triggers, and the rows that format 2 has."""
    connection = sqlite3.connect(path)
    tables = ("charges", "budgets", "records", "secrets")
    found = {
        "format": connection.execute("PRAGMA user_version").fetchone()[0],
        "names": sorted(connection.execute("SELECT name, type FROM sqlite_master WHERE name NOT LIKE 'sqlite_%'")),
        "columns": {name: [row[1:] for row in connection.execute(f"PRAGMA table_info({name})")] for name in tables},
        "rows": {name: connection.execute(f"SELECT * FROM {name}").fetchall() for name in tables},
    }
    connection.close()
    return found


def as_data(*row: Any) -> tuple[Any, ...]:
    """Return a charge of format 1 to 4 as format 5 has it: its figures as data, and all else as it was."""
    number, dataset, run, round_number, kind, noise, rate, count, delta, clip, when, *cause = row
    figures = f'{{"clip_norm":{clip!r},"noise_multiplier":{noise!r},"sample_rate":{rate!r}}}'
    what = (kind, "record", "sampled-gaussian", figures, count)
    return number, dataset, run, round_number, *what, delta, when, *(cause or (None,))


LAYOUTS = (
    *("8844aba8", "0e65a028", "e888c9cb", "a9e05ee1", "8626a8b9"),
    *("e2df26a2", "61ae3799", "f6247648", "a6509f5e", "4596f8c4", "16d3f3d9"),
)
"""Of each format, the beginning of the SHA-256 of all that SQLite says its tables and triggers are."""


def test_no_step_to_a_format_has_changed_since_it_was_made() -> None:
    """A ledger in use has the tables that its steps made then, with what they refuse: a change needs a step more."""
    connection, found = sqlite3.connect(":memory:"), []
    for step in STEPS:
        step(connection)
        rows = connection.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY type, name")
        text = "\n".join(" ".join(sql.replace('"', "").split()) for (sql,) in rows)
        found.append(hashlib.sha256(text.encode()).hexdigest()[:8])
    connection.close()
    assert tuple(found) == LAYOUTS


FOURTH_FORMAT = f"""{THIRD_FORMAT}
CREATE TABLE failures (
    id INTEGER PRIMARY KEY AUTOINCREMENT, dataset TEXT NOT NULL, run TEXT NOT NULL, round INTEGER NOT NULL,
    reason TEXT NOT NULL, failed_at TEXT NOT NULL
);
CREATE TRIGGER no_failure_update BEFORE UPDATE ON failures
    BEGIN SELECT RAISE(ABORT, 'failures are only ever added'); END;
CREATE TRIGGER no_failure_delete BEFORE DELETE ON failures
    BEGIN SELECT RAISE(ABORT, 'failures are only ever added'); END;
INSERT INTO failures (dataset, run, round, reason, failed_at)
VALUES ('ward', 'old', 1, 'no memory', '2026-01-02T03:04:05+00:00');
PRAGMA user_version = 4;
"""
OLD_NAMES = ("ward", "clinic", "lab")
INSERT = (
    "INSERT INTO charges (dataset, run, round, kind, noise_multiplier, sample_rate, count, delta, clip_norm, "
    "charged_at, caused_by) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, '2026-01-02T03:04:05+00:00', ?)"
)


@pytest.fixture
def fourth_format(path: Path) -> Path:
    """Return a ledger of format 4 with figures of many digits, all purposes, and charges that others caused."""
    laid_out(path, FOURTH_FORMAT)
    draw, connection = random.Random(5), sqlite3.connect(path)
    for number in range(60):
        name, kind = draw.choice(OLD_NAMES), draw.choice(["training", "initialisation", "evaluation", "count"])
        figures = (draw.uniform(4.0, 30.0), draw.choice([1.0, 0.1 + 0.2, draw.uniform(1e-6, 0.1)]), draw.randint(1, 9))
        row = (name, f"run {number % 7}", number % 5, kind, *figures, draw.choice([1e-5, 3e-6]), draw.uniform(0.1, 5.0))
        connection.execute(INSERT, (*row, draw.choice([None, None, "elsewhere"])))
    connection.commit()
    connection.close()
    return path


def epsilons_by_columns(path: Path) -> dict[str, float]:
    """Return what each data set of a ledger of format 4 has spent, by its columns and without the ledger's code."""
    connection = sqlite3.connect(path)
    spent: dict[str, list[Release]] = {}
    for name, noise, rate, number in connection.execute(
        "SELECT dataset, noise_multiplier, sample_rate, count FROM charges ORDER BY id"
    ):
        spent.setdefault(name, []).append(gaussian_release(noise, rate, number))
    connection.close()
    return {name: promised(releases, 1e-6)[0] for name, releases in spent.items()}


def of_format(path: Path, number: int) -> Path:
    """Make a ledger of a format by its own steps, with a row at least in every table that it has."""
    connection = sqlite3.connect(path)
    for step in STEPS[:number]:
        step(connection)
    have = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    row = "('ward', 'old', 1, 'training', 7.3, 0.07, 3, 1e-5, 0.5, 'then')"
    if number < 5:
        connection.execute(
            "INSERT INTO charges (dataset, run, round, kind, noise_multiplier, sample_rate, count, delta, clip_norm, "
            f"charged_at) VALUES {row}"
        )
    else:
        figures = '{"clip_norm":0.5,"noise_multiplier":7.3,"sample_rate":0.07}'
        connection.execute(
            "INSERT INTO charges (dataset, run, round, purpose, unit, kind, figures, count, delta, charged_at) VALUES "
            "('ward', 'old', 1, 'training', 'record', 'sampled-gaussian', ?, 3, 1e-5, 'then')",
            (figures,),
        )
    rows = {
        "budgets": "(dataset, epsilon, delta, set_at) VALUES ('ward', 3.0, 1e-5, 'then'), ('ward', 9.0, 2e-5, 'later')",
        "records": "VALUES (7, 'ward'), (8, 'ward'), (8, 'lab')",
        "exposures": "(dataset, run, round, steps, released_at) VALUES ('attic', 'open', 1, 2, 'then')",
        "failures": "(dataset, run, round, reason, failed_at) VALUES ('ward', 'old', 1, 'no memory', 'then')",
        "held_out": "(dataset, rule, set_at) VALUES ('ward', 'a share', 'then')",
        "mask_keys": "(key, dataset, run, round, charged_at) VALUES (zeroblob(32), 'ward', 'old', 1, 'then')",
        "reservations": "(dataset, run, epsilon, until, set_at) VALUES ('ward', 'next', 1.5, '2999-01-01', 'then')",
        "withdrawals": "(dataset, reason, withdrawn_at) VALUES ('clinic', 'asked for', 'then')",
        "signed_lists": "(context, survivors, signed_at) VALUES (zeroblob(32), '[\"x\"]', 'then')",
    }
    for table, values in rows.items():
        if table in have:
            connection.execute(f"INSERT INTO {table} {values}")
    connection.commit()
    connection.executescript(f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {number};")
    connection.close()
    return path


def dumped(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Return all rows of all tables, by the names of their columns."""
    connection = sqlite3.connect(path)
    connection.row_factory = sqlite3.Row
    tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    found = {name: [dict(row) for row in connection.execute(f"SELECT * FROM {name} ORDER BY 1")] for name in tables}
    connection.close()
    return found


def test_the_tables_of_a_new_ledger_are_those_that_the_steps_end_in(path: Path) -> None:
    assert len(STEPS) == ledger_formats.FORMAT == FORMAT
    Ledger(path).close()
    connection = sqlite3.connect(path)
    assert convert_ledger.layout(connection) == layout_of(FORMAT)
    connection.close()
    stepped = sqlite3.connect(":memory:")
    for step in STEPS:
        step(stepped)
    assert is_laid_out(stepped)
    stepped.execute("DROP TRIGGER no_delete")
    assert not is_laid_out(stepped), "a table whose rows can be removed passes for one of a ledger"
    stepped.close()


@pytest.mark.parametrize("number", range(1, FORMAT))
def test_a_ledger_of_every_format_is_refused_with_the_command_that_brings_all_of_it_over(
    path: Path, number: int
) -> None:
    before = dumped(of_format(path, number))
    content = path.read_bytes()
    for ask in (Ledger, withdrawn_in):
        with pytest.raises(
            LedgerError, match=f"has format {number}, this FedVeil reads format {FORMAT} alone"
        ) as refused:
            ask(path)
        assert "\n" not in str(refused.value)
    assert path.read_bytes() == content, "who only asks has changed it"
    command = str(refused.value).split("`")[1]
    done = subprocess.run(
        [sys.executable, *shlex.split(command)[1:]], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"format {number} became {FORMAT}: " in done.stdout
    assert "1 charges" in done.stdout
    after = dumped(path)
    for table, rows in before.items():
        if table == "charges" and number < 5:
            continue  # looked at below
        kept = [{column: row[column] for column in rows[0]} for row in after[table]] if rows else after[table]
        assert [row for row in kept if row in rows] == rows, f"{table} is another one"
        assert len(kept) == len(rows) or table == "sqlite_sequence"
    with Ledger(path) as ledger:
        spent = [gaussian_release(7.3, 0.07, 3)]
        assert ledger.epsilon("ward", 1e-5) == promised(spent, 1e-5)[0]
        (entry,) = ledger.entries()
        assert (entry.event.noise_multiplier, entry.event.sample_rate, entry.event.clip_norm) == (7.3, 0.07, 0.5)
        assert (entry.run, entry.round_number, entry.count, entry.delta) == ("old", 1, 3, 1e-5)
        assert len(ledger.key) == 32
        assert ledger.terms("ward") == Terms(9.0 if number > 1 else math.inf, 1e-5)
        assert ledger.exposed("attic") is (number > 2)
    assert withdrawn_in(path) == (frozenset({"clinic"}) if number > 6 else frozenset())
    assert convert(path) == f"has format {FORMAT} already, nothing was changed"


def test_every_charge_comes_over_to_the_last_bit_and_costs_what_it_did(fourth_format: Path) -> None:
    before, prices = content(fourth_format), epsilons_by_columns(fourth_format)
    convert(fourth_format)
    with Ledger(fourth_format) as ledger:
        spent = {name: promised(ledger.spent(name), 1e-6)[0] for name in prices}
        assert spent == prices, "a data set has spent something else than before"
        assert ledger.epsilon("ward", 1e-6) == prices["ward"]
        assert ledger.epsilon("lab", 1e-6) == math.inf, "an exposure was forgotten"
        assert [row.reason for row in ledger.failures()] == ["no memory"]
        entries = ledger.entries()
    after = content(fourth_format)
    assert (before["format"], after["format"]) == (4, FORMAT)
    assert after["rows"] == {**before["rows"], "charges": [as_data(*row) for row in before["rows"]["charges"]]}
    old = [(row[5], row[6], row[9], row[7]) for row in before["rows"]["charges"]]
    assert [(e.event.noise_multiplier, e.event.sample_rate, e.event.clip_norm, e.count) for e in entries] == old
    charge(fourth_format, 9, dataset="fresh")
    with Ledger(fourth_format) as ledger:
        assert [entry.id for entry in ledger.entries()] == [*range(1, len(old) + 1), len(old) + 1]


def test_what_comes_after_is_priced_as_if_what_came_over_had_been_planned(path: Path) -> None:
    """The state of the filter for adaptive releases: no plan that is made after a result counts as one before it."""
    convert(of_format(path, 9))
    spent = [gaussian_release(7.3, 0.07, 3, clip_norm=0.5)]
    later = gaussian_release(6.0, 0.2, 2)
    paid = charge(path, 1, later, planned=(later,))
    whole = commitment_to([], spent)
    assert paid.epsilon_before == price(spent, whole, 1e-5)[0] == promised(spent, 1e-5)[0]
    assert paid.epsilon_after == price([*spent, later], whole, 1e-5)[0] > promised([*spent, later], 1e-5)[0]
    with Ledger(path) as ledger:
        assert ledger.plans.of("ward") == Commitment(tuple(spent))


def losing(db: sqlite3.Connection) -> None:
    db.execute("DROP TRIGGER no_delete")
    db.execute("DELETE FROM charges WHERE id = 7")
    ledger_formats.m5_releases_as_data(db)


def rounding(db: sqlite3.Connection) -> None:
    db.execute("DROP TRIGGER no_update")
    db.execute("UPDATE charges SET delta = ROUND(delta, 5)")
    ledger_formats.m5_releases_as_data(db)


def without_triggers(db: sqlite3.Connection) -> None:
    ledger_formats.m5_releases_as_data(db)
    db.execute("DROP TRIGGER no_update")


def of_a_new_key(db: sqlite3.Connection) -> None:
    ledger_formats.m5_releases_as_data(db)
    db.execute("UPDATE secrets SET key = randomblob(32)")


def forgetting_an_exposure(db: sqlite3.Connection) -> None:
    ledger_formats.m5_releases_as_data(db)
    db.execute("DROP TRIGGER no_exposure_delete")
    db.execute("DELETE FROM exposures")
    ledger_formats.run_script(
        db,
        "CREATE TRIGGER no_exposure_delete BEFORE DELETE ON exposures BEGIN SELECT RAISE(ABORT, 'no'); END;\n",
    )


def half_way(db: sqlite3.Connection) -> None:
    db.execute("DROP TABLE charges")
    db.execute("NONSENSE")


@pytest.mark.parametrize("fault", [losing, rounding, without_triggers, of_a_new_key, forgetting_an_exposure, half_way])
def test_a_step_that_loses_or_changes_anything_stops_and_leaves_the_old_ledger(
    fourth_format: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[[sqlite3.Connection], None]
) -> None:
    before, goal = dumped(fourth_format), layout_of(FORMAT)
    with monkeypatch.context() as patch:
        patch.setattr(convert_ledger, "STEPS", (*STEPS[:4], fault, *STEPS[5:]))
        patch.setattr(convert_ledger, "layout_of", lambda number: goal if number == FORMAT else layout_4)
        with pytest.raises(ConversionError):
            convert(fourth_format)
    assert dumped(fourth_format) == before
    assert content(fourth_format)["format"] == 4


layout_4 = layout_of(4)


def test_a_figure_that_is_garbled_stops_and_leaves_the_old_ledger(
    fourth_format: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, dumps = content(fourth_format), json.dumps
    with monkeypatch.context() as patch:
        patch.setattr(
            ledger_formats.json,
            "dumps",
            lambda held, **_: dumps({**held, "noise_multiplier": round(held["noise_multiplier"], 9)}),
        )
        with pytest.raises(ConversionError, match="did not come over"):
            convert(fourth_format)
    assert content(fourth_format) == before


def convert_and_die(path: Path, after: int) -> None:
    """Convert a ledger, and be killed after so many of a step's statements."""

    def some(connection: sqlite3.Connection, statements: str) -> None:
        whole = [part for part in statements.splitlines(keepends=True) if part.strip()]
        run_script(connection, "".join(whole[:after]))
        os.kill(os.getpid(), signal.SIGKILL)

    ledger_formats.run_script = some
    convert(path)


@pytest.mark.parametrize("after", [8, 12, 14])
def test_a_conversion_that_is_killed_leaves_the_old_ledger_whole_and_no_second_one(path: Path, after: int) -> None:
    before = content(laid_out(path, SECOND_FORMAT))
    child = processes.Process(target=convert_and_die, args=(path, after))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert [file.name for file in path.parent.glob("*.sqlite")] == [path.name]
    with pytest.raises(LedgerError, match="has format 2"):
        Ledger(path)
    assert content(path) == before
    convert(path)
    assert content(path)["format"] == FORMAT
    with Ledger(path) as ledger:
        assert [entry.round_number for entry in ledger.entries()] == [1]


@pytest.mark.parametrize(("real", "forged"), [(r, f) for r in (1, 4, 5, 8, 9, 10) for f in (2, 7, 9, 10) if r != f])
def test_a_forged_number_of_a_format_is_found_and_nothing_is_changed(path: Path, real: int, forged: int) -> None:
    of_format(path, real)
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA user_version = {forged}")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(
        LedgerError, match="its tables are not those of format 11" if forged == FORMAT else "has format"
    ):
        Ledger(path)
    if forged < FORMAT:
        with pytest.raises(ConversionError, match="its tables are not those of format"):
            convert(path)
    assert path.read_bytes() == before


def no_ledger(path: Path) -> None:
    laid_out(path, "CREATE TABLE charges (id INTEGER);")


def newer(path: Path) -> None:
    of_format(path, FORMAT)
    laid_out(path, f"PRAGMA user_version = {FORMAT + 1};")


def damaged(path: Path) -> None:
    of_format(path, 4)
    held = bytearray(path.read_bytes())
    held[4096 : 4096 + 64] = b"\xff" * 64
    path.write_bytes(held)


def two_names(path: Path) -> None:
    of_format(path, 4)
    os.link(path, path.with_name("second"))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda _: None, "No such file"),
        (lambda path: path.touch(), "damaged or not a ledger"),
        (lambda path: path.write_text("site,epsilon"), "damaged or not a ledger"),
        (lambda path: path.write_text("[1]"), "not a FedVeil ledger"),
        (no_ledger, "not a FedVeil ledger"),
        (newer, f"has format {FORMAT + 1}, which is not known here"),
        (damaged, "damaged"),
        (two_names, "another name"),
    ],
)
def test_what_cannot_be_converted_is_left_and_said_in_one_line(
    path: Path, make: Callable[[Path], Any], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make(path)
    before = {file: file.read_bytes() for file in path.parent.iterdir()}
    assert main([str(path)]) == 1
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
    assert {file: file.read_bytes() for file in path.parent.iterdir()} == before


@pytest.mark.parametrize("make", [lambda path: of_format(path, 4), lambda path: server_ledger(path)])
def test_in_a_folder_that_cannot_be_written_nothing_is_converted(make: Callable[[Path], Any]) -> None:
    # Not in pytest's folder, which only its owner may enter.
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "a ledger"
        make(path)
        before = path.read_bytes()
        for rights, of_file in ((0o555, 0o444), (0o555, 0o666)):
            path.chmod(of_file)
            path.parent.chmod(rights)
            with no_special_rights(), pytest.raises(ConversionError, match="cannot be converted"):
                convert(path)
            assert path.read_bytes() == before
        path.parent.chmod(0o755)
        assert [file.name for file in path.parent.iterdir() if not file.name.endswith(".lock")] == [path.name]


# A trusted server's ledger.

START, STEP = sampled_gaussian(0.9, 1.0), sampled_gaussian(3.0, 0.5)


def server_ledger(path: Path) -> Path:
    """Make a ledger of the format before: without a plan."""
    for number, event in enumerate((START, STEP, STEP), 1):
        ServerLedger(path, "site").charge("first", number, event, 1e-5, 90.0)
    held = json.loads(path.read_text(encoding="utf-8"))
    del held["first_plan"]
    path.write_text(json.dumps({**held, "format": 1}), encoding="utf-8")
    path.chmod(0o640)
    return path


def test_a_servers_ledger_comes_over_with_every_charge_and_is_priced_as_before(tmp_path: Path) -> None:
    path = server_ledger(tmp_path / "a ledger.json")
    before = json.loads(path.read_text(encoding="utf-8"))
    with pytest.raises(LedgerError, match=f"has format 1, this FedVeil reads format {SERVER_FORMAT} alone") as refused:
        ServerLedger(path, "site").charges()
    command = str(refused.value).split("`")[1]
    subprocess.run([sys.executable, *shlex.split(command)[1:]], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    after = json.loads(path.read_text(encoding="utf-8"))
    assert {**after, "format": 1} == {**before, "first_plan": after["first_plan"]}
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    ledger = ServerLedger(path, "site")
    history = ledger.history("second")
    spent = [Release(START, 1), Release(STEP, 1), Release(STEP, 1)]
    assert list(history.releases) == spent
    assert history.commitment == commitment_to([], spent)
    paid = ledger.charge("second", 1, STEP, 1e-5, 90.0, [Release(STEP, 50)])
    assert paid.epsilon_total == price([*spent, Release(STEP, 1)], commitment_to([], spent), 1e-5)[0]
    assert convert(path) == f"has format {SERVER_FORMAT} already, nothing was changed"


def test_a_servers_ledger_is_whole_where_its_conversion_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = server_ledger(tmp_path / "sites.json")
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    for name in ("fsync", "fchmod"):
        with monkeypatch.context() as patch:
            patch.setattr(convert_ledger.os, name, fail)
            with pytest.raises(KeyboardInterrupt):
                convert(path)
        assert path.read_bytes() == before
    assert not list(tmp_path.glob("*.tmp")) + list(tmp_path.glob(".*.tmp"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": 3}, "has format 3, which is not known here"),
        ({"format": 0}, "has format 0, which is not known here"),
        ({"format": True}, "not a FedVeil ledger"),
        ({"format": 2}, "does not hold what format 2 holds"),
        ({"first_plan": [{"event": {}, "count": 1, "purpose": "training"}]}, "does not hold what format 1 holds"),
        ({"charges": []}, "holds no charge"),
        ({"charges": [7]}, "damaged"),
    ],
)
def test_a_servers_ledger_that_is_not_what_it_says_is_left(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    path = server_ledger(tmp_path / "sites.json")
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **change}), encoding="utf-8")
    before = path.read_bytes()
    with pytest.raises(ConversionError, match=words):
        convert(path)
    assert path.read_bytes() == before
