"""The durable ledger of one site: what every data set has paid, over all runs, rounds and restarts.

A charge is priced and written in one SQLite transaction that holds the write lock from before the
history is read, so two processes can never spend the same remainder. It is on disk before
``charge`` returns, and only then may a record be touched. Rows are only ever added.

Beside charges the ledger keeps, per data set, the budgets that its steward has set (the latest one
holds) and a keyed hash of every record that it was charged for. The strictest of what the caller
asks for and what the ledger holds wins: the smaller epsilon, and the smallest delta that the data
set was ever charged or budgeted at, so that everything it released is composed at one delta.

Durability. The rollback journal (``journal_mode=DELETE``) keeps everything in one file, whereas with
WAL a copy of that file alone, or a container that mounts only it, would lose the latest charges and
hand the budget out twice. A killed process leaves at most a journal, which the next one to open the
ledger rolls back. Against power loss ``synchronous=EXTRA`` syncs, beyond FULL, the folder
after the journal's removal; with FULL the journal could reappear and undo a finished charge.

What no file can know: a ledger restored from an old copy, or deleted, forgets. Keep it on a local
disk (network file systems lock unreliably), mount its folder rather than the file, and never restore
it from a backup.
"""

from __future__ import annotations

import math
import os
import sqlite3
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from common.check import below, in_range, not_negative, positive
from common.errors import BudgetExhausted, ConfigError, LedgerError, PolicyRefusal
from common.privacy import accounting
from common.privacy.accounting import TRAINING, Release, epsilon_with_method
from common.privacy.contents import SHARED

APPLICATION_ID = 0x46564C44
"""``FVLD``, in the file's header."""
SCHEMA_VERSION = 2
BUSY_SECONDS = 60
EVALUATION = "evaluation"
"""The ``kind`` of a noised count of correctly classified records: sensitivity 1, no clipping."""

_CHARGES = """
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
"""
_SINCE_2 = """
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
"""


def _finish_schema() -> str:
    """Return what brings the first format, made or just laid out, to the present one; with a new random key."""
    return f"""{_SINCE_2}
INSERT INTO secrets VALUES (X'{os.urandom(32).hex()}');
PRAGMA user_version = {SCHEMA_VERSION};
"""


@dataclass(frozen=True)
class Terms:
    """What holds for a data set by its ledger alone."""

    epsilon: float
    """The steward's latest budget; infinite if none was ever set."""
    delta: float
    """The smallest delta of all budgets and charges; infinite if there is none."""

    def stricter(self, epsilon: float, delta: float) -> tuple[float, float]:
        """Return the smaller epsilon and the smaller delta."""
        return min(self.epsilon, epsilon), min(self.delta, delta)


@dataclass(frozen=True)
class Budget:
    """One row of a data set's history of budgets."""

    dataset: str
    epsilon: float
    delta: float
    set_at: str
    """UTC, ISO 8601."""


@dataclass(frozen=True)
class Charge:
    """The receipt of one charge. Epsilons are record level, add/remove one record, at the charge's delta."""

    epsilon_before: float
    epsilon_after: float
    """Of everything charged to the data set, this charge included."""
    epsilon_round: float
    """Of this charge's releases alone, as if nothing had been spent. These do not add up over rounds."""
    epsilon_remaining: float
    """Budget minus ``epsilon_after``; at least 0."""
    steps_round: int
    """Releases of kind ``training`` in this charge."""
    steps_total: int
    """Releases of kind ``training`` of the data set, this charge included."""
    accountant: str
    """What computed ``epsilon_after``, in words."""
    max_epsilon: float
    """The budget that held: the caller's or the ledger's, whichever is smaller."""
    delta: float
    """The delta at which all of the data set's releases were composed."""

    @property
    def epsilon_increment(self) -> float:
        """What this charge added: ``epsilon_after - epsilon_before``."""
        return self.epsilon_after - self.epsilon_before


@dataclass(frozen=True)
class Entry:
    """One row of the ledger: releases that were charged, and when."""

    id: int
    dataset: str
    run: str
    round_number: int
    kind: str
    noise_multiplier: float
    sample_rate: float
    count: int
    delta: float
    clip_norm: float
    charged_at: str
    """UTC, ISO 8601."""


class Ledger:
    """The ledger in the file ``path``; made, with its folder and readable by its owner only, if there is none.

    Every process and every thread opens its own. A context manager: it closes itself.

    Raises:
        LedgerError: the file is not a ledger, is damaged, was written by a newer FedVeil, or cannot
            be made or opened. An empty file is not a ledger: an existing one may have been cut short.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        if not self.path.exists():
            _create(self.path)
        with _one_line(self.path, "opened"):
            # mode=rw: a file that vanishes meanwhile is an error and not a new, empty history.
            self._connection = _connect(f"{self.path.absolute().as_uri()}?mode=rw", uri=True)
        try:
            self._check_file()
        except BaseException:
            self.close()
            raise

    def charge(
        self,
        dataset: str,
        releases: Sequence[Release],
        *,
        run: str,
        round_number: int,
        delta: float,
        max_epsilon: float,
        clip_norm: float,
        records: Collection[int] = (),
    ) -> Charge:
        """Price ``releases`` on top of all that ``dataset`` has spent, and write them down durably.

        Guarantees: when this returns, the charge is on disk; when it raises, nothing was written
        (after a disk failure during the write, nothing or all of it). The data set's epsilon never
        passes ``max_epsilon`` nor the budget that is stored here, whoever else charges at the same
        time. The same run and round charged again is charged again: a repeated round releases anew.

        Args:
            dataset: the site's name for the records; budgets of different names are separate.
            releases: what is about to be released, at least one.
            run: the run's name, for the record.
            round_number: 1-based; 0 for releases before the first round.
            delta: all releases of the data set are composed at one delta: this, or a smaller one that
                the ledger holds for it.
            max_epsilon: the budget that the caller allows; a smaller one that is stored wins.
            clip_norm: L2, for the record; the price does not depend on it.
            records: ``record_hashes`` under ``key`` of the records that are about to be used. They are
                kept, and other data sets of this ledger may not hold the same records. Records under
                the same name may change: they stay on the same budget.

        Raises:
            BudgetExhausted: the releases would exceed the budget.
            PolicyRefusal: the records are in this ledger under another data set's name.
            ConfigError: a figure is out of range, or there is nothing to charge.
            LedgerError: the file cannot be read or written, or was locked for 60 seconds.
        """
        positive(max_epsilon=max_epsilon, clip_norm=clip_norm)
        in_range(0, 0.5, delta=delta)
        not_negative(round_number=round_number)
        if not releases or not dataset or not run:
            raise ConfigError("a charge needs a data set, a run and at least one release: name all three")
        with self._transaction():
            self._recognise(dataset, records)
            max_epsilon, delta = self.terms(dataset).stricter(max_epsilon, delta)
            charge = _price(self.spent(dataset), releases, delta, max_epsilon)
            if not charge.epsilon_after <= max_epsilon:
                raise BudgetExhausted(
                    f"data set {dataset!r} refuses round {round_number} of run {run!r} ({_spoken(releases)}): epsilon "
                    f"{charge.epsilon_before:.4f} is spent, this would make it {charge.epsilon_after:.4f}, the budget "
                    f"is {max_epsilon:g} at delta {delta:g}, {max(0.0, max_epsilon - charge.epsilon_before):.4f} is "
                    f"left; see `fedveil ledger show {self.path}`"
                )
            self._connection.executemany(
                "INSERT INTO charges (dataset, run, round, kind, noise_multiplier, sample_rate, count, delta, "
                "clip_norm, charged_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                [
                    (
                        *(dataset, run, round_number, r.kind, r.noise_multiplier, r.sample_rate, r.count, delta),
                        *(1.0 if r.kind == EVALUATION else clip_norm, _now()),
                    )
                    for r in releases
                ],
            )
            self._connection.executemany(
                "INSERT OR IGNORE INTO records (hash, dataset) VALUES (?, ?)", [(value, dataset) for value in records]
            )
        return charge

    def set_budget(self, dataset: str, epsilon: float, delta: float) -> None:
        """Make (epsilon, delta) the steward's budget of ``dataset``; earlier ones stay in the history.

        This is how a budget is raised, too; a delta that the data set was already charged or budgeted
        at never grows.

        Raises:
            ConfigError: a figure is out of range, or the name is empty.
            LedgerError: the file cannot be written.
        """
        positive(epsilon=epsilon)
        in_range(0, 0.5, delta=delta)
        below(0.5, delta=delta)
        if not dataset:
            raise ConfigError("a budget needs a data set: name it")
        with self._transaction():
            self._insert_budget(dataset, epsilon, delta)

    def lower_budget(self, dataset: str, epsilon: float, delta: float) -> Terms:
        """Take the stricter of the stored budget and this one, store it if it is new, and return what now holds.

        Infinite figures stand for "as stored"; without any budget nothing is stored.
        """
        with self._transaction():
            stored = self.terms(dataset)
            wanted = stored.stricter(epsilon, delta)
            if wanted != (stored.epsilon, stored.delta) and all(map(math.isfinite, wanted)):
                self._insert_budget(dataset, *wanted)
        return Terms(*wanted)

    def _insert_budget(self, dataset: str, epsilon: float, delta: float) -> None:
        self._connection.execute(
            "INSERT INTO budgets (dataset, epsilon, delta, set_at) VALUES (?, ?, ?, ?)",
            (dataset, epsilon, delta, _now()),
        )

    def terms(self, dataset: str) -> Terms:
        """Return the budget and the delta that hold for ``dataset`` by what the ledger has seen."""
        with _one_line(self.path, "read"):
            latest = self._connection.execute(
                "SELECT epsilon FROM budgets WHERE dataset = ? ORDER BY id DESC LIMIT 1", (dataset,)
            ).fetchone()
            (delta,) = self._connection.execute(
                "SELECT MIN(delta) FROM (SELECT delta FROM budgets WHERE dataset = :name "
                "UNION ALL SELECT delta FROM charges WHERE dataset = :name)",
                {"name": dataset},
            ).fetchone()
        return Terms(latest[0] if latest else math.inf, math.inf if delta is None else delta)

    def budgets(self) -> list[Budget]:
        """Return every budget that was ever set, of all data sets, oldest first."""
        with _one_line(self.path, "read"):
            rows = self._connection.execute("SELECT dataset, epsilon, delta, set_at FROM budgets ORDER BY id")
            return [Budget(*row) for row in rows]

    def joined(self, dataset: str, run: str, *, besides: int | None = None) -> tuple[int, int]:
        """Return how many rounds of a run, other than ``besides``, and how many steps were charged to ``dataset``."""
        with _one_line(self.path, "read"):
            rows = self._connection.execute(
                "SELECT round, SUM(count) FROM charges WHERE dataset = ? AND run = ? AND kind = ? GROUP BY round",
                (dataset, run, TRAINING),
            ).fetchall()
        return sum(number != besides for number, _ in rows), sum(steps for _, steps in rows)

    @property
    def key(self) -> bytes:
        """The ledger's own random key for ``record_hashes``."""
        with _one_line(self.path, "read"):
            row = self._connection.execute("SELECT key FROM secrets").fetchone()
        if row is None or len(row[0]) != 32:
            raise LedgerError(f"the ledger {self.path} is damaged (it has no key): do not train, ask for help")
        return bytes(row[0])

    def _recognise(self, dataset: str, records: Collection[int]) -> None:
        """Refuse records that another data set of this ledger has been charged for."""
        if not records:
            return
        self._connection.execute("CREATE TEMP TABLE IF NOT EXISTS opened (hash INTEGER PRIMARY KEY) WITHOUT ROWID")
        self._connection.execute("DELETE FROM opened")
        self._connection.executemany("INSERT OR IGNORE INTO opened VALUES (?)", [(value,) for value in records])
        shared = self._connection.execute(
            "SELECT dataset, COUNT(*) FROM opened JOIN records USING (hash) WHERE dataset != ? GROUP BY dataset",
            (dataset,),
        ).fetchall()
        for other, count in shared:
            (known,) = self._connection.execute("SELECT COUNT(*) FROM records WHERE dataset = ?", (other,)).fetchone()
            if count >= SHARED * min(known, len(records)):
                # No figures: this line leaves the site.
                raise PolicyRefusal(
                    f"data set {dataset!r} holds records that this ledger knows as data set {other!r}: name it "
                    f"{other!r}, so that they stay on one budget"
                )

    def spent(self, dataset: str) -> list[Release]:
        """Return everything charged to ``dataset``, equal releases merged; empty for an unknown name.

        Raises:
            LedgerError: the file cannot be read, or holds figures that no mechanism has.
        """
        with _one_line(self.path, "read"):
            rows = self._connection.execute(
                "SELECT noise_multiplier, sample_rate, SUM(count), kind FROM charges WHERE dataset = ? "
                "GROUP BY noise_multiplier, sample_rate, kind ORDER BY MIN(id)",
                (dataset,),
            ).fetchall()
        try:
            return [Release(*row) for row in rows]
        except (ConfigError, TypeError) as error:
            raise LedgerError(f"the ledger {self.path} is damaged ({error}): do not train, ask for help") from error

    def epsilon(self, dataset: str, delta: float) -> float:
        """Return what ``dataset`` has spent at ``delta``; 0.0 for an unknown name."""
        return accounting.epsilon(self.spent(dataset), delta)

    def entries(self) -> list[Entry]:
        """Return every row, of all data sets, oldest first."""
        with _one_line(self.path, "read"):
            return [
                Entry(*row)
                for row in self._connection.execute(
                    "SELECT id, dataset, run, round, kind, noise_multiplier, sample_rate, count, delta, clip_norm, "
                    "charged_at FROM charges ORDER BY id"
                )
            ]

    def close(self) -> None:
        """Close the file; closing twice does nothing."""
        self._connection.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """Hold the write lock from the first read to the commit; undo everything if anything fails."""
        with _one_line(self.path, "written"):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def _check_file(self) -> None:
        with _one_line(self.path, "read"):
            application, schema, finding = (
                self._connection.execute(f"PRAGMA {name}").fetchone()[0]
                for name in ("application_id", "user_version", "quick_check")
            )
            if application != APPLICATION_ID:
                raise LedgerError(f"{self.path} is not a FedVeil ledger: name another file")
            if schema == 1 and finding == "ok":
                schema = self._migrate()
            if schema != SCHEMA_VERSION:
                raise LedgerError(
                    f"the ledger {self.path} has format {schema}, this FedVeil reads {SCHEMA_VERSION}: "
                    "install the FedVeil that wrote it"
                )
            if finding != "ok":
                raise sqlite3.DatabaseError(str(finding))

    def _migrate(self) -> int:
        """Bring a ledger of the first format to the present one, whole or not at all; return its format."""
        with self._transaction():
            (schema,) = self._connection.execute("PRAGMA user_version").fetchone()
            if schema == 1:  # else another process was first
                _run_script(self._connection, _finish_schema())
        return SCHEMA_VERSION if schema == 1 else schema


def _run_script(connection: sqlite3.Connection, script: str) -> None:
    """Run statements inside the caller's transaction; ``executescript`` would commit it first."""
    statement = ""
    for line in script.splitlines():
        statement += line + "\n"
        if sqlite3.complete_statement(statement):
            connection.execute(statement)
            statement = ""


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _spoken(releases: Sequence[Release]) -> str:
    return ", ".join(f"{r.count} {r.kind} at noise {r.noise_multiplier:g}, rate {r.sample_rate:g}" for r in releases)


def _price(spent: Sequence[Release], releases: Sequence[Release], delta: float, max_epsilon: float) -> Charge:
    after, accountant = epsilon_with_method([*spent, *releases], delta)
    steps = sum(release.count for release in releases if release.kind == TRAINING)
    return Charge(
        epsilon_before=accounting.epsilon(spent, delta),
        epsilon_after=after,
        epsilon_round=accounting.epsilon(releases, delta),
        epsilon_remaining=max(0.0, max_epsilon - after),
        steps_round=steps,
        steps_total=steps + sum(release.count for release in spent if release.kind == TRAINING),
        accountant=accountant,
        max_epsilon=max_epsilon,
        delta=delta,
    )


def _connect(database: str, *, uri: bool = False) -> sqlite3.Connection:
    # isolation_level=None: transactions are exactly those written out in this file.
    connection = sqlite3.connect(database, timeout=BUSY_SECONDS, isolation_level=None, uri=uri)
    connection.execute("PRAGMA journal_mode=DELETE")
    connection.execute("PRAGMA synchronous=EXTRA")
    connection.execute("PRAGMA temp_store=MEMORY")
    return connection


def _create(path: Path) -> None:
    """Put a complete, empty ledger at ``path`` in one step; one that is there by then is left alone.

    The file is built beside its place and linked into it: no one ever sees half a ledger, and no
    file descriptor of a live ledger is closed, which would drop this process's locks on it.
    """
    with _one_line(path, "made"):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, draft = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # mode 0600
        os.close(descriptor)
        try:
            connection = _connect(draft)
            connection.executescript(
                f"BEGIN; {_CHARGES} PRAGMA application_id = {APPLICATION_ID}; {_finish_schema()} COMMIT;"
            )
            connection.close()
            try:
                os.link(draft, path)
            except FileExistsError:
                return
        finally:
            os.unlink(draft)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextmanager
def _one_line(path: Path, done: str) -> Iterator[None]:
    """Turn what SQLite and the file system raise into a LedgerError of one line."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if "locked" in str(error):
            raise LedgerError(
                f"the ledger {path} was in use by another process for {BUSY_SECONDS} seconds: try again"
            ) from error
        raise LedgerError(f"the ledger {path} cannot be {done} ({error}): check rights and space") from error
    except sqlite3.ProgrammingError as error:
        raise LedgerError(
            f"the ledger {path} cannot be {done} ({error}): open one in every thread, and use it before closing it"
        ) from error
    except sqlite3.DatabaseError as error:
        raise LedgerError(
            f"the ledger {path} is damaged or not a ledger ({' '.join(str(error).split())}): do not train, ask for help"
        ) from error
    except OSError as error:
        raise LedgerError(
            f"the ledger {path} cannot be {done} ({error.strerror}): name a local folder that FedVeil may write"
        ) from error
