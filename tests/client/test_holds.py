"""A steward's holds: budget that is kept for a run, data that are withdrawn, and receipts of what was charged."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from ledgers import DELTA, ROUND, charge, cost_of
from report_forms import fedveil

from audits.tiny_site import OneSite, clinic, pins
from fedveil.client.ledger.file import withdrawn_in
from fedveil.client.ledger.holds import Holds, moment
from fedveil.client.ledger.ledger import Ledger
from fedveil.client.ledger.receipts import receipt_of
from fedveil.common.config.text import to_toml
from fedveil.common.errors import BudgetExhausted, ConfigError, LedgerError, PolicyRefusal
from fedveil.deploy.site_folder import make_site, open_site_folder
from fedveil.deploy.withdraw import withdraw_site
from fedveil.privacy.accountant import INITIALISATION
from fedveil.privacy.accounting import Release, gaussian_release
from fedveil.privacy.events import Event
from fedveil.privacy.figures import epsilon_text
from fedveil.privacy.privacy_filter import promised

pytestmark = pytest.mark.rough_prices

LATER = "2999-12-31T23:59:59+00:00"
OTHER = gaussian_release(noise_multiplier=2.0, sample_rate=0.2, count=3)
KEPT = cost_of(3) - cost_of(1)
"""What two more rounds add to one."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "site.sqlite"


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    with Ledger(path) as opened:
        opened.set_budget("ward", cost_of(3), DELTA)
        yield opened


# Reservations


def check_that_a_reservation_keeps_what_it_says(ledger: Ledger) -> None:
    """One round of another run fits beside what is kept, two do not; the run itself gets both of its own."""
    ledger.holds.reserve("ward", "mine", KEPT, LATER)
    charge(ledger, 1, run="other")
    with pytest.raises(BudgetExhausted, match="kept for another run"):
        charge(ledger, 2, run="other")
    charge(ledger, 1, run="mine")
    with pytest.raises(BudgetExhausted, match="kept for another run"):
        charge(ledger, 2, run="other")
    last = charge(ledger, 2, run="mine")
    assert last.epsilon_after == cost_of(3)


def test_what_is_kept_for_a_run_is_there_when_it_comes(ledger: Ledger) -> None:
    check_that_a_reservation_keeps_what_it_says(ledger)


def test_a_ledger_that_keeps_nothing_is_found_out(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Holds, "kept", lambda *_: 0.0)
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        check_that_a_reservation_keeps_what_it_says(ledger)


def test_where_all_is_kept_nothing_is_released_though_it_cost_nothing(ledger: Ledger) -> None:
    ledger.holds.reserve("ward", "mine", cost_of(3), LATER)
    nothing = gaussian_release(noise_multiplier=1e5, sample_rate=1e-6, count=1)
    assert promised([nothing], DELTA)[0] == 0.0
    with pytest.raises(BudgetExhausted, match="kept for another run"):
        charge(ledger, 1, run="other", release=nothing)


def test_what_a_run_has_added_is_no_longer_kept_for_it(ledger: Ledger) -> None:
    """Against prices that are composed here by hand."""
    ledger.set_budget("ward", 8.0, DELTA)
    ledger.holds.reserve("ward", "mine", 2.0, LATER)
    assert ledger.kept("ward", "", DELTA) == 2.0
    assert ledger.kept("ward", "mine", DELTA) == 0.0
    charge(ledger, 1, run="other", release=OTHER, planned=(OTHER, ROUND))
    charge(ledger, 1, run="mine")
    added = promised([ROUND, OTHER], DELTA)[0] - promised([OTHER], DELTA)[0]
    assert 0 < added < 2.0
    assert ledger.kept("ward", "other", DELTA) == pytest.approx(2.0 - added, abs=1e-12)
    for number in (2, 3, 4):
        charge(ledger, number, run="mine")
    assert promised([Release(ROUND.event, 20), OTHER], DELTA)[0] - promised([OTHER], DELTA)[0] > 2.0
    assert ledger.kept("ward", "other", DELTA) == 0.0


def test_what_a_run_had_spent_before_is_not_taken_from_what_is_kept_for_it(ledger: Ledger) -> None:
    """Against prices that are composed here by hand."""
    charge(ledger, 1, run="mine")
    ledger.holds.reserve("ward", "mine", KEPT, LATER)
    assert ledger.kept("ward", "", DELTA) == KEPT
    with pytest.raises(BudgetExhausted, match="kept for another run"):
        charge(ledger, 1, run="other")
    charge(ledger, 2, run="mine")
    assert ledger.kept("ward", "", DELTA) == pytest.approx(KEPT - (cost_of(2) - cost_of(1)), abs=1e-12)
    ledger.holds.reserve("ward", "mine", 0.01, LATER)
    assert ledger.kept("ward", "", DELTA) == 0.01, "a new reservation counts from then"


def test_the_latest_reservation_of_a_run_holds_and_several_runs_add_up(ledger: Ledger) -> None:
    ledger.holds.reserve("ward", "mine", 1.0, LATER)
    ledger.holds.reserve("ward", "mine", 0.25, LATER)
    ledger.holds.reserve("ward", "yours", 0.5, LATER)
    assert ledger.kept("ward", "", DELTA) == 0.75
    assert ledger.kept("ward", "yours", DELTA) == 0.25
    assert ledger.kept("lab", "", DELTA) == 0.0
    ledger.holds.reserve("ward", "mine", 0.0, LATER)
    assert ledger.kept("ward", "", DELTA) == 0.5
    assert [row.epsilon for row in ledger.holds.reservations()] == [1.0, 0.25, 0.5, 0.0]


def test_a_reservation_ends_by_itself(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    soon = (datetime.now(UTC) + timedelta(hours=1)).isoformat(timespec="seconds")
    ledger.holds.reserve("ward", "mine", cost_of(3), soon)
    with pytest.raises(BudgetExhausted, match=r"the budget is 0 without .* that is kept"):
        charge(ledger, 1, run="other")
    monkeypatch.setattr("fedveil.client.ledger.holds.now", lambda: soon)
    charge(ledger, 1, run="other")
    with pytest.raises(ConfigError, match="has passed"):
        ledger.holds.reserve("ward", "mine", 1.0, soon)


def test_a_reservation_that_somebody_makes_meanwhile_counts(
    ledger: Ledger, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A price was made before; the ledger's version tells that it must be made again."""
    from priced import during_prices

    made: list[int] = []

    def another() -> None:
        if not made:
            made.append(1)
            with Ledger(path) as other:
                other.holds.reserve("ward", "mine", cost_of(3), LATER)

    during_prices(monkeypatch, another)
    with pytest.raises(BudgetExhausted, match="kept for another run"):
        charge(ledger, 1, run="other")
    assert ledger.entries() == []


def test_another_names_reservation_keeps_its_records_budget(ledger: Ledger) -> None:
    """A round on another data set is charged to this one too, where they share a record."""
    charge(ledger, 1, run="mine", records={1, 2})
    ledger.holds.reserve("ward", "mine", KEPT, LATER)
    with pytest.raises(BudgetExhausted, match="shares with another data set have no budget left"):
        charge(ledger, 1, dataset="clinic", run="other", records={2, 3})
    charge(ledger, 1, dataset="clinic", run="mine", records={2, 3})


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("ward", "mine", -1.0, LATER), "reserve a number above 0"),
        (("ward", "mine", math.inf, LATER), "reserve a number above 0"),
        (("ward", "mine", math.nan, LATER), "reserve a number above 0"),
        (("ward", "no name", 1.0, LATER), "the name of a run"),
        (("", "mine", 1.0, LATER), "a data set"),
        (("ward", "mine", 1.0, "2020-01-01T00:00:00+00:00"), "has passed"),
    ],
)
def test_a_reservation_that_is_none_is_refused(ledger: Ledger, words: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ledger.holds.reserve(*words)


OUTSIDE = ("9999-12-31T23:59:59-01:00", "0001-01-01T00:00:00+14:00")
"""Times whose year in UTC is none."""


@pytest.mark.parametrize("text", ["tomorrow", "2026-13-01", "2026-12-31T12:00:00", "", *OUTSIDE])
def test_a_time_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is no time"):
        moment(text)


def test_reserving_on_the_command_line(ledger: Ledger, path: Path) -> None:
    charge(ledger, 1, run="other")
    words = ("ledger", "reserve", path, "--dataset", "ward", "--run", "mine", "--until", "2999-12-31", "--epsilon")
    code, said = fedveil(*words, cost_of(3))
    assert code == 1
    assert "reserve at most that" in said
    code, said = fedveil(*words, 0.5)
    assert code == 0, said
    assert f"ward: the last ε 0.5 of {cost_of(3):g} is kept for run mine until 2999-12-31T23:59:59" in said
    assert "Of that 0.5000 is kept" in fedveil("ledger", "remaining", path, "--dataset", "ward")[1]
    assert "kept for run mine until" in fedveil("ledger", "show", path)[1]
    assert fedveil(*words, 0)[0] == 0
    assert "is kept for runs" not in fedveil("ledger", "remaining", path, "--dataset", "ward")[1]
    exported = json.loads(fedveil("ledger", "export", path)[1])
    assert [row["epsilon"] for row in exported["reservations"]] == [0.5, 0.0]


# Withdrawals


def check_that_a_withdrawn_data_set_is_stopped(ledger: Ledger) -> None:
    charge(ledger, 1, records={1, 2})
    ledger.holds.withdraw("ward", "a patient's wish")
    ledger.remember("ward", {2, 3})
    with pytest.raises(PolicyRefusal, match="was withdrawn by its steward"):
        charge(ledger, 2)
    with pytest.raises(PolicyRefusal, match="was withdrawn by its steward"):
        ledger.expose("ward", run="open", round_number=1, steps=1)
    for shared in (1, 2, 3):
        with pytest.raises(BudgetExhausted, match="have no budget left for it"):
            charge(ledger, 1, dataset="clinic", records={shared, 9})
        with pytest.raises(PolicyRefusal, match="are released no more"):
            ledger.expose("clinic", run="open", round_number=1, steps=1, records={shared, 9})
    charge(ledger, 1, dataset="clinic", records={9})
    assert [entry.dataset for entry in ledger.entries()] == ["ward", "clinic"]
    assert ledger.exposures() == []


def test_nothing_of_a_withdrawn_data_set_is_released_under_any_name(ledger: Ledger) -> None:
    check_that_a_withdrawn_data_set_is_stopped(ledger)


def test_a_withdrawal_that_stops_nothing_is_found_out(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Holds, "withdrawn", lambda *_: False)
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        check_that_a_withdrawn_data_set_is_stopped(ledger)


def test_a_withdrawal_that_forgets_other_names_is_found_out(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = Holds.withdrawn
    monkeypatch.setattr(Holds, "withdrawn", lambda self, names: len(names) == 1 and sound(self, names))
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        check_that_a_withdrawn_data_set_is_stopped(ledger)


def test_a_withdrawal_cannot_be_taken_back(ledger: Ledger, path: Path) -> None:
    ledger.holds.withdraw("ward", "a patient's wish")
    ledger.set_budget("ward", 100.0, DELTA)
    with pytest.raises(PolicyRefusal, match="withdrawn"):
        charge(ledger, 1, max_epsilon=100.0)
    for change in ("DELETE FROM withdrawals", "UPDATE withdrawals SET dataset = 'none'"):
        with pytest.raises(LedgerError, match="only ever added"), ledger._file.transaction() as db:
            db.execute(change)
    with Ledger(path) as again, pytest.raises(PolicyRefusal, match="withdrawn"):
        charge(again, 1)
    with pytest.raises(ConfigError, match="a reason"):
        ledger.holds.withdraw("ward", " ")


def test_withdrawing_on_the_command_line(ledger: Ledger, path: Path) -> None:
    charge(ledger, 1)
    code, said = fedveil("ledger", "withdraw", path, "--dataset", "wart", "--reason", "asked for")
    assert code == 1
    assert "'ward'" in said
    code, said = fedveil("ledger", "withdraw", path, "--dataset", "ward", "--reason", "asked for")
    assert code == 0, said
    assert "withdrawn for good: asked for" in fedveil("ledger", "show", path)[1]
    assert "It was withdrawn" in fedveil("ledger", "remaining", path, "--dataset", "ward")[1]
    (row,) = json.loads(fedveil("ledger", "export", path)[1])["withdrawals"]
    assert (row["dataset"], row["reason"]) == ("ward", "asked for")


def test_a_site_refuses_a_round_on_withdrawn_records_and_says_no_reason(
    toy_settings: dict[str, Any], tmp_path: Path
) -> None:
    site = clinic(toy_settings, tmp_path)
    site.train(1)
    with Ledger(site.ledger) as ledger:
        ledger.holds.withdraw("clinic", "SECRET-REASON")
    reply = site.refuse(2)
    assert reply.kind == "policy"
    assert "withdrawn" in reply.reason
    assert "SECRET-REASON" not in reply.reason


def test_a_steward_withdraws_records_that_were_never_charged(toy_settings: dict[str, Any], tmp_path: Path) -> None:
    """Under another name, in another file, they are still refused; the lines that are printed quote none."""
    site = clinic(toy_settings, tmp_path)
    data = Path(str(site.node["data"]))
    policy = to_toml({"dataset-id": "ward", "epsilon": 8.0, "delta": 1e-3, "public-size": 50, **pins(site.settings)})
    folder = make_site(tmp_path / "site", "clinic", "127.0.0.1:1", policy=policy, node=f'data="{data}"')
    lines: list[str] = []
    withdraw_site(open_site_folder(folder.path), "asked for", lines.append)
    assert lines[0].startswith("ward: withdrawn")
    assert not [line for line in lines if "No record was read" in line]
    moved = OneSite(site.settings, {**site.node, "ledger": str(folder.ledger)})
    reply = moved.refuse(1)
    assert "shares with another data set have no budget left" in reply.reason
    gone = make_site(tmp_path / "gone", "clinic", "127.0.0.1:1", policy=policy, node=f'data="{tmp_path / "no.csv"}"')
    lines.clear()
    withdraw_site(gone, "asked for", lines.append)
    assert "known by this name alone" in " ".join(lines)
    rules = 'dataset-id = "ward"\nepsilon = 8.0\ndelta = 1e-3\npublic-size = 50\n'
    unpinned = make_site(tmp_path / "unpinned", "clinic", "127.0.0.1:1", policy=rules, node=f'data="{data}"')
    lines.clear()
    withdraw_site(unpinned, "asked for", lines.append)
    assert "(the policy does not say what they are for, " in lines[1], "a site with records is told that it has none"


def test_a_withdrawal_stands_whatever_becomes_of_reading_the_records(
    toy_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = clinic(toy_settings, tmp_path)
    policy = to_toml({"dataset-id": "ward", "epsilon": 8.0, "delta": 1e-3, "public-size": 50, **pins(site.settings)})
    node = f'data="{site.node["data"]}"'
    folder = make_site(tmp_path / "site", "clinic", "127.0.0.1:1", policy=policy, node=node)

    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("fedveil.common.data.sources.load_protected", fail)
    lines: list[str] = []
    with pytest.raises(MemoryError):
        withdraw_site(open_site_folder(folder.path), "asked for", lines.append)
    assert lines == ["ward: withdrawn. From now on every round on it is refused, and on what was charged for it."]
    with Ledger(folder.ledger) as ledger:
        assert ledger.holds.withdrawn(["ward"])


# Receipts


def test_a_receipt_is_what_was_charged_and_what_that_composes_to(ledger: Ledger) -> None:
    ledger.set_budget("ward", 8.0, DELTA)
    twice = Release(OTHER.event, 6, INITIALISATION)
    charge(ledger, 1, run="first", release=OTHER, planned=(twice, Release(ROUND.event, 10)))
    charge(ledger, 1, run="mine")
    charge(ledger, 1, run="between", release=OTHER)
    charge(ledger, 2, run="mine")
    charge(ledger, 1, run="last")
    ledger.fail("ward", run="mine", round_number=2, reason="SECRET-REASON")
    ledger.fail("lab", run="mine", round_number=1, reason="of other records")
    made = receipt_of(ledger, "ward", "mine")
    assert made.epsilon_run == cost_of(2)
    assert made.epsilon_before == promised([twice], DELTA)[0], "what the first plan still has counts"
    assert made.epsilon_after == promised([twice, Release(ROUND.event, 10)], DELTA)[0]
    assert (made.rounds, made.unit, made.delta, made.budget) == ((1, 2), "record", DELTA, 8.0)
    assert [row.round_number for row in made.failures] == [2]
    assert [set(row) for row in made.as_json()["failures"]] == [{"round_number", "failed_at"}]
    assert "SECRET-REASON" not in json.dumps(made.as_json()), "words of the site's log leave it"
    assert made.withdrawn == ""
    ledger.expose("ward", run="open", round_number=1, steps=2)
    ledger.expose("lab", run="open", round_number=1, steps=2)
    bare = receipt_of(ledger, "ward", "mine")
    assert (bare.epsilon_run, bare.epsilon_before, bare.epsilon_after, bare.largest) == (None,) * 4
    open_run = receipt_of(ledger, "ward", "open")
    assert (open_run.epsilon_run, open_run.rounds, len(open_run.exposures)) == (None, (), 1)
    with pytest.raises(LedgerError, match="holds no round of run 'mime'"):
        receipt_of(ledger, "ward", "mime")


def test_a_receipt_has_what_its_records_have_spent_under_another_name(ledger: Ledger, path: Path) -> None:
    charge(ledger, 1, run="mine", records={1, 2})
    assert receipt_of(ledger, "ward", "mine").largest == cost_of(1)
    charge(ledger, 1, dataset="lab", run="other", records={9})
    charge(ledger, 2, dataset="lab", run="other", records={2})
    made = receipt_of(ledger, "ward", "other")
    assert made.rounds == (), "a round that another data set trained is none of this one's"
    assert [entry.caused_by for entry in made.charges] == ["lab"]
    assert made.epsilon_after == made.largest == cost_of(2)
    charge(ledger, 3, dataset="lab", run="other", records={9})
    made = receipt_of(ledger, "ward", "mine")
    assert (made.epsilon_after, made.largest) == (cost_of(1), cost_of(3))
    said = fedveil("ledger", "receipt", path, "--dataset", "ward", "--run", "mine")[1]
    assert f"largest until now, under any name: ε {epsilon_text(cost_of(3), decimals=4)}" in said
    ledger.expose("far", run="open", round_number=1, steps=1, records={9})
    far = receipt_of(ledger, "ward", "mine")
    assert (far.epsilon_after, far.largest) == (cost_of(1), None)
    json.dumps(far.as_json(), allow_nan=False)


def test_the_largest_figure_of_a_record_holds_at_the_delta_that_is_asked_whatever_another_name_has(
    ledger: Ledger,
) -> None:
    charge(ledger, 1, dataset="lab", run="other", delta=1e-3, records={1})
    charge(ledger, 1, run="mine", records={1})
    assert ledger.terms("lab").delta == 1e-3
    assert ledger.largest("ward", DELTA) == cost_of(2) > ledger.epsilon("lab", 1e-3)


def test_a_receipt_is_signed_and_a_changed_one_is_found(ledger: Ledger, path: Path, tmp_path: Path) -> None:
    charge(ledger, 1, run="mine")
    fedveil("keygen", tmp_path / "steward.pem")
    out = tmp_path / "receipt.json"
    words = ("ledger", "receipt", path, "--dataset", "ward", "--run", "mine")
    code, said = fedveil(*words, "--sign", tmp_path / "steward.pem")
    assert (code, "name one with --output" in said) == (1, True)
    code, said = fedveil(*words, "--output", out, "--sign", tmp_path / "steward.pem")
    assert code == 0, said
    assert "1 round charged, the last one round 1" in said
    held = json.loads(out.read_text())
    assert (held["context"], held["run"], held["epsilon_run"]) == ("FedVeil receipt, 2", "mine", cost_of(1))
    assert held["charges"][0]["event"]["figures"]["noise_multiplier"] == 1.0
    public: Any = load_pem_public_key((tmp_path / "steward.pub.pem").read_bytes())
    signature = (tmp_path / "receipt.json.sig").read_bytes()
    public.verify(signature, out.read_bytes())
    with pytest.raises(InvalidSignature):
        public.verify(signature, out.read_bytes().replace(b"mine", b"mime"))


@pytest.mark.parametrize("ending", ["", "-wal", "-journal"])
@pytest.mark.parametrize("words", [("export",), ("receipt", "--dataset", "ward", "--run", "mine")])
def test_no_command_writes_over_a_ledger(words: tuple[str, ...], ending: str, ledger: Ledger, path: Path) -> None:
    """Neither over the one that it reads nor over another, under no name, nor over what belongs to one."""
    charge(ledger, 1, run="mine")
    with Ledger(path.with_name("other.sqlite")) as held:
        held.set_budget("ward", 1.0, DELTA)
    path.with_name("linked").symlink_to(path)
    before = path.read_bytes()
    for name in ("site.sqlite", "other.sqlite", "linked"):
        target = path.with_name(name + ending)
        code, said = fedveil("ledger", words[0], path, *words[1:], "-o", target)
        assert (code, said.count("fedveil:")) == (1, 1), said
        assert "is a ledger or another database and is not overwritten: name another file" in said
    assert path.read_bytes() == before
    assert path.with_name("linked").is_symlink()
    with Ledger(path) as kept:
        assert kept.entries()


def test_no_receipt_is_written_over_the_key_that_signs_it_or_over_no_file(ledger: Ledger, path: Path) -> None:
    charge(ledger, 1, run="mine")
    key, pipe = path.with_name("steward.pem"), path.with_name("pipe")
    fedveil("keygen", key)
    os.mkfifo(pipe)
    before = key.read_bytes()
    words = ("ledger", "receipt", path, "--dataset", "ward", "--run", "mine", "--sign", key, "-o")
    for output, why in ((key, "is read by this command"), (pipe, "is no file that could be replaced")):
        code, said = fedveil(*words, output)
        assert (code, why in said) == (1, True), said
        assert not output.with_name(f"{output.name}.sig").exists()
    assert key.read_bytes() == before


def in_a_sum(honest_sites: int) -> Release:
    figures = {"noise_multiplier": 3.0, "sample_rate": 0.1, "clip_norm": 1.0, "honest_sites": honest_sites}
    return Release(Event("summed-gaussian", figures), 1)


def test_a_receipt_of_sums_names_the_honest_sites_and_the_price_alone(ledger: Ledger, path: Path) -> None:
    """One run counts on two sites, an earlier one on four, and another name of the same records on five."""
    ledger.set_budget("ward", 50.0, DELTA)
    both = (in_a_sum(4), in_a_sum(2))
    charge(ledger, 1, run="first", release=in_a_sum(4), planned=both)
    charge(ledger, 1, run="mine", release=in_a_sum(2), records={1})
    made = receipt_of(ledger, "ward", "mine")
    bare = [in_a_sum(sites).event.alone() for sites in (2, 4)]
    own, after = promised([Release(bare[0], 1)], DELTA)[0], promised([Release(event, 1) for event in bare], DELTA)[0]
    assert (made.epsilon_run_alone, made.epsilon_after_alone) == (own, after)
    assert made.epsilon_run == promised([in_a_sum(2)], DELTA)[0] < own < after
    assert (made.honest_sites_run, made.honest_sites_after, made.honest_sites_largest) == (2, 4, 4)
    charge(ledger, 1, dataset="lab", run="other", records={9}, release=in_a_sum(5))
    charge(ledger, 2, dataset="lab", run="other", records={1})
    assert receipt_of(ledger, "ward", "mine").honest_sites_largest == 5
    said = fedveil("ledger", "receipt", path, "--dataset", "ward", "--run", "mine")[1].splitlines()
    for line, honest, price in ((said[1], 2, own), (said[2], 4, after)):
        assert f"counting on h = {honest} honest sites of each sum; if no other site adds its noise" in line
        assert line.endswith(f"(alone): ε {epsilon_text(price, decimals=4)}")
    assert said[3].endswith("(h = 5)")


def test_a_receipt_of_full_noise_holds_whatever_others_do_and_one_without_a_sum_has_no_h(
    ledger: Ledger, path: Path
) -> None:
    charge(ledger, 1, run="mine", planned=(ROUND, in_a_sum(1)))
    words = ("ledger", "receipt", path, "--dataset", "ward", "--run", "mine")
    assert "h = " not in fedveil(*words)[1]
    assert receipt_of(ledger, "ward", "mine").epsilon_run_alone is None
    charge(ledger, 1, run="full", release=in_a_sum(1))
    said = fedveil(*words[:-1], "full")[1]
    assert (said.count("whatever other sites of a sum do (h = 1)"), "(alone)" in said) == (2, False)
    assert receipt_of(ledger, "ward", "full").epsilon_after_alone is None
    ledger.expose("ward", run="open", round_number=1, steps=2)
    assert receipt_of(ledger, "ward", "full").epsilon_after_alone is None


def test_who_is_withdrawn_is_read_from_the_file_of_a_ledger_with_one_name(ledger: Ledger, path: Path) -> None:
    assert withdrawn_in(path) == frozenset()
    assert withdrawn_in(path.with_name("none.sqlite")) == frozenset()
    ledger.holds.withdraw("ward", "asked for")
    assert withdrawn_in(path) == {"ward"}
    os.link(path, path.with_name("second.sqlite"))
    with pytest.raises(LedgerError, match="has 2 names"):
        withdrawn_in(path)
