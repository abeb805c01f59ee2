"""Runs whose server sees a sum and no part of it: what it gets, what a site refuses, what both prices are."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from summed_runs import SUMMED, last_adapter, no_noise, releases, spent
from typer.testing import CliRunner

from audits.faults import zero_noise
from audits.sum_site import SumSite
from faults.faulty_server import lying
from faults.sum_scenarios import SERVER_LIES, wrong_after_a_lie
from fedveil.cli.main import app
from fedveil.client import app as client_app
from fedveil.client import sums
from fedveil.common.config.flat import Scalar
from fedveil.common.errors import ConfigError
from fedveil.common.messages.round import KeyTask, Refusal
from fedveil.common.messages.state import HEAD
from fedveil.common.messages.wire import encode_task
from fedveil.common.run_lines import ResultFile, RoundLine, read_file, read_lines
from fedveil.experiments.in_process import InProcessTransport, run_in_process
from fedveil.privacy import dpsgd
from fedveil.privacy.events import sampled_gaussian
from fedveil.privacy.figures import epsilon_text
from fedveil.privacy.privacy_filter import promised
from fedveil.privacy.secure_sum import Identity, Roster, noise_share, rounding
from fedveil.reports import markdown_report, report_of
from fedveil.server import checkpoint
from fedveil.server.collect import masked_sum
from fedveil.strategies.job import configure

pytestmark = [pytest.mark.rough_prices, pytest.mark.one_length]


# --- what the server gets ---------------------------------------------------------------------------------------------
HEAD_LAST: dict[str, Any] = {"rounds": 3, "phases": "2 adapter on jacobians, 1 head on features"}


HEAD_FIRST = "2 head on features, 2 adapter on jacobians, 1 head on features"


@pytest.mark.parametrize("phases", [{}, HEAD_LAST, {"rounds": 5, "phases": HEAD_FIRST}])
def test_without_noise_a_round_is_that_of_plain_uploads(
    summed: dict[str, Any], phases: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounding, "add_private_noise", no_noise)
    monkeypatch.setattr(dpsgd, "add_private_noise", zero_noise)
    same = {**summed, **phases, "training.sample-rate": 1.0, "max-share": 1.0, "max-update-norm": 1e9}
    masked = run_in_process(same, 4, run="sum")
    plain = {**same, "privacy.mode": "dp-sgd", "privacy.honest-sites": 0}
    wanted = last_adapter(run_in_process(plain, 4, run="plain"))
    begun = run_in_process({**plain, "training.learning-rate": 1e-9}, 4, run="start")
    start = last_adapter(begun)
    moved = float((wanted - start).norm())
    assert float((last_adapter(masked) - wanted).norm()) < 1e-3 * moved  # the grid is a thousandth of the noise


def test_a_run_ends_in_a_report_with_both_prices(summed: dict[str, Any]) -> None:
    folder = run_in_process(summed, 4)
    assert spent(folder) == {f"site-{i}": [(1, "summed-gaussian"), (2, "summed-gaussian")] for i in range(4)}
    report = report_of(folder)
    assert [site.agreement for site in report.sites] == ["agrees"] * 4
    reached = read_file(ResultFile, folder).reached
    assert reached is not None
    assert (reached.epsilon, reached.honest_sites) == (report.headline.epsilon, 2)
    share = noise_share(2.0, 1.0, 2)
    bare = promised([dataclasses.replace(r, event=sampled_gaussian(share, 0.25)) for r in releases(folder)], 1e-3)[0]
    assert report.sites[0].epsilon_alone == pytest.approx(bare, abs=1e-6)
    assert report.sites[0].epsilon_worst is not None
    assert bare > 1.3 * report.sites[0].epsilon_worst
    assert (
        "as long as 2 sites of each sum are honest (h = 2). The sums of this run that counted cost, at the same δ, "
        f"if no other site adds its noise, or the masks fail (alone): ε {epsilon_text(bare)}; if 3 sites of each "
        "sum are honest (h = 3): ε" in report.claim.sentence
    )
    assert "if all 4 sites of each sum are honest (h = 4): ε" in report.claim.sentence
    told_by_report = markdown_report(folder)
    assert "second price" in told_by_report
    assert "A person with several records at one site or at several of one sum has a larger ε" in told_by_report
    told = [json.loads(line)["message"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert sum("worst site, h = 2)" in line for line in told) == 2
    assert not [line for line in told if "ε" in line and "h = 2" not in line]
    ledger = str(folder / "ledgers" / "site-0.sqlite")
    alone = f"if no other site adds its noise to a sum (alone): ε {epsilon_text(bare, decimals=4)}"
    for words in (["show", ledger], ["remaining", ledger, "--dataset", "site-0", "--epsilon", "40"]):
        headline = CliRunner().invoke(app, ["ledger", *words]).output.splitlines()[0]
        assert f", counting on h = 2 honest sites of each sum; {alone}" in headline


@pytest.mark.parametrize(("honest", "colluders", "lost"), [(1, 2, False), (2, 1, False), (2, 1, True)])
def test_a_report_says_what_the_sums_cost_if_all_their_sites_are_honest(
    honest: int, colluders: int, lost: bool, summed: dict[str, Any]
) -> None:
    """By the round with fewest sites: where one of four is lost, three add noise."""

    class Losing(InProcessTransport):
        def nodes(self, wanted: int, besides: Any) -> list[int]:
            return super().nodes(wanted, besides)[: 3 if lost else 4]

    own = {"privacy.honest-sites": honest, "privacy.colluders": colluders}
    folder = run_in_process({**summed, **own}, 4, kind=Losing)
    sites, report = 3 if lost else 4, report_of(folder)
    noise = 2.0 * (sites / honest) ** 0.5
    wanted = promised([dataclasses.replace(r, event=sampled_gaussian(noise, 0.25)) for r in releases(folder)], 1e-3)[0]
    found = report.sites[0]
    assert found.epsilon_all_honest == pytest.approx(wanted, abs=1e-6)
    assert found.epsilon_recomputed is not None
    assert wanted < found.epsilon_recomputed
    assert (
        f"if all {sites} sites of each sum are honest (h = {sites}): ε {epsilon_text(wanted)}" in report.claim.sentence
    )
    assert ("That holds whatever other sites do (h = 1)" in report.claim.sentence) == (honest == 1)
    if honest == 1:
        assert found.epsilon_alone == pytest.approx(found.epsilon_recomputed, abs=1e-3)
        assert "if no other site" not in report.claim.sentence.lower()


def test_a_round_0_that_sums_nothing_is_no_sum_of_no_sites(summed: dict[str, Any]) -> None:
    folder = run_in_process(summed, 4)
    wanted = report_of(folder).sites[0].epsilon_all_honest
    path = folder / RoundLine.NAME
    begun = {**json.loads(path.read_text().splitlines()[0]), "round": 0, "participants": []}
    path.write_text(f"{json.dumps(begun)}\n{path.read_text()}")
    assert wanted is not None
    assert report_of(folder).sites[0].epsilon_all_honest == wanted
    assert "if all 4 sites of each sum are honest" in report_of(folder).claim.sentence


def test_a_sum_has_no_noise_of_what_rests(summed: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    seen, read = list[tuple[int, int]](), masked_sum.total

    def spy(vectors: Any, std: float) -> torch.Tensor:
        found = read(vectors, std)
        seen.append((len(seen) + 1, found.numel()))
        return found

    monkeypatch.setattr(masked_sum, "total", spy)
    folder = run_in_process(
        {**summed, "rounds": 4, "phases": "1 head on features, 2 adapter on jacobians, 1 head on features"}, 4
    )
    state = checkpoint._read(folder / checkpoint.NAME)[1]
    trained = {k: sum(t.numel() for n, t in fs.items() if state.trains(k, n)) for k, fs in state.adapter.items()}
    head, below = trained.pop(HEAD), sum(trained.values())
    assert head
    assert seen == [(1, head), (2, below), (3, below), (4, head)]


def test_a_key_is_given_for_the_run_of_the_message_alone(clinics: SumSite) -> None:
    """The budget of the run that the task names would be asked, by the settings of the one that the message is in."""
    own = clinics.site
    reply = client_app.answer(encode_task(KeyTask("2", 1, 0)), own.node, own.settings, "1", own.memory)
    assert isinstance(reply, Refusal)
    assert (reply.kind, "or of another run" in reply.reason) == ("task", True)
    assert not own.memory


def test_a_plain_run_takes_no_keys(clinics: SumSite) -> None:
    task = clinics.task()
    clinics.site.settings |= {"privacy.mode": "dp-sgd", "privacy.honest-sites": 0}
    clinics.refuse(task, "keys of a secure sum, or lacks them")
    reply = clinics.key()
    assert isinstance(reply, Refusal)
    assert "not summed" in reply.reason


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"honest_sites": 1}, "honest-sites"),
        ({"honest_sites": None, "peers": None, "epsilon_alone": None}, "honest-sites"),
        ({"honest_sites": None, "mechanisms": ["dp-sgd"]}, "mechanisms = dp-sgd; the run asks"),
        ({"min_noise_multiplier": 2.5}, "min-noise-multiplier"),
        ({"peers": "nowhere.toml"}, "cannot be read"),
    ],
)
def test_a_stewards_rules_hold_before_a_key_is_made(rules: dict[str, Any], words: str, clinics: SumSite) -> None:
    clinics.rule(**rules)
    reply = clinics.key()
    assert isinstance(reply, Refusal)
    assert words in reply.reason
    assert not clinics.site.memory


def test_a_server_that_chooses_the_sites_which_need_not_be_honest_is_refused(clinics: SumSite) -> None:
    """With privacy.colluders = 0 of the server's, three sites of five would do; two of them need not be honest."""
    folder = clinics.site.ledger.parent
    more = {name: Identity.new().public for name in ("east", "west")}
    (folder / "peers.toml").write_text(Roster({**clinics.roster.keys, **more}).text())
    clinics.roster = Roster({**clinics.roster.keys, **more})
    clinics.site.settings |= {"privacy.honest-sites": 3, "privacy.colluders": 0}
    clinics.rule(honest_sites=3)
    clinics.refuse(clinics.task(), "of a sum of 3 sites, of which 2 need not be honest")
    clinics.site.settings |= {"privacy.honest-sites": 2, "privacy.colluders": 1}
    clinics.refuse(clinics.task(), "of a sum of 3 sites, of which 2 need not be honest")
    clinics.rule(honest_sites=4)
    assert clinics.train().words
    # The planted fault: a site that believes the run's colluders.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sums.Party, "check_size", lambda *own: None)
        clinics.rule(honest_sites=3)
        assert clinics.train(2).words, "the refusal is another's"


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"epsilon_alone": None}, "honest-sites lets"),
        ({"peers": None}, "honest-sites lets"),
        ({"peers_hash": None}, "peers-hash are needed"),
        ({"peers_hash": "ab12"}, "give all 64 digits"),
        ({"peers_hash": "Z" * 64}, "give all 64 digits"),
        ({"epsilon_alone": 0.0}, "epsilon-alone must be above 0"),
        ({"mechanisms": ["dp-sgd"]}, "mechanisms does not allow: add 'secure-sum'"),
    ],
)
def test_a_policy_that_lets_a_site_join_by_halves_is_none(rules: dict[str, Any], words: str, clinics: SumSite) -> None:
    from fedveil.client.policy_file import load_policy

    clinics.rule(**rules)
    with pytest.raises(ConfigError, match=words):
        load_policy(clinics.site.ledger.with_name("policy.toml"))


def test_a_site_whose_roster_is_another_has_no_part(clinics: SumSite) -> None:
    folder = clinics.site.ledger.parent
    others = {**clinics.roster.keys, "north": Identity.new().public}

    def agree_on(roster: Roster) -> None:
        (folder / "peers.toml").write_text(roster.text())
        clinics.rule(peers_hash=roster.digest)

    agree_on(Roster(others))
    task = clinics.task()
    clinics.refuse(task, "'north' is not signed by that site")
    agree_on(Roster({**others, "clinic": Identity.new().public}))
    assert "another signing key" in clinics.key().reason
    del others["clinic"]
    agree_on(Roster({**others, "west": Identity.new().public}))
    assert "does not have 'clinic'" in clinics.key().reason
    clinics.site.node.pop("identity")
    assert "needs 'identity'" in clinics.key().reason


# --- settings ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"privacy.honest-sites": 0}, "needs privacy.honest-sites"),
        ({"privacy.honest-sites": 1, "privacy.colluders": 1}, "ask for 2 sites in a sum, which needs 3"),
        ({"training.local-steps": 2}, "is one sum of clipped gradients"),
        ({"training.optimizer": "adam"}, "because a round is one sum"),
        ({"training.weight-decay": 0.1}, "because a round is one sum"),
        ({"privacy.mode": "dp-sgd"}, "is noise shared"),
        ({"privacy.mode": "none"}, "is noise shared"),
        (
            {"adapter.start": "probe", "adapter.name": "lora-metric"},
            "a release of its own.*nobody sees more than a sum",
        ),
        ({"adapter.start": "dp-gradient", "strategy": "fed-sb"}, "a release of its own.*nobody sees more"),
        ({"adapter.start": "nonprivate-gradient"}, "sends raw gradients of private records"),
    ],
)
def test_a_run_that_is_no_sum_of_clipped_gradients_is_refused(wrong: dict[str, Scalar], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        configure({**SUMMED, **wrong})


def test_the_promise_names_those_on_whom_it_rests() -> None:
    job = configure(SUMMED)
    promise = job.mechanism.promise
    assert "as long as 2 sites of each sum are honest (h = 2)" in promise(job.config.privacy)
    assert "whatever other sites do (h = 1)" in promise(replace(job.config.privacy, honest_sites=1))


def test_a_lying_server_is_refused_or_gets_no_sum_and_no_second_vector(summed: dict[str, Any]) -> None:
    """The lies of ``make faults`` in one process: in each the second attempt, which is honest, counts."""
    names = list(SERVER_LIES)

    class Lying(InProcessTransport):
        exchange = lying(InProcessTransport.exchange, lambda number: names[number - 1])  # type: ignore[assignment]

    folder = run_in_process({**summed, "rounds": len(names), "round-retries": 1}, 3, kind=Lying)
    lines, paid = read_lines(RoundLine, folder), Counter(n for rows in spent(folder).values() for n, _ in rows)
    for line, name in zip(lines, names, strict=True):
        told = SERVER_LIES[name]
        assert wrong_after_a_lie(told, line, paid[line.round_number]) == []
        assert wrong_after_a_lie(told, replace(line, attempts=3), paid[line.round_number])
        assert wrong_after_a_lie(told, line, 1)
