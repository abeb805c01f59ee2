"""What is looked at before the sites of a sum pay: budgets, rosters, room in the words; and who is left out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from summed_runs import SUMMED

from audits.sum_site import SumSite
from audits.tiny_site import clinic
from fedveil.client import budget
from fedveil.client.ledger.ledger import Ledger
from fedveil.client.ledger.rows import Charge
from fedveil.client.outgoing import without_paths
from fedveil.common.errors import PolicyRefusal, RunFailed
from fedveil.common.messages.round import KeyReply, KeyTask, Refusal, Task, TrainTask
from fedveil.common.messages.wire import encode_reply
from fedveil.common.run_lines import RoundLine, read_lines
from fedveil.experiments.in_process import InProcessTransport, run_in_process
from fedveil.privacy.accounting import gaussian_release
from fedveil.privacy.secure_sum import rounding
from fedveil.server.collect.masked import MaskedCollector
from fedveil.server.collect.masked_sum import other_releases
from fedveil.strategies.job import configure

pytestmark = pytest.mark.rough_prices


@pytest.fixture
def summed(toy_settings: dict[str, Any]) -> dict[str, Any]:
    return {**toy_settings, **SUMMED}


@pytest.fixture
def clinics(summed: dict[str, Any], tmp_path: Path) -> SumSite:
    return SumSite(clinic({**summed, "privacy.delta": 1e-3}, tmp_path))


def charges(folder: Path) -> list[int]:
    """Return how many charges each site's ledger holds."""
    counts = []
    for path in sorted((folder / "ledgers").glob("*.sqlite")):
        with Ledger(path) as ledger:
            counts.append(len(ledger.entries()))
    return counts


def refused(site: SumSite, words: str, number: int = 1) -> None:
    reply = site.key(number)
    assert isinstance(reply, Refusal), "the site gives a key, for which the others would pay"
    assert words in reply.reason, reply.reason


# --- a site that could not pay ----------------------------------------------------------------------------------------


def test_a_site_whose_records_were_released_without_privacy_gives_no_key(clinics: SumSite) -> None:
    clinics.train(1)
    with Ledger(clinics.site.ledger) as ledger:
        ledger.expose("clinic", run="open", round_number=1, steps=1)
    refused(clinics, "released without privacy", 2)
    clinics.site.node["dataset-id"] = "other"
    refused(clinics, "released without privacy", 2)
    clinics.rule(after_no_privacy=True)
    assert isinstance(clinics.key(2), KeyReply)


def test_a_site_whose_records_have_no_budget_under_another_name_gives_no_key(
    clinics: SumSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    clinics.train(1)
    with Ledger(clinics.site.ledger) as ledger:
        clinics.rule(epsilon=1.01 * ledger.epsilon("clinic", 1e-3), delta=1e-3)
    refused(clinics, "is spent", 2)
    clinics.site.node["dataset-id"] = "other"
    clinics.rule(epsilon=100.0, delta=1e-3)
    refused(clinics, "shares with another data set", 2)
    # The planted fault: the key is given by what one name has spent, and the vector is refused when others have paid.
    monkeypatch.setattr(Ledger, "_recognise", lambda *own: [])
    task = clinics.task(2)
    monkeypatch.undo()
    clinics.refuse(task, "shares with another data set")


def test_a_site_that_has_had_all_its_rounds_gives_no_key(clinics: SumSite) -> None:
    clinics.rule(max_rounds=1)
    clinics.train(1)
    refused(clinics, "max-rounds = 1", 2)
    refused(clinics, "max-rounds = 1", 1)


def test_all_that_refuses_a_charge_refuses_a_key_in_the_same_words_and_nothing_is_written(tmp_path: Path) -> None:
    def asked(dataset: str, **terms: Any) -> Charge:
        return Charge(dataset, "run", 1, (gaussian_release(2.0, 0.1, 1),), 1e-5, 9.0, **terms)

    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.charge(asked("sites", unit="site"), records={1})
        ledger.charge(asked("north", site="north", mask_key=b"n" * 32), records={2})
        ledger.expose("open", run="open", round_number=1, steps=1, records={3})
        ledger.charge(asked("gone"), records={4})
        ledger.holds.withdraw("gone", "asked for")
        held = ledger.entries()
        for charge, record, words in (
            (asked("sites"), 1, "charged for another unit"),
            (asked("ward"), 1, "charged for another unit"),
            (asked("ward", site="south", mask_key=b"s" * 32), 2, "in one sum a record is at one site"),
            (asked("north", site="south", mask_key=b"s" * 32), 5, "in one sum a record is at one site"),
            (asked("ward"), 3, "released without privacy"),
            (asked("gone"), 4, "was withdrawn by its steward"),
        ):
            for ask in (ledger.check, ledger.charge):
                with pytest.raises(PolicyRefusal, match=words):
                    ask(charge, records={record})
        ledger.check(asked("ward"), records={6})
        assert ledger.entries() == held


class Unwilling(InProcessTransport):
    """One site gives keys and refuses every vector."""

    def deliver(self, node: int, task: Task, content: Any) -> Any:
        if isinstance(task, KeyTask):
            self.keys.append((task.round_number, node))
        if isinstance(task, TrainTask) and node == 3:
            return encode_reply(Refusal(task.run, task.round_number, "site-3", "policy", "its policy has no more"))
        return super().deliver(node, task, content)

    keys: list[tuple[int, int]]


def test_a_site_that_refused_a_vector_is_asked_no_more_in_the_run(
    summed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fresh() -> Iterator[type[Unwilling]]:
        while True:
            yield type("Fresh", (Unwilling,), {"keys": []})

    kinds = fresh()
    folder = run_in_process(summed, 4, run="kept", kind=next(kinds))
    first, second = read_lines(RoundLine, folder)
    assert (first.attempts, second.attempts) == (2, 1)
    assert [(line.site, line.kind) for line in second.refusals] == [("site-3", "policy")], "nobody says why it is gone"
    assert charges(folder)[:3] == [3, 3, 3]
    # The planted fault: each round begins with all sites, and the others pay for each.
    gather = MaskedCollector.collect

    def forgetful(self: MaskedCollector, *given: Any) -> Any:
        self._unfit.clear()
        return gather(self, *given)

    monkeypatch.setattr(MaskedCollector, "collect", forgetful)
    assert charges(run_in_process(summed, 4, run="forgot", kind=next(kinds)))[:3] == [4, 4, 4]


# --- what a policy says -----------------------------------------------------------------------------------------------


def test_the_least_noise_of_a_policy_is_of_what_the_site_itself_adds(clinics: SumSite) -> None:
    clinics.rule(min_noise_multiplier=1.5)  # of the sum it is 2, of each of two honest sites 2 / √2
    refused(clinics, "noise multiplier 1.41421 of each site")
    clinics.site.settings |= {"privacy.clip-norm": 5.0}
    refused(clinics, "noise multiplier 1.41421 of each site")
    clinics.rule(min_noise_multiplier=1.41)
    assert isinstance(clinics.key(), KeyReply)


def test_more_honest_sites_than_the_roster_has_are_refused(clinics: SumSite) -> None:
    clinics.rule(honest_sites=4)
    refused(clinics, "honest-sites = 4, and its roster 3 sites")


def test_no_path_of_a_key_or_a_roster_leaves_the_site(clinics: SumSite) -> None:
    clinics.rule(peers="the ward/peers.toml")
    refused(clinics, "the roster <peers> cannot be read")
    reason = clinics.key().reason
    assert "ward" not in reason
    assert without_paths("see /srv/the ward/key", {"identity": "/srv/the ward/key"}) == "see <identity>"


# --- what the server looks at -----------------------------------------------------------------------------------------


def test_a_sum_that_does_not_fit_its_words_is_refused_before_anybody_pays(
    clinics: SumSite, summed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounding, "_RANGE", 2**16)
    refused(clinics, "does not fit")
    assert not clinics.site.charges()
    # Whose parts fit alone pay once, with which the server learns the sizes; not in each attempt.
    monkeypatch.setattr(budget, "check_headroom", lambda *own: None)
    with pytest.raises(RunFailed, match="does not fit"):
        run_in_process(summed, 4, run="full")
    (full,) = Path(summed["output"]).glob("*full")
    assert charges(full) == [1, 1, 1, 1]
    monkeypatch.setattr(MaskedCollector, "_overfull", lambda *own: "")
    with pytest.raises(RunFailed, match="does not fit"):
        run_in_process(summed, 4, run="blind")
    (blind,) = Path(summed["output"]).glob("*blind")
    assert min(charges(blind)) > 1, "planted: the test above would pass without the look"


def test_the_room_in_a_sums_words_is_for_the_parts_of_colluders_too(
    clinics: SumSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[int] = []
    monkeypatch.setattr(budget, "check_headroom", lambda *own: counted.append(own[-1]))
    clinics.site.settings |= {"privacy.honest-sites": 2, "privacy.colluders": 1}
    assert isinstance(clinics.key(), KeyReply)
    assert counted == [3]


def test_a_majority_that_was_charged_for_another_release_than_the_runs_is_named(clinics: SumSite) -> None:
    job, honest = configure(clinics.site.settings), clinics.train()
    assert honest.spending is not None
    event = honest.spending.event
    for other in (
        event.having(clip_norm=0.5 * event.clip_norm),
        event.having(noise_multiplier=1.01 * event.noise_multiplier),
        event.having(honest_sites=1.0),
    ):
        lying = replace(honest, spending=replace(honest.spending, event=other))
        assert set(other_releases(job, {0: lying, 1: honest, 2: lying})) == {0, 2}
    assert not other_releases(job, {0: honest, 1: honest})
