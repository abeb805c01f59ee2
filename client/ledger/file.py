"""The file of a ledger: how it is made, opened and checked, and its one kind of transaction.

Durability. The rollback journal (``journal_mode=DELETE``) keeps everything in one file, whereas with
WAL a copy of that file alone, or a container that mounts only it, would lose the latest charges and
hand the budget out twice. A killed process leaves at most a journal, which the next one to open the
ledger rolls back. Against power loss ``synchronous=EXTRA`` syncs, beyond FULL, the folder
after the journal's removal; with FULL the journal could reappear and undo a finished charge.

What no file can know: a ledger restored from an old copy, or deleted, forgets. Mount its folder
rather than the file, and never restore it from a backup. One that outlives runs is refused on a
network file system (``mounts``).

One name only. The journal is named after the path by which the file was opened. Of two hard links
one would not see the journal that a killed process left under the other, and go on from half a
charge, which the first link's journal then undoes together with all that came after it. So a file
with two names is refused before SQLite looks at it. A symbolic link is no second name: the journal
lies beside the file that it leads to.
"""

from __future__ import annotations

import os
import re
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from datetime import UTC, datetime
from pathlib import Path

from fedveil.client.ledger.schema import APPLICATION_ID, FORMAT, is_laid_out, lay_out
from fedveil.common.errors import LedgerError
from fedveil.common.files import sync_folder

BUSY_SECONDS = 60.0
"""How long a lock that others hold is waited for."""


def only_ledger(folder: Path) -> Path:
    """Return the file of the one ledger of ``folder``: the one that is there, or where the first one is made.

    Raises:
        LedgerError: there are several, or the folder may not be read. What one of them holds would be forgotten by
        using another.
    """
    ledgers: list[Path] = []
    with one_line(folder, "read"), suppress(FileNotFoundError, NotADirectoryError):
        ledgers = sorted(file for file in folder.iterdir() if file.suffix == ".sqlite")
    if len(ledgers) > 1:
        raise LedgerError(
            f"{ledgers[0]} and {ledgers[1]} are ledgers of one folder: name the one that goes on in the node's "
            "configuration (ledger = FILE), since what the other one holds would count for nothing"
        )
    return ledgers[0] if ledgers else folder / "ledger.sqlite"


def withdrawn_in(path: Path) -> frozenset[str]:
    """Return the data sets that are withdrawn in a ledger's file, which is not read for it otherwise; none of no file.

    Opening a ledger checks all of it, which takes the longer the more records it knows: this is read before a task is
    taken, where time tells.

    Raises:
        LedgerError: the file cannot be read, has another format or a second name, or was locked for too long.
    """
    if not _is_there(path):
        return frozenset()
    with _glance(path) as db:
        return frozenset(name for (name,) in db.execute("SELECT DISTINCT dataset FROM withdrawals"))


def key_in(path: Path) -> bytes:
    """Return the random key of a ledger's file, made if it is not there, which is not read for it otherwise.

    Raises:
        LedgerError: as for ``withdrawn_in``; or the file cannot be made, or has no key.
    """
    if not _is_there(path):
        _create(path)
    with _glance(path) as db:
        return key_of(path, db)


def key_of(path: Path, db: sqlite3.Connection) -> bytes:
    """Return the random key of an opened ledger; LedgerError if it has none."""
    row = db.execute("SELECT key FROM secrets").fetchone()
    if row is None or len(row[0]) != 32:
        raise LedgerError(f"the ledger {path} is damaged (it has no key): do not train, ask for help")
    return bytes(row[0])


@contextmanager
def _glance(path: Path) -> Iterator[sqlite3.Connection]:
    """Yield a connection to a ledger's file, of which nothing but name and format is checked."""
    _refuse_second_name(path)
    # mode=rw: a journal that a killed process left is rolled back, as by whoever opens the ledger.
    place = f"{path.absolute().as_uri()}?mode=rw"
    with one_line(path, "read"), closing(_connect(place, uri=True)) as db:
        _refuse_other_format(path, db)
        yield db


class LedgerFile:
    """The ledger in the file ``path``; made, with its folder and readable by its owner only, if it does not exist.

    Every process and every thread opens its own, and closes it.

    Args:
        path: the file.
        patience: seconds that a lock is waited for.
        apart: makes the context of what takes its time whatever the records are: prices, and waiting for the lock.

    Raises:
        LedgerError: the file is not a ledger, is damaged, has a second name (a hard link), has another
            format, or cannot be made or opened. An empty file is not a ledger: an existing one may have been
            cut short.
    """

    def __init__(
        self,
        path: Path,
        *,
        patience: float = BUSY_SECONDS,
        apart: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.path, self.apart = Path(path), apart
        if not _is_there(self.path):
            _create(self.path)
        _refuse_second_name(self.path)
        with one_line(self.path, "opened"):
            # mode=rw: a file that vanishes meanwhile is an error and not a new, empty history.
            self._connection = _connect(f"{self.path.absolute().as_uri()}?mode=rw", patience, uri=True)
        try:
            self._check_file()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file; closing twice does nothing."""
        self._connection.close()

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Yield the connection to read by; an error has one line. Inside a transaction it sees its changes."""
        with one_line(self.path, "read"):
            yield self._connection

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Hold the write lock from the first read to the commit; undo everything if anything fails."""
        with one_line(self.path, "written"):
            with self.apart():
                self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def version(self) -> int:
        """Return a number that is another one once any other connection has written to the file."""
        with self.reading() as db:
            return int(db.execute("PRAGMA data_version").fetchone()[0])

    def _check_file(self) -> None:
        with one_line(self.path, "read"):
            (finding,) = self._connection.execute("PRAGMA quick_check").fetchone()
            if finding != "ok":
                raise sqlite3.DatabaseError(str(finding))
            _refuse_other_format(self.path, self._connection)
            if not is_laid_out(self._connection):
                raise sqlite3.DatabaseError(f"its tables are not those of format {FORMAT}")


def now() -> str:
    """Return the time that a row is written with: UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _refuse_other_format(path: Path, db: sqlite3.Connection) -> None:
    """Raise LedgerError unless the file says that it is a ledger of the present format."""
    application, found = (db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version"))
    if application != APPLICATION_ID:
        raise LedgerError(f"{path} is not a FedVeil ledger: name another file")
    if found != FORMAT:
        raise LedgerError(
            f"the ledger {path} has format {found}, this FedVeil reads format {FORMAT} alone: install the FedVeil that "
            "wrote it"
        )


def _connect(database: str, patience: float = BUSY_SECONDS, *, uri: bool = False) -> sqlite3.Connection:
    # isolation_level=None: transactions are exactly those written out in this file.
    connection = sqlite3.connect(database, timeout=patience, isolation_level=None, uri=uri)
    try:
        for pragma in ("journal_mode=DELETE", "synchronous=EXTRA", "temp_store=MEMORY"):
            connection.execute(f"PRAGMA {pragma}")
    except BaseException:
        connection.close()
        raise
    return connection


def _create(path: Path) -> None:
    """Put a complete, empty ledger at ``path`` in one step; one that is there by then is left alone.

    The file is built beside its place and linked into it: no one ever sees half a ledger, and no
    file descriptor of a live ledger is closed, which would drop this process's locks on it.
    """
    with one_line(path, "made"):
        missing = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, draft = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".draft", dir=path.parent)  # mode 0600
        os.close(descriptor)
        try:
            with closing(_connect(draft)) as connection:
                lay_out(connection)
            with suppress(FileExistsError):  # who opened the ledger meanwhile may have been first
                os.link(draft, path)
        finally:
            Path(draft).unlink(missing_ok=True)
        # Before a charge, whoever was first: after a loss of power no ledger would be there, and nothing spent.
        for folder in (path.parent, *(each.parent for each in missing)):
            sync_folder(folder)


def _is_there(path: Path) -> bool:
    """Whether there is such a file; LedgerError where that may not be looked up."""
    with one_line(path, "opened"):
        try:
            path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return False
    return True


def _refuse_second_name(path: Path) -> None:
    """Raise LedgerError if the ledger has another hard link than this one.

    Between the two calls that put a new ledger in its place, and for good if its maker is killed there, the draft's
    name is a second one. The next process that opens the ledger removes that name: no one has opened the ledger by it.
    """
    with one_line(path, "opened"):
        if path.stat().st_nlink > 1:
            place = path.resolve()
            drafts = re.compile(rf"\.{re.escape(place.name)}\.[a-z0-9_]+\.draft")
            for other in place.parent.iterdir():
                if drafts.fullmatch(other.name) and _is_same(other, place):
                    other.unlink(missing_ok=True)
        names = path.stat().st_nlink
    if names > 1:
        raise LedgerError(
            f"the ledger {path} has {names} names (hard links), and charges would be lost between them: "
            "remove all but one, and keep the one that has a file of its name with '-journal' beside it, if any has"
        )


def _is_same(other: Path, place: Path) -> bool:
    try:
        return other.samefile(place)
    except FileNotFoundError:
        return False


@contextmanager
def one_line(path: Path, done: str) -> Iterator[None]:
    """Turn what SQLite and the file system raise into a LedgerError of one line."""
    try:
        yield
    except sqlite3.OperationalError as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the primary code of an extended one
        if code in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}:
            raise LedgerError(f"the ledger {path} was in use by another process for too long: try again") from error
        raise LedgerError(f"the ledger {path} cannot be {done} ({error}): check permissions and space") from error
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
