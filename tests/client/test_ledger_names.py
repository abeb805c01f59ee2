"""A ledger has one name, a folder one ledger, and a name that the making leaves behind stands in nobody's way."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sqlite3
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from fedveil.client.ledger import file as ledger_file
from fedveil.client.ledger.file import only_ledger, withdrawn_in
from fedveil.client.ledger.ledger import Ledger, _remember
from fedveil.client.ledger.rows import Charge, Receipt
from fedveil.client.node import user_folder
from fedveil.client.site import open_site
from fedveil.common.config.flat import Scalar
from fedveil.common.errors import LedgerError
from fedveil.privacy.accounting import Release, gaussian_release
from fedveil.strategies.job import configure

pytestmark = pytest.mark.rough_prices

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
    monkeypatch.setattr("fedveil.client.ledger.file._refuse_second_name", lambda _: None)
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
    monkeypatch.setattr("fedveil.client.ledger.file._refuse_second_name", lambda _: None)
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
    monkeypatch.setattr("fedveil.client.ledger.file._refuse_second_name", Path.unlink)
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
    monkeypatch.setattr("fedveil.client.node.only_ledger", lambda folder: folder / next(names))
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
    connection = sqlite3.connect(path)
    found = [number for (number,) in connection.execute("SELECT round FROM charges ORDER BY id")]
    connection.close()
    return found


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
