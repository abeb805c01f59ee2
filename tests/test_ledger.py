"""The ledger of a site keeps every promise it made, through refusals, restarts, kills and company."""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import os
import random
import re
import signal
import sqlite3
import stat
import tempfile
import threading
import time
import unicodedata
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest

from client.ledger import ledger as ledger_module
from client.ledger import record_hashes as contents
from client.ledger.file import only_ledger, withdrawn_in
from client.ledger.ledger import Ledger
from client.ledger.record_hashes import record_hashes
from client.ledger.rows import Charge, Receipt, of_all
from client.ledger.schema import APPLICATION_ID, FORMAT
from common.accountant import EVALUATION, Accountant
from common.errors import BudgetExhausted, ConfigError, LedgerError, PolicyRefusal
from common.privacy.accounting import Release, gaussian_release
from common.privacy.privacy_filter import promised
from common.tasks.chat import Conversation
from common.tasks.examples import Dataset
from common.tasks.image_classification import ImageExample
from common.tasks.images import Picture
from common.tasks.text import TextExample

DELTA = 1e-5
ROUND = gaussian_release(noise_multiplier=1.0, sample_rate=0.1, count=5)
WHISPER = gaussian_release(noise_multiplier=20.0, sample_rate=0.01, count=1)
"""Cheap in privacy and quick to price."""
# fork: a child that has to import the libraries again takes seconds to make its first charge.
processes = multiprocessing.get_context("fork")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "site.sqlite"


def charge(ledger: Ledger, round_number: int = 1, release: Release = ROUND, **overrides: Any) -> Receipt:
    terms = {"dataset": "ward", "run": "run-1", "delta": DELTA, "max_epsilon": 8.0, "unit": "record", "planned": ()}
    terms |= {"round_number": round_number, "releases": (release,)}
    charge = Charge(**{name: overrides.pop(name, value) for name, value in terms.items()})
    return ledger.charge(charge, **overrides)


def epsilon(releases: list[Release], delta: float) -> float:
    return promised(releases, delta)[0]


def cost_of(rounds: int) -> float:
    return epsilon([Release(ROUND.event, rounds * ROUND.count)], DELTA)


def check_that_rounds_sum_to_one_run(ledger: Ledger) -> None:
    last = [charge(ledger, round_number) for round_number in range(1, 5)][-1]
    assert last.epsilon_after == cost_of(4)


def test_a_receipt_says_what_was_spent_and_what_is_left(path: Path) -> None:
    with Ledger(path) as ledger:
        first, second = charge(ledger, 1), charge(ledger, 2)
    assert first.epsilon_before == 0.0
    assert first.epsilon_after == first.epsilon_increment == cost_of(1)
    assert (second.epsilon_before, second.epsilon_after) == (cost_of(1), cost_of(2))
    assert cost_of(1) > second.epsilon_increment == cost_of(2) - cost_of(1)
    assert second.epsilon_remaining == 8.0 - cost_of(2)
    assert (second.steps_round, second.steps_total) == (5, 10)
    assert second.accountant.method == "pld"


def test_rounds_sum_to_one_run(path: Path) -> None:
    with Ledger(path) as ledger:
        check_that_rounds_sum_to_one_run(ledger)


def test_a_ledger_that_forgets_between_rounds_is_found_out(path: Path) -> None:
    class Forgetful(Ledger):
        def spent(self, dataset: str) -> list[Release]:
            return []

    with Forgetful(path) as ledger, pytest.raises(AssertionError):
        check_that_rounds_sum_to_one_run(ledger)


def test_what_was_charged_is_there_after_reopening_to_the_last_bit(path: Path) -> None:
    odd = gaussian_release(noise_multiplier=1 / 3, sample_rate=0.1 + 0.2, count=7, purpose="count", clip_norm=0.1)
    with Ledger(path) as ledger:
        charge(ledger, 3, odd, max_epsilon=1000.0)
    with Ledger(path) as ledger:
        assert ledger.spent("ward") == [odd]
        (entry,) = ledger.entries()
    assert (entry.run, entry.round_number, entry.purpose, entry.event.clip_norm) == ("run-1", 3, "count", 0.1)
    figures = (entry.event.noise_multiplier, entry.event.sample_rate, entry.count, entry.delta)
    assert figures == (1 / 3, 0.1 + 0.2, 7, DELTA)
    assert entry.charged_at.endswith("+00:00")


def test_a_budget_for_three_rounds_ends_after_three_and_stays_ended(path: Path) -> None:
    budget = cost_of(3)
    with Ledger(path) as ledger:
        for round_number in (1, 2, 3):
            last = charge(ledger, round_number, max_epsilon=budget)
        assert last.epsilon_remaining == 0.0
        with pytest.raises(BudgetExhausted):
            charge(ledger, 4, max_epsilon=budget)
    with Ledger(path) as ledger:
        with pytest.raises(BudgetExhausted):
            charge(ledger, 4, max_epsilon=budget)
        with pytest.raises(BudgetExhausted):
            charge(ledger, 1, max_epsilon=budget, run="another run")
        assert len(ledger.entries()) == 3
        assert ledger.epsilon("ward", DELTA) == budget


def test_a_budget_a_hair_short_of_three_rounds_ends_after_two(path: Path) -> None:
    budget = cost_of(3) - 1e-9
    with Ledger(path) as ledger:
        charge(ledger, 1, max_epsilon=budget)
        charge(ledger, 2, max_epsilon=budget)
        with pytest.raises(BudgetExhausted):
            charge(ledger, 3, max_epsilon=budget)


def test_a_refusal_is_one_line_with_every_figure_a_steward_asks_for(path: Path) -> None:
    with Ledger(path) as ledger:
        charge(ledger, 1)
        with pytest.raises(BudgetExhausted) as refusal:
            charge(ledger, 2, max_epsilon=2.5)
    line = str(refusal.value)
    assert "\n" not in line
    spent, wanted = (math.ceil(cost_of(rounds) * 1e4) / 1e4 for rounds in (1, 2))
    for part in ("'ward'", "round 2", "'run-1'", f"{spent:.4f} is spent", f"{wanted:.4f}", "2.5 at delta"):
        assert part in line
    assert f"{math.floor((2.5 - cost_of(1)) * 1e4) / 1e4:.4f} is left" in line
    assert f"fedveil ledger show {path}" in line


def test_a_cheaper_round_still_fits_after_a_dear_one_was_refused(path: Path) -> None:
    with Ledger(path) as ledger:
        charge(ledger, 1)
        cheaper = gaussian_release(ROUND.event.noise_multiplier, ROUND.event.sample_rate, count=1)
        budget = epsilon([ROUND, cheaper], DELTA)
        with pytest.raises(BudgetExhausted):
            charge(ledger, 2, max_epsilon=budget)
        assert charge(ledger, 2, cheaper, max_epsilon=budget).epsilon_before == cost_of(1)


def test_a_repeated_round_is_paid_for_again(path: Path) -> None:
    with Ledger(path) as ledger:
        charge(ledger, 1)
        assert charge(ledger, 1).epsilon_after == cost_of(2)
        assert len(ledger.entries()) == 2


def test_data_sets_have_accounts_of_their_own(path: Path) -> None:
    with Ledger(path) as ledger:
        charge(ledger, 1, dataset="ward")
        assert charge(ledger, 1, dataset="clinic").epsilon_before == 0.0
        assert ledger.epsilon("ward", DELTA) == ledger.epsilon("clinic", DELTA) == cost_of(1)
        assert ledger.epsilon("nobody's", DELTA) == 0.0


def test_a_noised_count_is_paid_for_and_is_not_a_step(path: Path) -> None:
    count = gaussian_release(5.0, 1.0, 1, purpose="count")
    with Ledger(path) as ledger:
        receipt = ledger.charge(Charge("ward", "r", 1, (ROUND, count), DELTA, 8.0))
        second = ledger.charge(Charge("ward", "r", 2, (ROUND, count), DELTA, 8.0))
    assert (receipt.steps_round, receipt.steps_total) == (5, 5)
    assert (second.steps_round, second.steps_total) == (5, 10)
    assert receipt.epsilon_after == epsilon([ROUND, count], DELTA) > cost_of(1)


def test_nothing_is_written_when_the_pricing_fails(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with Ledger(path) as ledger:
        with monkeypatch.context() as patch:
            patch.setattr("client.ledger.ledger.price", fail)
            with pytest.raises(KeyboardInterrupt):
                charge(ledger, 1)
        assert ledger.entries() == []
        assert charge(ledger, 1).epsilon_after == cost_of(1)


def test_an_interrupt_under_the_lock_undoes_the_charge_and_frees_the_lock(path: Path) -> None:
    def interrupt(*_: int) -> None:
        raise KeyboardInterrupt

    with Ledger(path) as ledger:
        with pytest.raises(KeyboardInterrupt):
            charge(ledger, 1, allow=interrupt)
        assert ledger.entries() == []
        assert charge(ledger, 1).epsilon_after == cost_of(1)


def test_a_price_that_is_no_number_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "client.ledger.rows.privacy_filter.price", lambda *_: (float("nan"), Accountant("pld", "0.6.0"))
    )
    with Ledger(path) as ledger, pytest.raises(BudgetExhausted):
        charge(ledger, 1)


@pytest.mark.parametrize(
    "terms",
    [{"delta": 0.0}, {"max_epsilon": 0.0}, {"round_number": -1}, {"run": ""}, {"dataset": ""}],
)
def test_a_charge_on_impossible_terms_is_refused(path: Path, terms: dict[str, Any]) -> None:
    with Ledger(path) as ledger:
        with pytest.raises(ConfigError):
            charge(ledger, **terms)
        with pytest.raises(ConfigError, match="at least one release"):
            charge(ledger, releases=())
        assert ledger.entries() == []


@pytest.mark.parametrize(
    "terms",
    [
        *({"unit": ""}, {"mask_key": bytes(32)}, {"max_alone": 0.0}, {"max_alone": math.nan}),
        *({"max_person": 0.0}, {"max_person": math.nan}),
    ],
)
def test_a_charge_that_nothing_could_be_held_to_is_none(terms: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Charge("ward", "run-1", 1, (WHISPER,), DELTA, 8.0, **terms)


def test_the_dearest_history_of_shared_records_is_said_whole() -> None:
    pld, rdp = Accountant("pld", "0.6.0"), Accountant("rdp", "0.6.0")
    own = Receipt(1.0, 2.0, 6.0, 1, 2, pld, 8.0, DELTA, alone_after=2.5)
    other = Receipt(3.0, 9.0, 0.0, 5, 7, rdp, math.inf, DELTA / 10, alone_after=2.0)
    dearer = dataclasses.replace(own, epsilon_before=3.0, epsilon_after=9.0, epsilon_remaining=0.0, accountant=rdp)
    assert of_all(own, [own, other]) == dearer
    cheaper = dataclasses.replace(other, epsilon_after=2.0, alone_after=4.0)
    assert of_all(own, [own, cheaper]) == dataclasses.replace(own, alone_after=4.0)


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


def hammer(path: Path, budget: float, start: Barrier, report: Connection) -> None:
    start.wait()
    paid = 0
    with Ledger(path) as ledger:
        try:
            while True:
                charge(ledger, 1, max_epsilon=budget)
                paid += 1
        except BudgetExhausted:
            report.send(paid)


def test_two_processes_at_once_never_pass_the_budget_together(path: Path) -> None:
    budget, start = cost_of(12) + 1e-6, processes.Barrier(2)
    ends = [processes.Pipe(duplex=False) for _ in range(2)]
    children = [processes.Process(target=hammer, args=(path, budget, start, sender)) for _, sender in ends]
    for child in children:
        child.start()
    assert all(receiver.poll(60) for receiver, _ in ends), "a process ended without a refusal"
    paid = [receiver.recv() for receiver, _ in ends]
    for child in children:
        child.join()
    with Ledger(path) as ledger:
        assert sum(paid) == len(ledger.entries()) == 12
        assert ledger.epsilon("ward", DELTA) <= budget


def test_threads_with_a_ledger_each_share_one_budget(path: Path) -> None:
    budget, refused = cost_of(6) + 1e-6, []

    def work() -> None:
        with Ledger(path) as ledger:
            try:
                for round_number in range(1, 10):
                    charge(ledger, round_number, max_epsilon=budget)
            except BudgetExhausted:
                refused.append(True)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 3
    with Ledger(path) as ledger:
        assert len(ledger.entries()) == 6


def test_a_ledger_of_another_thread_or_a_closed_one_says_so(path: Path) -> None:
    ledger = Ledger(path)
    ledger.close()
    ledger.close()
    with pytest.raises(LedgerError, match="before closing"):
        charge(ledger, 1)


def charge_until_killed(path: Path, report: Connection) -> None:
    with Ledger(path) as ledger:
        for round_number in range(1, 10_000):
            charge(ledger, round_number, WHISPER)
            report.send(round_number)


def test_a_killed_process_leaves_every_charge_it_reported_and_no_half_one(path: Path) -> None:
    moments, reported, kills = random.Random(7), 0, 20
    for _ in range(kills):
        receiver, sender = processes.Pipe(duplex=False)
        child = processes.Process(target=charge_until_killed, args=(path, sender))
        child.start()
        sender.close()
        receiver.poll(10)
        time.sleep(moments.uniform(0, 0.08))
        os.kill(child.pid or 0, signal.SIGKILL)
        child.join()
        try:
            while True:
                receiver.recv()
                reported += 1
        except EOFError:
            receiver.close()
        with Ledger(path) as ledger:
            written = len(ledger.entries())
            # The kill may fall between the commit and the report: at most one charge per kill.
            assert reported <= written <= reported + kills
            assert ledger.epsilon("ward", DELTA) == epsilon([gaussian_release(20.0, 0.01, written)], DELTA)
    assert reported >= kills


def write_text(path: Path) -> None:
    path.write_text("site,epsilon\nward,0\n" * 200)


def write_nothing(path: Path) -> None:
    path.touch()


def write_other_database(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE charges (id INTEGER)")
    connection.close()


def write_newer_format(path: Path) -> None:
    Ledger(path).close()
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA user_version = {FORMAT + 1}")
    connection.close()


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
        (
            write_newer_format,
            f"format {FORMAT + 1}, this FedVeil reads format {FORMAT} alone: install",
        ),
        (
            write_marked_and_empty,
            f"format 0, this FedVeil reads format {FORMAT} alone: install",
        ),
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


@contextmanager
def no_special_rights() -> Iterator[None]:
    """Be somebody who may write nothing of root's, where the tests run as root."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


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


# The same records under another name.


def texts(*numbers: int, column: str = "record") -> Dataset:
    """Return records of which a run read the column ``column``; a number's whole row is the same in any."""
    examples = (TextExample(text=f"{column} {n}", label=n % 2, row=f"row {n}".encode()) for n in numbers)
    return Dataset("any", tuple(examples), ("no", "yes"))


def charge_for(path: Path, dataset: str, data: Dataset, release: Release = WHISPER, **terms: Any) -> Receipt:
    with Ledger(path) as ledger:
        return charge(ledger, 1, release, dataset=dataset, records=record_hashes(data, ledger.key), **terms)


def charged(path: Path) -> list[tuple[str, str, int]]:
    with Ledger(path) as ledger:
        return [(entry.dataset, entry.run, entry.round_number) for entry in ledger.entries()]


def check_that_the_same_records_stay_on_one_budget(path: Path, again: Dataset) -> None:
    """Use twenty records as ``ward``, then ``again`` as ``clinic`` until it is refused."""
    budget = cost_of(2) + 1e-6
    with Ledger(path) as ledger:
        ledger.set_budget("ward", budget, DELTA)
    first = charge_for(path, "ward", texts(*range(20)), ROUND, max_epsilon=budget)
    second = charge_for(path, "clinic", again, ROUND, max_epsilon=budget)
    assert (second.epsilon_before, second.epsilon_after) == (first.epsilon_after, cost_of(2)), "a name is a new start"
    assert charged(path) == [("ward", "run-1", 1), ("clinic", "run-1", 1), ("ward", "run-1", 1)]
    before = path.read_bytes()
    with pytest.raises(BudgetExhausted, match="records that it shares with another data set") as refusal:
        charge_for(path, "clinic", again, ROUND, max_epsilon=budget)
    assert "\n" not in str(refusal.value)
    assert not re.search(r"ward|\d\.\d", str(refusal.value).split(";")[0]), "it tells of the other data set"
    assert path.read_bytes() == before, "a refused charge was written"


READINGS = {
    "the same": texts(*reversed(range(20))),
    "another column": texts(*range(20), column="second"),
    "a part": texts(*range(10)),
    "many more": texts(*range(200)),
    "one of them": texts(19, *range(100, 150)),
    "one, through another column": texts(19, *range(100, 150), column="second"),
}


@pytest.mark.parametrize("again", READINGS.values(), ids=READINGS.keys())
def test_the_same_records_under_another_name_are_charged_to_both(path: Path, again: Dataset) -> None:
    check_that_the_same_records_stay_on_one_budget(path, again)


def content_alone(data: Dataset, key: bytes) -> frozenset[int]:
    """The fault of old: what the run's columns made of a row is all that is known of it."""
    rowless = tuple(TextExample(example.text, label=example.label) for example in data.examples)
    return contents.record_hashes(Dataset(data.name, rowless, data.label_names), key)


def test_a_ledger_that_does_not_look_or_knows_the_read_columns_alone_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("test_ledger.record_hashes", content_alone)
        check_that_the_same_records_stay_on_one_budget(tmp_path / "one", READINGS["the same"])
        with pytest.raises(AssertionError, match="a name is a new start"):
            check_that_the_same_records_stay_on_one_budget(tmp_path / "two", READINGS["another column"])
    monkeypatch.setattr(Ledger, "_recognise", lambda *_: [])
    with pytest.raises(AssertionError, match="a name is a new start"):
        check_that_the_same_records_stay_on_one_budget(tmp_path / "three", READINGS["the same"])


def visits(write: Callable[[str], str] = str, labels: tuple[str, ...] = ("no", "yes"), turned: int = 0) -> Dataset:
    """Return records of a table with a column more than the run reads, as one program or another writes it."""
    examples = tuple(
        TextExample(
            text=write(f"Caf\u00e9 au lait, visit {n}"), label=(n + turned) % 2, row=write(f"ward {n}").encode()
        )
        for n in range(5)
    )
    return Dataset("any", examples, labels)


WRITTEN = {
    "another normal form": visits(lambda text: unicodedata.normalize("NFD", f"{text} ")),
    "other blanks": visits(lambda text: text.replace(" ", "\u00a0 ") + "\r\n"),
    "capitals": visits(str.upper),
    "characters that nobody sees": visits(lambda text: f"\ufeff{text[:2]}\u00ad{text[2:]}\u200b"),
    "characters that nobody sees either": visits(
        lambda text: f"\u2068{text[:4]}\ufe0f\u2069{text[4:9]}\u034f\x00{text[9:]}\U000e0001\u061c\x9f"
    ),
    "Turkish capitals": visits(lambda text: text.replace("i", "\u0130").upper()),
    "Turkish small letters": visits(lambda text: text.upper().replace("I", "\u0131").lower() + " "),
    "other names of labels": visits(lambda text: f"{text} ", labels=("0", "1")),
    "other labels": visits(lambda text: f"{text} ", turned=1),
}


@pytest.mark.parametrize("again", WRITTEN.values(), ids=WRITTEN.keys())
def test_records_that_say_the_same_are_the_same_however_they_are_written(
    again: Dataset, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def before_under_another_name(path: Path) -> float:
        charge_for(path, "ward", visits())
        return charge_for(path, "clinic", again).epsilon_before

    assert before_under_another_name(path) > 0, "another way of writing is a new start"
    monkeypatch.setattr(contents, "said", lambda example: example.canonical(str(example.label)))
    assert before_under_another_name(tmp_path / "planted") == 0


def test_no_case_and_no_form_of_a_character_is_another_record() -> None:
    def said(text: str) -> str:
        return contents.said(TextExample(text=f"a{text}"))

    for char in map(chr, (*range(0x3000), *range(0xFB00, 0x10000))):
        written = {unicodedata.normalize(form, char) for form in ("NFD", "NFKC", "NFKD")}
        written |= {other for text in (char, *written) for other in (text.upper(), text.lower())}
        assert {said(text) for text in written} == {said(char)}, f"U+{ord(char):04X}"


def test_what_is_withdrawn_stays_so_however_it_is_written(path: Path) -> None:
    with Ledger(path) as ledger:
        ledger.remember("ward", record_hashes(visits(), ledger.key))
        ledger.holds.withdraw("ward", "asked for")
    for again in WRITTEN.values():
        with pytest.raises(BudgetExhausted, match="records that it shares with another data set"):
            charge_for(path, "clinic", again)


def test_other_words_are_another_record(path: Path) -> None:
    charge_for(path, "ward", visits())
    assert charge_for(path, "clinic", visits(lambda text: f"{text} again")).epsilon_before == 0
    asked = (("user", "hello"), ("assistant", "good day"))
    two = [Conversation(turns=(*asked, ("user", "and now?"), ("assistant", end))) for end in ("rest", "walk")]
    assert contents.said(two[0]) != contents.said(two[1]), "a conversation is known by how it begins"
    shown = [ImageExample(image=Picture(pixels, b""), label=n % 2) for n, pixels in enumerate(("a", "a", "b"))]
    assert contents.said(shown[0]) == contents.said(shown[1]) != contents.said(shown[2])


def check_that_units_do_not_mix(path: Path) -> None:
    """Charge records for one unit, and then, under their own name and another, for another."""
    charge_for(path, "ward", texts(1, 2))
    for name, records in (("ward", texts(1, 2)), ("ward", texts(7, 8)), ("clinic", texts(2, 3))):
        with pytest.raises(PolicyRefusal, match="charged for another unit than one site") as refusal:
            charge_for(path, name, records, unit="site")
        assert "\n" not in str(refusal.value)
    assert charge_for(path, "lab", texts(20, 21), unit="site").epsilon_before == 0.0
    with pytest.raises(PolicyRefusal, match="another unit than one record"):
        charge_for(path, "lab", texts(20, 21))
    with Ledger(path) as ledger:
        assert [(entry.dataset, entry.unit) for entry in ledger.entries()] == [("ward", "record"), ("lab", "site")]


def test_charges_of_two_units_never_compose(path: Path) -> None:
    check_that_units_do_not_mix(path)


def test_a_ledger_that_adds_units_up_is_found_out(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ledger, "_hold_to_unit", lambda *_: None)
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        check_that_units_do_not_mix(path)


def test_data_sets_that_share_no_record_have_budgets_of_their_own(path: Path) -> None:
    charge_for(path, "ward", texts(*range(20)))
    assert charge_for(path, "clinic", texts(*range(20, 40))).epsilon_before == 0.0
    assert charged(path) == [("ward", "run-1", 1), ("clinic", "run-1", 1)]


def test_the_other_names_own_budget_holds_and_its_smaller_delta(path: Path) -> None:
    with Ledger(path) as ledger:
        ledger.set_budget("ward", cost_of(1) + 1e-6, DELTA / 10)
    charge_for(path, "ward", texts(1, 2), WHISPER)
    with pytest.raises(BudgetExhausted, match="shares with another data set"):
        charge_for(path, "clinic", texts(2, 3), ROUND)
    shared = charge_for(path, "clinic", texts(2, 3), WHISPER)
    assert shared.delta == DELTA, "the other's delta is none of the caller's"
    assert (shared.steps_total, shared.max_epsilon) == (1, 8.0), "figures that are not of the data set asked for"
    assert shared.epsilon_after == epsilon([gaussian_release(20.0, 0.01, 2)], DELTA / 10)
    assert shared.epsilon_remaining == 8.0 - shared.epsilon_after


@pytest.mark.parametrize("factor", [1e-3, 1e3], ids=["a smaller delta", "a larger delta"])
def test_no_delta_of_a_caller_moves_another_names_limit_or_its_delta(tmp_path: Path, factor: float) -> None:
    # At the caller's smaller delta the second round would cost "ward" more than its budget.
    path = tmp_path / "ledger.sqlite"
    with Ledger(path) as ledger:
        ledger.set_budget("ward", cost_of(2) * 1.01, DELTA)
    charge_for(path, "ward", texts(1, 2), ROUND, max_epsilon=100.0)
    receipt = charge_for(path, "clinic", texts(2, 3), ROUND, delta=DELTA * factor, max_epsilon=100.0)
    assert receipt.delta == DELTA * factor
    assert receipt.epsilon_after == epsilon([gaussian_release(1.0, 0.1, 10)], min(DELTA, DELTA * factor))
    with Ledger(path) as ledger:
        assert ledger.terms("ward").delta == DELTA, "a run on another name made every later round dearer"
        assert [entry.delta for entry in ledger.entries() if entry.dataset == "ward"] == [DELTA, DELTA]


def check_that_no_threshold_of_a_caller_asks_for_a_shared_record(folder: Path) -> None:
    """Ask at budgets below and above what another name has spent, with a record of it and without."""
    for number, budget in enumerate((cost_of(1), (cost_of(1) + cost_of(2)) / 2, cost_of(2))):
        answers = []
        for records in (texts(2, 3), texts(3, 4)):
            path = folder / f"{number}-{len(answers)}.sqlite"
            charge_for(path, "ward", texts(1, 2), ROUND, delta=DELTA / 10)
            receipt = charge_for(path, "clinic", records, ROUND, max_epsilon=budget)
            answers.append(receipt.delta)
            if records == texts(2, 3):
                assert (
                    receipt.epsilon_after == epsilon([gaussian_release(1.0, 0.1, 10)], DELTA / 10) > receipt.max_epsilon
                )
                assert receipt.epsilon_remaining == 0.0
        assert answers == [DELTA, DELTA]


def test_no_threshold_of_a_caller_asks_for_a_shared_record(tmp_path: Path) -> None:
    check_that_no_threshold_of_a_caller_asks_for_a_shared_record(tmp_path)


def test_a_callers_budget_that_holds_for_other_names_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = Ledger._prices

    def everyones(self: Ledger, names: Any, charge: Charge) -> dict[str, Receipt]:
        return {
            name: dataclasses.replace(priced, max_epsilon=min(priced.max_epsilon, charge.max_epsilon))
            for name, priced in sound(self, names, charge).items()
        }

    monkeypatch.setattr(Ledger, "_prices", everyones)
    with pytest.raises(BudgetExhausted, match="shares with another"):
        check_that_no_threshold_of_a_caller_asks_for_a_shared_record(tmp_path)


def check_that_every_record_is_within_the_largest_figure(path: Path) -> None:
    """Charge three names in turn, with records that come and go, and follow each record's own history."""
    held = {"ward": {0, 1, 2}, "clinic": {2, 3}, "lab": {3, 4}}
    turns = [("ward", set()), ("clinic", set()), ("lab", set()), ("ward", {4}), ("clinic", set()), ("lab", {0})]
    uses: dict[int, int] = {}
    for dataset, more in turns:
        held[dataset] |= more
        receipt = charge_for(path, dataset, texts(*held[dataset]), ROUND, max_epsilon=100.0)
        for number in held[dataset]:
            uses[number] = uses.get(number, 0) + 1
        worst = max(uses[number] for number in held[dataset])
        assert receipt.epsilon_after >= cost_of(worst), f"a record of {dataset} has spent more than is said"


def test_no_record_has_spent_more_than_is_said_however_names_share_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_that_every_record_is_within_the_largest_figure(tmp_path / "sound")
    monkeypatch.setattr("client.ledger.ledger.of_all", lambda charge, prices: charge)
    with pytest.raises(AssertionError, match="has spent more than is said"):
        check_that_every_record_is_within_the_largest_figure(tmp_path / "its own history alone")


def test_changed_records_under_one_name_stay_on_one_budget_and_old_ones_stay_known(path: Path) -> None:
    first = charge_for(path, "ward", texts(*range(20)))
    second = charge_for(path, "ward", texts(*range(100, 120)))
    assert second.epsilon_before == first.epsilon_after
    assert charge_for(path, "clinic", texts(*range(20))).epsilon_before == second.epsilon_after


def test_what_is_known_of_records_is_not_written_again_under_the_lock(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others wait for that lock, and would see how many records there are."""
    written: list[int] = []
    real = ledger_module._remember

    def remember(db: Any, dataset: str, records: Collection[int]) -> None:
        written.append(len(records))
        real(db, dataset, records)

    monkeypatch.setattr(ledger_module, "_remember", remember)
    for numbers in (range(20), range(20), range(21), range(20)):
        charge_for(path, "ward", texts(*numbers))
    each = written[0] // 20
    assert written == [20 * each, 0, each, 0]
    charge_for(path, "clinic", texts(*range(20)))
    assert written[4] == 20 * each, "what is known of one data set is not known of another"


def test_a_ledger_that_knows_records_by_what_was_read_of_them_still_knows_them(path: Path) -> None:
    with Ledger(path) as ledger:
        charge(ledger, 1, WHISPER, records=content_alone(texts(*range(20)), ledger.key))
    assert charge_for(path, "clinic", texts(*range(20))).epsilon_before > 0


def test_a_charge_for_no_record_at_all_is_a_charge(path: Path) -> None:
    assert charge_for(path, "ward", texts()).epsilon_after > 0
    assert charged(path) == [("ward", "run-1", 1)]


def test_hashes_follow_the_records_and_the_ledgers_own_key(path: Path, tmp_path: Path) -> None:
    with Ledger(path) as here, Ledger(tmp_path / "other.sqlite") as there:
        assert here.key != there.key
        one, other = texts(1, 2), texts(2, 1, 1)
        assert record_hashes(one, here.key) == record_hashes(other, here.key)
        assert not record_hashes(one, here.key) & record_hashes(one, there.key)
        turned = tuple(dataclasses.replace(example, label=1 - (example.label or 0)) for example in one.examples)
        renumbered = Dataset("x", turned, ("yes", "no"))
        assert record_hashes(renumbered, here.key) == record_hashes(one, here.key), "label numbers count"


# Budgets that the steward sets.


def test_the_stored_budget_wins_over_whatever_two_runs_propose(path: Path) -> None:
    budget = cost_of(2)
    with Ledger(path) as ledger:
        ledger.set_budget("ward", budget, DELTA)
        first = charge(ledger, 1, run="a", max_epsilon=100.0)
        assert (first.max_epsilon, first.epsilon_remaining) == (budget, budget - cost_of(1))
        charge(ledger, 1, run="b", max_epsilon=50.0)
        with pytest.raises(BudgetExhausted):
            charge(ledger, 2, run="b", max_epsilon=50.0)
        assert ledger.epsilon("ward", DELTA) == budget


def test_a_stricter_proposal_wins_over_the_stored_budget(path: Path) -> None:
    with Ledger(path) as ledger:
        ledger.set_budget("ward", 100.0, DELTA)
        with pytest.raises(BudgetExhausted):
            charge(ledger, 1, max_epsilon=cost_of(1) / 2)


def test_a_policy_lowers_the_stored_budget_and_only_the_steward_raises_it(path: Path) -> None:
    with Ledger(path) as ledger:
        assert ledger.lower_budget("ward", math.inf, 1e-5).epsilon == math.inf
        for epsilon_, holds in ((5.0, 5.0), (3.0, 3.0), (8.0, 3.0), (3.0, 3.0)):
            assert ledger.lower_budget("ward", epsilon_, 1e-5).epsilon == holds
        before = ledger.set_budget("ward", 8.0, 1e-4)
        assert (before.epsilon, before.delta) == (3.0, 1e-5), "what held until then"
        assert ledger.terms("ward").epsilon == 8.0
        assert ledger.terms("ward").delta == 1e-5, "a delta that was promised once does not grow"
        assert [(b.epsilon, b.delta) for b in ledger.budgets()] == [(5.0, 1e-5), (3.0, 1e-5), (8.0, 1e-4)]
        ledger.set_budget("clinic", 1.0, 1e-5)
        assert [b.replaced for b in ledger.budgets()] == [None, 5.0, 3.0, None], "by data set"


@pytest.mark.parametrize("terms", [("ward", 0.0, 1e-5), ("ward", 1.0, 0.5), ("ward", math.inf, 1e-5), ("", 1.0, 1e-5)])
def test_an_impossible_budget_is_not_stored(path: Path, terms: tuple[str, float, float]) -> None:
    with Ledger(path) as ledger:
        with pytest.raises(ConfigError):
            ledger.set_budget(*terms)
        assert ledger.budgets() == []


def test_a_caller_that_looks_at_the_count_does_so_under_the_lock_and_can_refuse(path: Path) -> None:
    seen: list[tuple[int, int]] = []

    def twice(rounds: int, steps: int) -> None:
        with sqlite3.connect(path, timeout=0) as other, pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("BEGIN IMMEDIATE")
        seen.append((rounds, steps))
        if rounds == 2:
            raise PolicyRefusal("two rounds are enough")

    with Ledger(path) as ledger:
        charge(ledger, 1, WHISPER, allow=twice)
        charge(ledger, 1, WHISPER, allow=twice)
        with pytest.raises(PolicyRefusal, match="enough"):
            charge(ledger, 1, WHISPER, allow=twice)
        assert len(ledger.entries()) == 2, "what was not allowed was charged"
    assert seen == [(0, 0), (1, 1), (2, 2)]


def test_several_deltas_compose_at_the_smallest(path: Path) -> None:
    with Ledger(path) as ledger:
        charge(ledger, 1, delta=1e-4)
        charge(ledger, 1, run="b", delta=1e-6, max_epsilon=50.0)
        last = charge(ledger, 2, delta=1e-4, max_epsilon=50.0)
    assert last.delta == 1e-6
    assert (
        last.epsilon_after
        == epsilon([gaussian_release(1.0, 0.1, 15)], 1e-6)
        > epsilon([gaussian_release(1.0, 0.1, 15)], 1e-4)
    )


def check_that_only_own_rounds_count(path: Path) -> None:
    charge_for(path, "clinic", texts(1, 2))
    charge_for(path, "ward", texts(2, 3), run="run-2")
    with Ledger(path) as ledger:
        assert [(entry.dataset, entry.caused_by) for entry in ledger.entries()] == [
            *(("clinic", None), ("ward", None), ("clinic", "ward")),
        ]
        assert (ledger.trained("clinic", "run-2"), ledger.trained("ward", "run-2")) == ((0, 0), (1, 1))
        assert sum(release.count for release in ledger.spent("clinic")) == 2


def test_what_another_name_trained_is_charged_and_is_no_round_of_this_one(path: Path) -> None:
    check_that_only_own_rounds_count(path)


def test_a_count_of_others_rounds_is_found_out(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def everyones(self: Ledger, dataset: str, run: str) -> tuple[int, int]:
        rows = [entry for entry in self.entries() if (entry.dataset, entry.run) == (dataset, run)]
        return len(rows), sum(entry.count for entry in rows)

    monkeypatch.setattr(Ledger, "trained", everyones)
    with pytest.raises(AssertionError):
        check_that_only_own_rounds_count(path)


def test_rounds_and_steps_of_a_run_are_counted(path: Path) -> None:
    with Ledger(path) as ledger:
        for round_number in (1, 2, 2):
            charge(ledger, round_number, WHISPER)
        charge(ledger, 1, WHISPER, run="another")
        charge(ledger, 3, gaussian_release(9.0, 1.0, 1, purpose=EVALUATION))
        assert ledger.trained("ward", "run-1") == (3, 3), "a round that is charged again counts again"
        assert ledger.trained("ward", "nobody's") == (0, 0)
        assert ledger.entries()[-1].event.clip_norm == 1.0, "a count is not clipped; its sensitivity is 1"


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


@pytest.mark.parametrize("steps", [3, 7, 12, 20])
def test_a_refusal_rounds_its_figures_against_the_site(tmp_path: Path, steps: int) -> None:
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        terms = {"run": "r", "delta": 1e-5, "max_epsilon": 8.0}
        charge(ledger, 1, gaussian_release(0.9, 0.1, steps), dataset="clinic", **terms)
        spent = ledger.epsilon("clinic", 1e-5)
        with pytest.raises(BudgetExhausted) as refused:
            charge(ledger, 2, gaussian_release(0.5, 0.5, 10), dataset="clinic", **terms)
    shown = re.search(r"epsilon ([0-9.]+) is spent.* ([0-9.]+) is left", str(refused.value))
    assert shown is not None
    assert spent - 1e-9 <= float(shown[1]) < spent + 1e-4, "less is shown as spent than was"
    assert 8.0 - spent - 1e-4 < float(shown[2]) <= 8.0 - spent + 1e-9, "more is shown as left than is"
