"""A ledger has one name, a folder one ledger, and a name that the making leaves behind stands in nobody's way."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import signal
import sqlite3
from collections.abc import Callable
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest

from client.ledger import file as ledger_file
from client.ledger import migrations
from client.ledger.file import only_ledger, withdrawn_in
from client.ledger.ledger import Ledger, _remember
from client.ledger.rows import Charge, Receipt
from client.site import open_site, user_folder
from common.config.sections import Scalar
from common.errors import LedgerError
from common.privacy.accounting import Release, gaussian_release
from common.privacy.privacy_filter import promised
from strategies.job import configure

WHISPER = gaussian_release(noise_multiplier=20.0, sample_rate=0.01, count=1)
# fork: a child that has to import the libraries again takes seconds.
processes = multiprocessing.get_context("fork")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "site.sqlite"


def charge(path: Path, round_number: int = 1, records: frozenset[int] = frozenset(), dataset: str = "ward") -> Receipt:
    with Ledger(path) as ledger:
        return ledger.charge(Charge(dataset, "1", round_number, (WHISPER,), 1e-5, 8.0), records=records)


def rounds(path: Path) -> list[int]:
    with Ledger(path) as ledger:
        return [entry.round_number for entry in ledger.entries()]


def check_that_a_second_name_is_refused(path: Path) -> None:
    charge(path)
    second = path.with_name("link.sqlite")
    os.link(path, second)
    for name in (path, second):
        with pytest.raises(LedgerError, match=r"2 names \(hard links\)") as error:
            charge(name, 2)
        assert "\n" not in str(error.value)
    second.unlink()
    assert rounds(path) == [1]


def test_a_ledger_with_a_second_hard_link_is_refused_by_both_names(path: Path) -> None:
    check_that_a_second_name_is_refused(path)


def test_a_ledger_that_takes_two_names_is_found_out(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.ledger.file._refuse_second_name", lambda _: None)
    with pytest.raises(pytest.fail.Exception):
        check_that_a_second_name_is_refused(path)


def charge_and_die(path: Path) -> None:
    """Charge with so many records that pages are written before the commit, and be killed there."""
    with Ledger(path) as ledger:
        connection = ledger._file._connection
        connection.execute("PRAGMA cache_size = 5")
        connection.execute("BEGIN IMMEDIATE")
        connection.execute(
            "INSERT INTO charges (dataset, run, round, purpose, unit, kind, figures, count, delta, charged_at) "
            "VALUES ('ward', '1', 9, 'training', 'record', ?, ?, 1, 1e-5, 'now')",
            (WHISPER.event.kind, WHISPER.event.text()),
        )
        _remember(connection, "ward", range(20_000))
        os.kill(os.getpid(), signal.SIGKILL)


def charges_lost_between_two_links(path: Path) -> bool:
    """Kill a charge under one name, charge three times under another, and say whether the first name forgets them."""
    charge(path, 1)
    child = processes.Process(target=charge_and_die, args=(path,))
    child.start()
    child.join()
    assert Path(f"{path}-journal").exists(), "nothing was written before the kill: the test tests nothing"
    second = path.with_name("link.sqlite")
    os.link(path, second)
    try:
        for number in (2, 3, 4):
            charge(second, number)
    except LedgerError:
        second.unlink()
        return rounds(path) != [1]
    second.unlink()
    return rounds(path) != [1, 2, 3, 4]


def test_no_charge_is_lost_between_two_links_and_what_allowed_them_is_found_out(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not charges_lost_between_two_links(path)
    monkeypatch.setattr("client.ledger.file._refuse_second_name", lambda _: None)
    (tmp_path / "old").mkdir()
    try:
        lost = charges_lost_between_two_links(tmp_path / "old" / "site.sqlite")
    except LedgerError:  # damaged, which is no better
        lost = True
    assert lost, "two links lose nothing here: the check has no reason"


def test_who_is_withdrawn_is_read_though_a_killed_process_left_a_journal(path: Path) -> None:
    charge(path, 1)
    with Ledger(path) as ledger:
        ledger.holds.withdraw("lab", "asked for")
    child = processes.Process(target=charge_and_die, args=(path,))
    child.start()
    child.join()
    assert Path(f"{path}-journal").exists(), "nothing was written before the kill: the test tests nothing"
    assert withdrawn_in(path) == {"lab"}
    assert rounds(path) == [1]


def test_a_symbolic_link_is_no_second_name(path: Path) -> None:
    charge(path, 1)
    link = path.with_name("link.sqlite")
    link.symlink_to(path)
    charge(link, 2)
    assert rounds(path) == [1, 2]


def test_a_link_to_a_ledger_that_is_gone_makes_no_new_one(path: Path) -> None:
    link = path.with_name("link.sqlite")
    link.symlink_to(path)
    with pytest.raises(LedgerError, match="cannot be opened"):
        charge(link)
    assert link.is_symlink()
    assert os.listdir(path.parent) == [link.name]


def test_the_name_that_is_taken_away_is_the_ledgers_own_draft_alone(path: Path) -> None:
    """Wherever a link to it lies; a draft of another maker is about to be linked."""
    charge(path)
    os.link(path, path.with_name(f".{path.name}.abc_1234.draft"))
    others = [path.with_name(f".{name}.draft") for name in (f"{path.name}.other_12", "lab.sqlite.abc_1234")]
    for other in others:
        other.touch()
    (path.parent / "elsewhere").mkdir()
    link = path.parent / "elsewhere" / "link.sqlite"
    link.symlink_to(path)
    charge(link, 2)
    assert rounds(path) == [1, 2]
    assert set(path.parent.iterdir()) == {path, *others, link.parent}


def make_and_stop(path: Path, linked: Event) -> None:
    """Make a ledger, and be killed between its two names."""
    unlink = Path.unlink

    def stop(self: Path, missing_ok: bool = False) -> None:
        if self.name.endswith(".draft"):
            linked.set()
            signal.pause()
        unlink(self, missing_ok=missing_ok)

    Path.unlink = stop  # type: ignore[method-assign]
    Ledger(path)


@pytest.mark.parametrize("killed", [False, True], ids=["while it is made", "after its maker was killed"])
def test_a_name_that_the_making_leaves_is_taken_away_by_whoever_opens(path: Path, killed: bool) -> None:
    linked = processes.Event()
    maker = processes.Process(target=make_and_stop, args=(path, linked))
    maker.start()
    assert linked.wait(30)
    if killed:
        maker.kill()
        maker.join()
    assert path.stat().st_nlink == 2, "the maker was not caught between its two steps"
    charge(path)
    assert rounds(path) == [1]
    assert os.listdir(path.parent) == [path.name]
    maker.kill()
    maker.join()


def open_often(folder: Path, begin: Event) -> None:
    begin.wait()
    for number in range(60):
        Ledger(folder / f"{number}.sqlite").close()


def test_a_file_that_vanishes_meanwhile_is_an_error_and_no_new_history(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    charge(path)
    monkeypatch.setattr("client.ledger.file._refuse_second_name", Path.unlink)
    with pytest.raises(LedgerError, match="cannot be opened"):
        charge(path, 2)
    assert not path.exists()


def test_two_processes_that_make_the_same_ledgers_disturb_each_other_nowhere(tmp_path: Path) -> None:
    begin = processes.Event()
    children = [processes.Process(target=open_often, args=(tmp_path, begin)) for _ in range(2)]
    for child in children:
        child.start()
    begin.set()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0]
    assert sorted(os.listdir(tmp_path)) == sorted(f"{number}.sqlite" for number in range(60))


# One ledger of a user.


def default_ledger(site: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the ledger of a deployed site that names none."""
    monkeypatch.setenv("XDG_DATA_HOME", str(home))
    node: dict[str, Scalar] = {"site": site, "partition-id": 0, "num-partitions": 2}
    return open_site(node, configure({"data.name": "rotten-tomatoes"}).config, "1", simulated=False).ledger_path


def check_that_another_name_is_no_fresh_budget(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = frozenset(range(10))
    first = charge(default_ledger("clinic", home, monkeypatch), 1, records, "clinic")
    second = charge(default_ledger("renamed", home, monkeypatch), 1, records, "renamed")
    assert second.epsilon_before == first.epsilon_after > 0, "another name is a fresh budget"


def test_a_user_has_one_ledger_whatever_the_site_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_that_another_name_is_no_fresh_budget(tmp_path, monkeypatch)
    assert default_ledger("any", tmp_path, monkeypatch) == tmp_path / "fedveil" / "ledger.sqlite"


@pytest.mark.parametrize("named", ["", "data", "./data"])
def test_an_empty_or_relative_data_home_counts_as_unset(
    named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_ledger("clinic", Path(named) if named else Path(), monkeypatch).is_relative_to(tmp_path)
    monkeypatch.setenv("XDG_DATA_HOME", named)
    assert user_folder() == tmp_path / ".local" / "share" / "fedveil"


def test_a_ledger_for_every_name_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = iter(("clinic.sqlite", "renamed.sqlite"))
    monkeypatch.setattr("client.site.only_ledger", lambda folder: folder / next(names))
    with pytest.raises(AssertionError, match="a fresh budget"):
        check_that_another_name_is_no_fresh_budget(tmp_path, monkeypatch)


def test_a_ledger_of_an_earlier_version_goes_on_and_of_two_one_must_be_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "fedveil" / "clinic.sqlite"
    charge(old)
    assert default_ledger("another", tmp_path, monkeypatch) == old
    charge(old.with_name("ward.sqlite"))
    with pytest.raises(LedgerError, match="name the one that goes on") as error:
        default_ledger("clinic", tmp_path, monkeypatch)
    assert "\n" not in str(error.value)


def test_a_half_made_ledger_or_a_journal_is_no_ledger_of_the_folder(tmp_path: Path) -> None:
    for name in (".ledger.sqlite.abc_1234.draft", "ledger.sqlite-journal", "notes.txt"):
        (tmp_path / name).touch()
    assert only_ledger(tmp_path) == only_ledger(tmp_path / "nowhere").parent.parent / "ledger.sqlite"


# Ledgers of earlier formats.

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


@pytest.fixture
def second_format(path: Path) -> Path:
    return laid_out(path, SECOND_FORMAT)


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


def test_a_ledger_of_the_second_format_keeps_key_history_budgets_and_records(
    second_format: Path, tmp_path: Path
) -> None:
    before = content(second_format)
    Ledger(second_format).close()
    after = content(second_format)
    assert (before["format"], after["format"]) == (2, migrations.FORMAT)
    assert after["rows"] == {**before["rows"], "charges": [as_data(*row) for row in before["rows"]["charges"]]}
    Ledger(tmp_path / "new.sqlite").close()
    new = content(tmp_path / "new.sqlite")
    assert (after["names"], after["columns"]) == (new["names"], new["columns"])
    charge(second_format, 2)
    assert rounds(second_format) == [1, 2]


LAYOUTS = (
    *("8844aba8", "0e65a028", "e888c9cb", "a9e05ee1", "8626a8b9"),
    *("e2df26a2", "61ae3799", "f6247648", "a6509f5e", "4596f8c4"),
)
"""Of each format, the beginning of the SHA-256 of all that SQLite says its tables and triggers are."""


def test_no_step_to_a_format_has_changed_since_it_was_made() -> None:
    """A ledger in use has the tables that its steps made then, with what they refuse: a change needs a step more."""
    connection, found = sqlite3.connect(":memory:"), []
    for step in migrations.MIGRATIONS:
        step(connection)
        rows = connection.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY type, name")
        text = "\n".join(" ".join(sql.replace('"', "").split()) for (sql,) in rows)
        found.append(hashlib.sha256(text.encode()).hexdigest()[:8])
    connection.close()
    assert tuple(found) == LAYOUTS


def test_of_a_format_without_withdrawals_nothing_is_withdrawn(second_format: Path) -> None:
    before = content(second_format)
    assert withdrawn_in(second_format) == frozenset()
    assert content(second_format) == before, "who only asks has migrated it"


def test_a_ledger_of_the_third_format_keeps_everything_and_can_hold_failures(path: Path, tmp_path: Path) -> None:
    before = content(laid_out(path, THIRD_FORMAT))
    with Ledger(path) as ledger:
        assert [row.dataset for row in ledger.exposures()] == ["lab"]
        assert ledger.failures() == []
        ledger.fail("ward", run="old", round_number=1, reason="no memory")
        assert [(row.dataset, row.round_number, row.reason) for row in ledger.failures()] == [("ward", 1, "no memory")]
    after = content(path)
    assert (before["format"], after["format"]) == (3, migrations.FORMAT)
    assert after["rows"] == {**before["rows"], "charges": [as_data(*row) for row in before["rows"]["charges"]]}
    Ledger(tmp_path / "new.sqlite").close()
    new = content(tmp_path / "new.sqlite")
    assert (after["names"], after["columns"]) == (new["names"], new["columns"])


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


def check_that_format_5_keeps_every_charge(path: Path) -> None:
    """Open a ledger of format 4, and hold every row, sum and price against what its columns said."""
    before, prices = content(path), epsilons_by_columns(path)
    with Ledger(path) as ledger:
        assert {name: ledger.epsilon(name, 1e-6) for name in prices if name != "lab"} == {
            name: price for name, price in prices.items() if name != "lab"
        }, "a data set has spent something else than before"
        assert promised(ledger.spent("lab"), 1e-6)[0] == prices["lab"], "charges of an exposed data set have changed"
        assert ledger.epsilon("lab", 1e-6) == float("inf"), "an exposure was forgotten"
        assert [row.reason for row in ledger.failures()] == ["no memory"]
        entries = ledger.entries()
    after = content(path)
    assert (before["format"], after["format"]) == (4, migrations.FORMAT)
    assert after["rows"] == {**before["rows"], "charges": [as_data(*row) for row in before["rows"]["charges"]]}
    old = [(row[5], row[6], row[9], row[7]) for row in before["rows"]["charges"]]
    new = [(e.event.noise_multiplier, e.event.sample_rate, e.event.clip_norm, e.count) for e in entries]
    assert new == old, "a figure is another one"


def test_a_ledger_of_the_fourth_format_keeps_every_charge_to_the_last_bit(fourth_format: Path, tmp_path: Path) -> None:
    check_that_format_5_keeps_every_charge(fourth_format)
    Ledger(tmp_path / "new.sqlite").close()
    after, new = content(fourth_format), content(tmp_path / "new.sqlite")
    assert (after["names"], after["columns"]) == (new["names"], new["columns"])
    numbers = [row[0] for row in after["rows"]["charges"]]
    charge(fourth_format, 9, dataset="fresh")
    with Ledger(fourth_format) as ledger:
        assert [entry.id for entry in ledger.entries()] == [*numbers, max(numbers) + 1], "a number was given twice"
    connection = sqlite3.connect(fourth_format)
    for statement in ("UPDATE charges SET figures = '{}'", "DELETE FROM charges"):
        with pytest.raises(sqlite3.IntegrityError, match="only ever added"):
            connection.execute(statement)
    connection.close()


def losing(db: sqlite3.Connection) -> None:
    db.execute("DROP TRIGGER no_delete")
    db.execute("DELETE FROM charges WHERE id = 7")
    migrations.m5_releases_as_data(db)


def rounding(db: sqlite3.Connection) -> None:
    db.execute("DROP TRIGGER no_update")
    db.execute("UPDATE charges SET noise_multiplier = ROUND(noise_multiplier, 6)")
    migrations.m5_releases_as_data(db)


def without_triggers(db: sqlite3.Connection) -> None:
    migrations.m5_releases_as_data(db)
    db.execute("DROP TRIGGER no_update")


@pytest.mark.parametrize("fault", [losing, rounding, without_triggers])
def test_a_migration_that_loses_or_changes_a_charge_is_found(
    fourth_format: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[[sqlite3.Connection], None]
) -> None:
    monkeypatch.setattr(migrations, "MIGRATIONS", (*migrations.MIGRATIONS[:4], fault, *migrations.MIGRATIONS[5:]))
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        test_a_ledger_of_the_fourth_format_keeps_every_charge_to_the_last_bit(fourth_format, tmp_path)


def test_a_step_that_garbles_a_figure_stops_and_leaves_the_old_ledger(
    fourth_format: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, dumps = content(fourth_format), json.dumps
    with monkeypatch.context() as patch:
        patch.setattr(
            migrations.json,
            "dumps",
            lambda held, **_: dumps({**held, "noise_multiplier": round(held["noise_multiplier"], 9)}),
        )
        with pytest.raises(LedgerError, match="did not come over"):
            Ledger(fourth_format)
    assert content(fourth_format) == before


UNPRICED = ("discrete-laplace", '{"noise_multiplier":9.0,"sample_rate":0.1,"clip_norm":1.0}')


def check_that_what_has_no_price_is_never_free(path: Path, kind: str, figures: str) -> None:
    charge(path, 1)
    connection = sqlite3.connect(path)
    connection.execute(
        "INSERT INTO charges (dataset, run, round, purpose, unit, kind, figures, count, delta, charged_at) "
        "VALUES ('ward', 'x', 1, 'training', 'record', ?, ?, 1, 1e-5, 'now')",
        (kind, figures),
    )
    connection.commit()
    connection.close()
    with Ledger(path) as ledger:
        for ask in (lambda: ledger.epsilon("ward", 1e-5), lambda: ledger.spent("ward")):
            with pytest.raises(LedgerError, match="damaged, or of another version") as refused:
                ask()
            assert "\n" not in str(refused.value)
    with pytest.raises(LedgerError):
        charge(path, 2)
    assert rounds_raw(path) == [1, 1], "something was charged on top of what nobody can price"


def rounds_raw(path: Path) -> list[int]:
    return [row[3] for row in content(path)["rows"]["charges"]]


@pytest.mark.parametrize(
    ("kind", "figures"),
    [
        UNPRICED,
        ("sampled-gaussian", '{"noise_multiplier":9.0,"sample_rate":0.1,"clip_norm":1.0,"share":0.5}'),
        ("sampled-gaussian", '{"noise_multiplier":9.0,"sample_rate":0.1}'),
        ("sampled-gaussian", '{"noise_multiplier":"9","sample_rate":0.1,"clip_norm":1.0}'),
        ("summed-gaussian", '{"noise_multiplier":9.0,"sample_rate":0.1,"clip_norm":1.0,"honest_sites":2.5}'),
        ("summed-gaussian", '{"noise_multiplier":9.0,"sample_rate":0.1,"clip_norm":1.0,"honest_sites":0.0}'),
        ("sampled-gaussian", "[]"),
        ("sampled-gaussian", "noise"),
    ],
    ids=[
        "an unknown kind",
        "a figure more",
        "a figure less",
        "a text",
        "half a site",
        "no site",
        "no figures",
        "no JSON",
    ],
)
def test_a_release_in_a_ledger_that_has_no_price_is_refused_and_never_left_out(
    path: Path, kind: str, figures: str
) -> None:
    check_that_what_has_no_price_is_never_free(path, kind, figures)


def test_a_ledger_that_leaves_out_what_it_does_not_know_is_found(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spent = Ledger.spent

    def known(ledger: Ledger, dataset: str) -> list[Release]:
        try:
            return spent(ledger, dataset)
        except LedgerError:
            return []

    monkeypatch.setattr(Ledger, "spent", known)
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        check_that_what_has_no_price_is_never_free(path, *UNPRICED)


def migrate_and_die(path: Path, script: Callable[[Any, str], None], after: int) -> None:
    """Migrate a ledger, and be killed after so many of the migration's statements."""

    def some(connection: sqlite3.Connection, statements: str) -> None:
        whole = [part for part in statements.splitlines(keepends=True) if part.strip()]
        script(connection, "".join(whole[:after]))
        os.kill(os.getpid(), signal.SIGKILL)

    migrations.run_script = some
    Ledger(path)


@pytest.mark.parametrize("after", [8, 12, 14])
def test_a_migration_that_is_killed_leaves_the_old_ledger_whole(second_format: Path, after: int) -> None:
    from client.ledger.migrations import run_script

    before = content(second_format)
    child = processes.Process(target=migrate_and_die, args=(second_format, run_script, after))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert content(second_format) == before
    assert rounds(second_format) == [1]
    assert content(second_format)["format"] == migrations.FORMAT


def test_a_new_ledger_has_its_name_on_disk_and_so_have_the_folders_that_were_made_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a loss of power a ledger without a name is none, and what was spent would be spent anew."""
    synced: list[Path] = []
    monkeypatch.setattr(ledger_file, "sync_folder", lambda folder: synced.append(folder))
    Ledger(tmp_path / "a" / "b" / "clinic.sqlite").close()
    assert set(synced) == {tmp_path / "a" / "b", tmp_path / "a", tmp_path}
    Ledger(tmp_path / "a" / "ward.sqlite").close()
    assert synced[3:] == [tmp_path / "a"]
    # Another process was first: its name may not be on disk yet, and this one is about to charge.
    first = tmp_path / "a" / "first.sqlite"
    real = os.link

    def second(source: str, target: Path) -> None:
        real(source, target)
        raise FileExistsError

    monkeypatch.setattr(os, "link", second)
    Ledger(first).close()
    assert synced[4:] == [tmp_path / "a"]
