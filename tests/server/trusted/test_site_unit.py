"""A whole site as the unit, with a trusted server: what one site can move, what is noised, paid for, and given away."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from site_runs import CLIP, COHORT_SIZE, SITE, World, trusting, update
from typer.testing import CliRunner

from audits.site_rounds import sampler_faults
from audits.tiny_site import OneSite
from audits.whole_sites import MadeUp, Sent, flat
from fedveil.cli.ledger_words import ASKED
from fedveil.cli.main import app
from fedveil.client.ledger.ledger import Ledger
from fedveil.client.policy import Policy
from fedveil.common.errors import ConfigError
from fedveil.common.messages.blocks import rounded
from fedveil.common.messages.round import Refusal, Spending, Task, TrainResult
from fedveil.common.messages.state import HEAD, AdapterState
from fedveil.common.messages.tensors import apply, entries, l2_norm, subtract
from fedveil.common.run_lines import COHORT, PrivacyLine, ResultFile, read_file, read_lines
from fedveil.deploy.doctor import _mechanisms
from fedveil.deploy.policy_file import mechanisms_of_job, policy_text
from fedveil.deploy.site_folder import SiteFolder
from fedveil.experiments.in_process import InProcessTransport, run_in_process
from fedveil.experiments.planner.find import find
from fedveil.experiments.planner.price import priced_rounds, rounds_within, site_plans
from fedveil.experiments.simulate import simulate
from fedveil.privacy.accounting import Release
from fedveil.privacy.client_level import ClippedPlan
from fedveil.privacy.events import sampled_gaussian
from fedveil.privacy.privacy_filter import promised
from fedveil.privacy.randomness import add_private_noise
from fedveil.reports import report_of
from fedveil.server.collect.base import Collected
from fedveil.server.collect.trusted import TrustedCollector
from fedveil.server.ledger import ServerLedger
from fedveil.strategies import STRATEGIES, Average, ServerState
from fedveil.strategies.job import configure

pytestmark = pytest.mark.one_length


def filled(received: AdapterState, value: float) -> TrainResult:
    return TrainResult("1", 1, "liar", 1, apply(lambda tensor: torch.full_like(tensor, value), received), None)


def charged(got: Collected) -> Spending:
    (paid,) = got.paid
    assert paid.spending is not None
    return paid.spending


@contextmanager
def without_noise() -> Iterator[None]:
    with patch("fedveil.server.collect.trusted.add_private_noise", lambda total, std: total.double()):
        yield


# --- settings ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"privacy.unit": "record"}, "does not protect a record: set privacy.unit to 'site'"),
        ({"privacy.mode": "dp-sgd", "privacy.cohort": 0}, "does not protect a site"),
        ({"privacy.mode": "secure-sum", "privacy.honest-sites": 3, "privacy.cohort": 0}, "does not protect a site"),
        ({"privacy.cohort": 0}, "needs privacy.cohort"),
        ({"privacy.honest-sites": 3}, "is noise shared"),
        ({"privacy.drop-outs": 1}, "is a sum lost"),
        ({"min-sites": 9}, "more than privacy.cohort"),
        ({"privacy.delta": 0.2}, "above 1/8 of the cohort's sites"),
        ({"privacy.site-rate": 0.0}, "privacy.site-rate"),
        ({"server.most-noise": 5.0}, "needs server.most-noise 0.0"),
        (
            {"training.local-steps": 1, "training.optimizer": "sgd", "server.rule": "loraprune"},
            "score gradients without noise of their sites",
        ),
        ({"strategy": "fedex-lora"}, "no strategy is given more than a sum"),
        ({"strategy": "fed-sb", "adapter.start": "dp-gradient"}, "alone pays for: use 'public-gradient'"),
    ],
)
def test_settings_that_do_not_fit_are_an_error(settings: dict[str, Any], values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)) as caught:
        configure({**settings, **values})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["privacy.cohort", "privacy.site-rate", "privacy.ledger"])
def test_what_says_something_of_a_cohort_alone_is_refused_elsewhere(key: str) -> None:
    value = {"privacy.cohort": 5, "privacy.site-rate": 0.5, "privacy.ledger": "x.json"}[key]
    for mode in ({}, {"privacy.mode": "none"}):
        with pytest.raises(ConfigError, match=f"needs {key} .*because only in 'client-level'"):
            configure({**mode, key: value})


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_runs_with_a_trusted_server_if_its_table_says_so(name: str) -> None:
    own = {"privacy.cohort": 20, "strategy": name, "training.optimizer": "sgd", "training.local-steps": 1}
    refused = False
    try:
        configure({**SITE, **own})
    except ConfigError as error:
        refused = "than a sum" in str(error) or "privacy.mode" in str(error)
    assert refused != issubclass(STRATEGIES[name], Average)


# --- one site moves the sum by its clip, whatever it sends ------------------------------------------------------------
def in_bfloat16(result: TrainResult, received: AdapterState) -> TrainResult:
    """Return a result as it arrives in a run of ``wire.precision = "bfloat16"``."""
    change = rounded(subtract(result.contribution, received), "bfloat16")
    return replace(result, contribution=change, precision="bfloat16")


ARBITRARY: dict[str, Sent] = {
    "honest and long": lambda node, received: update(node, received, 50.0),
    "zeros": lambda node, received: filled(received, 0.0),
    "huge": lambda node, received: filled(received, 3e38),
    "infinite": lambda node, received: filled(received, math.inf),
    "not a number": lambda node, received: filled(received, math.nan),
    "nothing": lambda node, received: TrainResult("1", 1, "liar", 1, {}, None),
    "another shape": lambda node, received: replace(
        update(node, received), contribution=apply(lambda tensor: torch.ones(2, 2), received)
    ),
    "another's name and a large size": lambda node, received: replace(
        update(node, received, 9.0), site="site-2", public_size=10**9
    ),
    "rounded and long": lambda node, received: in_bfloat16(update(node, received, 50.0), received),
    "a refusal": lambda node, received: Refusal("1", 1, "liar", "failed", "no"),
    "late": lambda node, received: Refusal("1", 1, "node 5", "late", "no answer"),
}


ZERO = ("zeros", "infinite", "not a number", "nothing", "another shape", "a refusal", "late")
"""Of which the contribution is that of no site, but zeros' own, which are a change as any other."""


def most_moved(world: World, sent: Sent) -> float:
    """Return how far one site moves the mean before its noise, over the clip by the public divisor."""
    with without_noise():
        others = flat(world.mean(lambda node, received: update(node, received, 1.0 + node), COHORT_SIZE - 1))
        last = COHORT_SIZE - 1
        both = flat(world.mean(lambda n, r: sent(n, r) if n == last else update(n, r, 1.0 + n)))
    return float((both - others).norm()) * COHORT_SIZE / CLIP


@pytest.mark.parametrize("kind", ARBITRARY)
def test_one_site_moves_the_mean_by_at_most_its_clip(world: World, kind: str) -> None:
    moved = most_moved(world, ARBITRARY[kind])
    assert moved <= 1 + 1e-9
    if kind in ZERO[1:]:
        assert moved == 0, "what is no update counts as zero"
    if kind in ("honest and long", "rounded and long", "huge"):
        assert moved == pytest.approx(1), "a long update counts with its clip"


def test_a_server_that_does_not_clip_again_or_divides_by_replies_is_found(world: World) -> None:
    long = ARBITRARY["honest and long"]
    with patch("fedveil.server.collect.trusted.clipped", lambda change, clip: change):
        assert most_moved(world, long) > 2
    real = TrustedCollector._mean

    def by_replies(sites: TrustedCollector, results: Any, number: int, state: ServerState) -> Any:
        held = list(results)
        mean = real(sites, iter(held), number, state)
        return replace(mean, change=apply(lambda t: t * COHORT_SIZE / max(1, len(held)), mean.change))

    with patch.object(TrustedCollector, "_mean", by_replies):
        assert most_moved(world, ARBITRARY["zeros"]) > 0.1


@pytest.mark.parametrize("value", [1.0, 3e38, math.nan, math.inf])
def test_a_site_sends_a_change_no_longer_than_the_clip(value: float) -> None:
    received: AdapterState = {"layer": {"A": torch.zeros(3, 2), "B": torch.full((2, 3), 0.25)}}
    sent = apply(lambda tensor: tensor + value, received)
    out = ClippedPlan(0.5, 0, CLIP).outgoing(sent, received)
    assert l2_norm(subtract(out, received)) <= CLIP * (1 + 1e-6)
    if not math.isfinite(value):
        assert flat(subtract(out, received)).abs().sum() == 0


def test_the_mean_is_that_of_a_slow_reference_whatever_sizes_are_said(world: World) -> None:
    """Lengths below and above the clip, layers that are not square, three sites that never answer."""
    lengths = [0.2, 0.9, 1.0, 3.0, 40.0]
    received = world.job.strategy.downlink(world.state)
    wanted = torch.zeros_like(flat(received))
    for node, length in enumerate(lengths):
        own = flat(update(node, received, length).contribution) - flat(received)
        norm = math.sqrt(math.fsum(float(x) ** 2 for x in own))
        wanted += own * min(1.0, CLIP / norm)
    with without_noise():
        found = flat(world.mean(lambda node, r: update(node, r, lengths[node]), len(lengths)))
    assert torch.allclose(found, wanted / COHORT_SIZE, rtol=1e-12, atol=1e-18)


def test_at_a_rate_below_1_divisor_noise_and_bytes_are_those_of_the_usual_draw(
    settings: dict[str, Any], world: World
) -> None:
    part = replace(world, job=configure({**settings, "privacy.site-rate": 0.25}))
    with without_noise():
        whole, fewer = (flat(one.mean(update)) for one in (world, part))
    assert torch.allclose(fewer, 4 * whole, rtol=1e-12, atol=1e-18)
    of_all, of_some = (
        one.sites(MadeUp(update, COHORT_SIZE), k).collect(1, one.state) for one, k in ((world, "1"), (part, "2"))
    )
    assert of_some.averaged[0].noise == pytest.approx(2.0 * CLIP / (0.25 * COHORT_SIZE))
    assert (4 * of_some.bytes_down, 4 * of_some.bytes_up) == (of_all.bytes_down, of_all.bytes_up)


def test_what_goes_on_to_the_strategy_is_the_state_moved_by_the_mean(world: World) -> None:
    with without_noise():
        mean = world.mean(update)
        got = world.sites(MadeUp(update, COHORT_SIZE)).collect(1, world.state)
    assert got.results == got.refusals == {}
    assert got.failures == []
    (one,) = got.averaged
    after = world.job.strategy.server_update(world.state, [one])
    for layer, factors in mean.items():
        for name, moved in factors.items():
            wanted = (world.state.adapter[layer][name].double() + moved).float()
            assert torch.equal(after.adapter[layer][name], wanted)


# --- the noise --------------------------------------------------------------------------------------------------------
def noise_ratio(world: World, times: int = 40) -> float:
    """Return the standard deviation of the noise in the mean over what is priced."""
    plan = world.sites(MadeUp(update, COHORT_SIZE))._plan
    drawn = torch.cat([flat(world.mean(update, 0)) for _ in range(times)])
    assert len(drawn) > 5_000
    return float(drawn.square().mean().sqrt()) / (plan.event.noise_multiplier * CLIP / COHORT_SIZE)


def test_the_mean_carries_the_noise_that_is_priced_also_when_nobody_answers(world: World) -> None:
    assert noise_ratio(world) == pytest.approx(1, abs=0.03)
    got = world.sites(MadeUp(update, COHORT_SIZE)).collect(1, world.state)
    assert charged(got).event == sampled_gaussian(2.0, 1.0, CLIP)
    assert got.averaged[0].noise == pytest.approx(2.0 * CLIP / COHORT_SIZE)


def test_halved_noise_is_found(world: World) -> None:
    with patch(
        "fedveil.server.collect.trusted.add_private_noise", lambda total, std: add_private_noise(total, std / 2)
    ):
        assert noise_ratio(world) == pytest.approx(0.5, abs=0.03)


def test_what_rests_in_a_round_gets_no_noise(settings: dict[str, Any], world: World) -> None:
    resting = replace(
        world, job=configure({**settings, "rounds": 2, "phases": "1 adapter+head on examples, 1 head on features"})
    )
    sites = resting.sites(MadeUp(update, COHORT_SIZE))
    for number, rests in ((1, False), (2, True)):
        (one,) = sites.collect(number, replace(world.state, round_number=number - 1)).averaged
        for layer, name, tensor in entries(one.state):
            same = torch.equal(tensor, world.state.adapter[layer][name])
            assert same == (rests and layer != HEAD), "noise on what rests, or none on what moves"


# --- who is drawn -----------------------------------------------------------------------------------------------------
def drawn_at(settings: dict[str, Any], world: World, rate: float, rounds: int = 250) -> set[Any]:
    """Return what is wrong with who is asked, by the audit's tests on samplers."""
    job = configure({**settings, "privacy.site-rate": rate, "privacy.cohort": 60, "privacy.epsilon": 1e6})
    transport = MadeUp(lambda node, received: Refusal("1", 1, "x", "failed", "no"), 60)
    sites = trusting(job, transport, world.model)
    table = torch.zeros(rounds, 60, dtype=torch.float64)
    free = sampled_gaussian(2.0, rate, CLIP)
    with (
        patch.object(ServerLedger, "charge", lambda *_: None),
        patch("fedveil.server.collect.trusted.add_private_noise", lambda total, std: total),
    ):
        for row in table:
            before = len(transport.asked)
            sites.collect(1, world.state)
            row[[node for asked in transport.asked[before:] for node in asked]] = 1.0
    assert sites._plan.event == free.having(sample_rate=rate)
    return sampler_faults(table, rate)


def test_sites_are_drawn_by_poisson_at_the_rate_that_is_priced(settings: dict[str, Any], world: World) -> None:
    assert drawn_at(settings, world, 0.3) == set()


def test_a_draw_of_a_fixed_number_is_found(settings: dict[str, Any], world: World) -> None:
    with patch(
        "fedveil.server.collect.trusted.private_poisson_sample",
        lambda size, rate: torch.randperm(size)[: round(rate * size)],
    ):
        assert drawn_at(settings, world, 0.3) != set()


def test_who_fails_is_not_asked_again_and_the_divisor_stays(settings: dict[str, Any], world: World) -> None:
    """A second draw after the first one's replies would be no Poisson draw."""
    transport = MadeUp(lambda node, received: Refusal("1", 1, "x", "failed", "no"), COHORT_SIZE)
    got = world.sites(transport).collect(1, world.state)
    assert transport.asked == [list(range(COHORT_SIZE))]
    assert got.counts
    assert got.averaged[0].noise == pytest.approx(2.0 * CLIP / COHORT_SIZE)


def test_one_node_a_registered_name_is_asked_and_no_other(world: World) -> None:
    names = {0: "north", 1: "south", 3: "north"}
    transport = MadeUp(update, COHORT_SIZE, names)
    world.sites(transport).collect(1, world.state)
    assert transport.asked == [[3, 1]]


@pytest.mark.parametrize(("count", "words"), [(0, "are needed for min-sites"), (9, "more than privacy.cohort")])
def test_a_round_with_too_few_or_too_many_nodes_is_neither_charged_nor_sent(
    world: World, count: int, words: str
) -> None:
    transport = MadeUp(update, count)
    sites = world.sites(transport)
    got = sites.collect(1, world.state)
    assert not got.counts
    assert words in got.failures[0].reason
    assert transport.asked == []
    assert sites._ledger.charges() == []


def test_a_policy_that_does_not_name_it_refuses(site: OneSite) -> None:
    for rules in (
        {"mechanisms": None},
        {"mechanisms": ["dp-sgd", "secure-sum"]},
        {"mechanisms": None, "allow_no_privacy": True},
    ):
        site.rule(**rules)
        reply = site.refuse(1)
        assert reply.kind == "policy"
        assert "privacy.mode = 'client-level', in which no record is protected from the server" in reply.reason
    with Ledger(site.ledger) as ledger:
        assert ledger.exposures() == []


def test_a_policy_that_is_made_from_a_job_does_not_let_it_in(settings: dict[str, Any]) -> None:
    assert mechanisms_of_job(configure(settings).config) == ["dp-sgd"]


def test_a_policy_that_asks_for_the_site_s_own_noise_refuses(site: OneSite) -> None:
    site.rule(mechanisms=["client-level"], min_noise_multiplier=0.5)
    assert "min-noise-multiplier = 0.5" in site.refuse(1).reason


def test_a_round_is_written_down_as_one_without_privacy_and_closes_the_records(site: OneSite) -> None:
    sent = site.train(1)
    received = site.task().state
    assert sent.spending is None
    assert sent.public_size == 1
    assert sent.noised_correct is None
    assert 0 < l2_norm(subtract(sent.contribution, received)) <= CLIP * (1 + 1e-6)
    with Ledger(site.ledger) as ledger:
        assert [(one.run, one.round_number, one.steps) for one in ledger.exposures()] == [("1", 1, 2)]
    with Ledger(site.ledger) as ledger:
        (name,) = {one.dataset for one in ledger.exposures()}
    said = CliRunner().invoke(app, ["ledger", "receipt", str(site.ledger), "--dataset", name, "--run", "1"])
    assert (said.exit_code, ASKED in said.output) == (0, True), "a receipt tells when this site was drawn"
    for key in ("privacy.mode", "privacy.unit", "privacy.cohort"):
        del site.settings[key]
    site.rule(mechanisms=["dp-sgd"])
    assert "were released without privacy before" in site.refuse(1, run="later").reason


def test_a_site_s_budget_is_of_records_or_persons(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unit is 'site'"):
        Policy(unit="site")
    assert "no record is protected from it" in policy_text("clinic", 2000, 4.0, 1e-5, mechanisms=["client-level"])
    assert "no record is protected from it" not in policy_text("clinic", 2000, 4.0, 1e-5)


def test_the_doctor_says_that_no_record_is_protected_from_the_server(site: OneSite) -> None:
    with patch("fedveil.deploy.doctor.node_settings", lambda folder: site.node):
        (told,) = _mechanisms(SiteFolder(site.ledger.parent, "clinic", "host:1"))
    assert told.found == "runs of client-level; in those of client-level no record is protected from the server"


# --- before a run, and at scale ---------------------------------------------------------------------------------------
def test_a_plan_is_priced_by_rounds_and_not_by_steps(settings: dict[str, Any]) -> None:
    job = configure({**settings, "privacy.noise-multiplier": 0.0, "privacy.epsilon": 4.0, "rounds": 5})
    (plan, *_) = site_plans(job, [30] * COHORT_SIZE)
    found = find(job, "noise").value
    assert plan.event.noise_multiplier == pytest.approx(found, rel=2e-3)
    assert [one.steps for one in priced_rounds(job, plan)] == [1, 2, 3, 4, 5]
    assert priced_rounds(job, plan)[-1].epsilon == promised([Release(plan.event, 5)], 1e-3)[0] <= 4.0
    assert rounds_within(job, plan) == 5
    assert plan.expected_batch_size == COHORT_SIZE


@pytest.mark.parametrize("rate", [0.4, 1.0])
def test_plan_ledger_and_report_have_one_price_of_a_first_run(settings: dict[str, Any], rate: float) -> None:
    job = configure({**settings, "privacy.site-rate": rate})
    told = [one.epsilon for one in priced_rounds(job, site_plans(job, [30] * COHORT_SIZE)[0])]
    folder = run_in_process({**settings, "privacy.site-rate": rate}, 2)
    lines = read_lines(PrivacyLine, folder)
    assert [line.spent and line.spent.epsilon_total for line in lines] == told
    (row,) = report_of(folder).sites
    assert (row.epsilon_total, row.agreement) == (told[-1], "agrees")
    assert report_of(folder).headline.epsilon == told[-1]


def test_a_simulation_of_more_sites_than_the_cohort_is_not_begun(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"9 sites are more than privacy\.cohort, which is 8"):
        simulate(settings, COHORT_SIZE + 1, lambda _: None)


def test_two_hundred_sites_train_together(settings: dict[str, Any], tmp_path: Path) -> None:
    """A tenth of them a round, so that each round is amplified, and some fail every time."""
    from audits.tiny_models import write_reviews

    class Flaky(InProcessTransport):
        def deliver(self, node: int, task: Task, content: Any) -> Any:
            return super().deliver(node, task, type(content)() if node % 10 == 0 else content)

    many = {"data.name": str(write_reviews(tmp_path / "many.csv", 440)), "privacy.cohort": 200, "rounds": 3}
    many |= {"privacy.site-rate": 0.1, "privacy.noise-multiplier": 1.0}
    folder = run_in_process({**settings, **many}, 200, kind=Flaky)
    lines = read_lines(PrivacyLine, folder)
    assert [(line.site, line.public_size) for line in lines] == [(COHORT, 200)] * 3
    assert lines[-1].spent is not None
    assert lines[-1].spent.epsilon_total == promised([Release(sampled_gaussian(1.0, 0.1), 3)], 1e-3)[0] < 1.7
    assert read_file(ResultFile, folder).status == "completed"
    report = report_of(folder)
    assert report.headline.sites == 200
    assert report.claim.gaps == [] or "public" in report.claim.gaps[0]
