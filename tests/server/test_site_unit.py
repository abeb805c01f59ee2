"""A whole site as the unit, with a trusted server: what one site can move, what is noised, paid for, and given away."""

from __future__ import annotations

import math
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, tzinfo
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import pytest
import torch
from markupsafe import escape
from safetensors import safe_open
from typer.testing import CliRunner

from audits.site_rounds import sampler_faults
from audits.tiny_site import OneSite, clinic
from audits.whole_sites import MadeUp, Sent, flat
from fedveil.cli.ledger import ASKED
from fedveil.cli.main import app
from fedveil.cli.report import print_summary
from fedveil.client.ledger.ledger import Ledger
from fedveil.client.policy import Policy
from fedveil.common.errors import BudgetExhausted, ConfigError, LedgerError, RunFailed
from fedveil.common.messages.round import Refusal, Spending, Task, TrainResult, TrainTask
from fedveil.common.messages.state import HEAD, AdapterState
from fedveil.common.messages.tensors import apply, entries, l2_norm, subtract
from fedveil.common.observers import OBSERVERS
from fedveil.common.run_lines import (
    COHORT,
    Absence,
    PrivacyLine,
    ProgressFile,
    ResultFile,
    RoundLine,
    read_file,
    read_lines,
)
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
from fedveil.privacy.figures import bound_text
from fedveil.privacy.privacy_filter import promised
from fedveil.privacy.randomness import add_private_noise
from fedveil.reports import markdown_report, report_of
from fedveil.reports.claim import UNTOLD
from fedveil.reports.page import to_html
from fedveil.reports.watch import TO_NOBODY, Watched
from fedveil.server.admission import Admission
from fedveil.server.app import FlowerTransport
from fedveil.server.collect.base import Collected
from fedveil.server.collect.door import collector_of, shown_of
from fedveil.server.collect.shown import Shown, ShownOfCohort
from fedveil.server.collect.trusted import TrustedCollector
from fedveil.server.ledger import ServerLedger, with_ledger
from fedveil.server.model import ServerModel
from fedveil.server.records import RunFolder
from fedveil.server.sites import Exchange, Sites
from fedveil.server.terminal import round_line
from fedveil.server.tracking import rounds_of
from fedveil.strategies import STRATEGIES, ServerState
from fedveil.strategies.job import Job, configure

pytestmark = pytest.mark.one_length

SITE = {"privacy.mode": "client-level", "privacy.unit": "site", "privacy.noise-multiplier": 2.0}
CLIP, COHORT_SIZE = 0.5, 8


@pytest.fixture
def settings(toy_settings: dict[str, Any]) -> dict[str, Any]:
    own = {"privacy.cohort": COHORT_SIZE, "privacy.clip-norm": CLIP, "privacy.epsilon": 60.0}
    return {**toy_settings, **SITE, **own, "training.sample-rate": 0.0}


# --- a server whose sites are made up ---------------------------------------------------------------------------------


def trusting(job: Job, transport: MadeUp, model: ServerModel, run: str = "1") -> TrustedCollector:
    collector = collector_of(job, run, transport, model, Admission(job, {}, transport.registered))
    assert isinstance(collector, TrustedCollector)
    return collector


@dataclass
class World:
    """A server at its first round."""

    job: Job
    model: ServerModel
    state: ServerState
    folder: Path

    def sites(self, transport: MadeUp, run: str = "1") -> TrustedCollector:
        return trusting(self.job, transport, self.model, run)

    def mean(self, sent: Sent, count: int = COHORT_SIZE) -> AdapterState:
        """Return the mean change of a round, float64, as it is before the model takes it."""
        transport = MadeUp(sent, count)
        sites = self.sites(transport)
        replies = [sent(node, self.job.strategy.downlink(self.state)) for node in range(count)]
        results = (reply for reply in replies if isinstance(reply, TrainResult))
        return sites._mean(results, 1, self.state).change


@pytest.fixture
def world(settings: dict[str, Any], tmp_path: Path) -> World:
    job = configure(settings)
    model = ServerModel(job)
    return World(job, model, job.start(model.start), tmp_path)


def update(node: int, received: AdapterState, length: float = 1.0) -> TrainResult:
    """Return an honest reply whose change is ``length`` clips long, in a direction of the node's own."""
    draw = torch.Generator().manual_seed(node)
    moved = apply(lambda tensor: torch.randn(tensor.shape, generator=draw, dtype=torch.float64), received)
    factor = length * CLIP / l2_norm(moved)
    state = apply(lambda old, step: (old.double() + factor * step).float(), received, moved)
    return TrainResult("1", 1, f"site-{node}", 10**node, state, None)


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
        ({"privacy.honest-sites": 3}, "no noise is shared"),
        ({"privacy.drop-outs": 1}, "no sum is lost"),
        ({"min-sites": 9}, "more than privacy.cohort"),
        ({"privacy.delta": 0.2}, "above 1/8 of the cohort's sites"),
        ({"privacy.site-rate": 0.0}, "privacy.site-rate"),
        ({"server.most-noise": 5.0}, "server.most-noise is for noise that sites add"),
        ({"server.scores": True}, "server.scores is for noise that sites add"),
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
        with pytest.raises(ConfigError, match=f"^{key} is for a run whose unit is a whole site"):
            configure({**mode, key: value})


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_runs_with_a_trusted_server_if_its_table_says_so(name: str) -> None:
    own = {"privacy.cohort": 20, "strategy": name, "training.optimizer": "sgd", "training.local-steps": 1}
    refused = False
    try:
        configure({**SITE, **own})
    except ConfigError as error:
        refused = "than a sum" in str(error) or "privacy.mode" in str(error)
    assert refused != ("client-level" in STRATEGIES[name].privacy)


# --- one site moves the sum by its clip, whatever it sends ------------------------------------------------------------

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
    if kind in ("honest and long", "huge"):
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


# --- the ledger -------------------------------------------------------------------------------------------------------


def gaussian_delta(epsilon_: float, noise: float) -> float:
    """Return δ of one Gaussian release (Balle and Wang 2018, theorem 8)."""

    def phi(x: float) -> float:
        return 0.5 * math.erfc(-x / math.sqrt(2))

    return phi(0.5 / noise - epsilon_ * noise) - math.exp(epsilon_) * phi(-0.5 / noise - epsilon_ * noise)


def test_the_ledger_says_what_independent_accounts_say(tmp_path: Path) -> None:
    whole, half = ServerLedger(tmp_path / "whole.json", "site"), ServerLedger(tmp_path / "part.json", "site")
    for number in range(1, 5):
        spent = whole.charge("1", number, sampled_gaussian(3.0, 1.0), 1e-4, 50.0)
        part = half.charge("1", number, sampled_gaussian(1.5, 0.2), 1e-4, 50.0)
    # Four Gaussian releases are one at half the noise.
    assert gaussian_delta(spent.epsilon_total, 1.5) <= 1e-4 <= gaussian_delta(spent.epsilon_total - 5e-3, 1.5)
    assert (spent.steps_round, spent.steps_total, spent.epsilon_budget) == (1, 4, 50.0)
    from dp_accounting.pld import common as pld_common
    from dp_accounting.pld import privacy_loss_distribution as pld

    assert pld_common is not None
    one = pld.from_gaussian_mechanism(1.5, sampling_prob=0.2, value_discretization_interval=1e-4)
    assert part.epsilon_total == pytest.approx(one.self_compose(4).get_epsilon_for_delta(0.9e-4), abs=5e-3)


def test_a_charge_that_would_pass_the_budget_is_refused_and_not_written(tmp_path: Path) -> None:
    ledger = ServerLedger(tmp_path / "sites.json", "site")
    first = ledger.charge("a", 1, sampled_gaussian(2.0, 1.0), 1e-3, 2.0)
    with pytest.raises(BudgetExhausted, match="the budget is 2 at delta"):
        ledger.charge("b", 1, sampled_gaussian(2.0, 1.0), 1e-3, 2.0)
    assert len(ledger.charges()) == 1
    assert 1 < first.epsilon_total < 2
    # All is composed at the smallest δ that any of it was charged at.
    later = ledger.charge("b", 1, sampled_gaussian(20.0, 1.0), 1e-2, 60.0)
    assert later.delta == 1e-3


def test_a_rounds_epsilon_is_what_it_adds_and_later_runs_are_held_to_the_smallest_delta(tmp_path: Path) -> None:
    ledger, before = ServerLedger(tmp_path / "sites.json", "site"), 0.0
    for number in range(1, 4):
        spent = ledger.charge("a", number, sampled_gaussian(6.0, 1.0), 1e-3, 60.0)
        assert spent.epsilon_round == pytest.approx(spent.epsilon_total - before, abs=1e-12)
        before = spent.epsilon_total
    ledger.charge("b", 1, sampled_gaussian(9.0, 1.0), 1e-4, 60.0)
    histories = [ledger.history(run) for run in "abc"]
    assert [history.delta for history in histories] == [1e-4] * 3
    assert [len(history.releases) for history in histories] == [0, 3, 4]


def test_a_ledger_that_has_lost_what_another_server_charged_is_refused_once_that_was_read(tmp_path: Path) -> None:
    path, event = tmp_path / "sites.json", sampled_gaussian(6.0, 1.0)
    reader, other = ServerLedger(path, "site"), ServerLedger(path, "site")
    other.charge("a", 1, event, 1e-3, 60.0)
    older = path.read_bytes()
    other.charge("a", 2, event, 1e-3, 60.0)
    assert len(reader.charges()) == 2
    path.write_bytes(older)
    with pytest.raises(LedgerError, match="has 1 charges, and had 2: put back the file"):
        reader.charge("b", 1, event, 1e-3, 60.0)
    assert path.read_bytes() == older


def test_servers_that_share_a_ledger_never_spend_the_same_remainder(tmp_path: Path) -> None:
    path, event, paid = tmp_path / "sites.json", sampled_gaussian(4.0, 1.0), list[float]()
    budget = promised([Release(event, 5)], 1e-3)[0]

    def spend(name: str) -> None:
        ledger = ServerLedger(path, "site")
        for number in range(1, 5):
            try:
                paid.append(ledger.charge(name, number, event, 1e-3, budget).epsilon_total)
            except BudgetExhausted:
                return

    threads = [Thread(target=spend, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paid) == 5 == len(set(paid))
    assert max(paid) == budget


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is damaged"),
        ('{"format": 1', "is damaged"),
        ('{"format": 2, "unit": "site", "charges": [{}], "first_plan": []}', "is damaged"),
        ('{"format": 2, "unit": "record", "charges": [], "first_plan": []}', "is of the unit 'record'"),
        ('{"format": 2, "unit": "site", "charges": []}', "is damaged .the ledger lacks the field 'first_plan'"),
        ('{"format": 1, "unit": "site", "charges": []}', "has format 1.*python -m tools.convert_ledger"),
        ('{"format": true, "unit": "site", "charges": []}', "has format True"),
        (
            '{"format": 2, "unit": "site", "charges": [], "first_plan": [{"event": {"kind": "none"}, "count": 1}]}',
            "is damaged",
        ),
        ('{"format": 3, "unit": "site", "charges": [], "more": 1}', "has format 3"),
    ],
)
def test_a_ledger_that_cannot_be_read_as_it_was_written_is_refused(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "sites.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(LedgerError, match=words):
        ServerLedger(path, "site").charge("1", 1, sampled_gaussian(2.0, 1.0), 1e-3, 9.0)
    assert path.read_text(encoding="utf-8") == content


def test_a_ledger_that_is_put_back_to_an_older_state_is_refused(world: World) -> None:
    sites = world.sites(MadeUp(update, COHORT_SIZE))
    sites.collect(1, world.state)
    older = sites._ledger.path.read_bytes()
    done = replace(world.state, round_number=1)
    sites.collect(2, done)
    sites._ledger.path.write_bytes(older)
    with pytest.raises(LedgerError, match="has 1 charges, and had 2"):
        sites.collect(3, done)
    sites._ledger.path.unlink()
    with pytest.raises(LedgerError, match="has 0 rounds of run '1', which has done 1"):
        world.sites(MadeUp(update, COHORT_SIZE)).collect(2, done)


class Killed(BaseException):
    """What nothing catches: the process is gone."""


PLACES = ("before the charge", "after the charge", "after the noise", "before the checkpoint")


def killed(settings: dict[str, Any], place: str) -> tuple[Path, ServerLedger, int]:
    """Return the folder of a run whose server died in round 2, its ledger, and how many sums were noised by then."""
    noised: list[int] = []
    real_mean, real_charge, real_finished = TrustedCollector._mean, ServerLedger.charge, RunFolder.finished

    def mean(sites: TrustedCollector, results: Any, number: int, state: ServerState) -> Any:
        if (place, number) == ("after the charge", 2):
            raise Killed
        made = real_mean(sites, results, number, state)
        noised.append(number)
        if (place, number) == ("after the noise", 2):
            raise Killed
        return made

    def charge(ledger: ServerLedger, run: str, number: int, *rest: Any) -> Any:
        if (place, number) == ("before the charge", 2):
            raise Killed
        return real_charge(ledger, run, number, *rest)

    def finished(folder: RunFolder, outcome: Any, *rest: Any) -> None:
        if (place, outcome.round_number) == ("before the checkpoint", 2):
            raise Killed
        real_finished(folder, outcome, *rest)

    with ExitStack() as stack:
        stack.enter_context(patch.object(TrustedCollector, "_mean", mean))
        stack.enter_context(patch.object(ServerLedger, "charge", charge))
        stack.enter_context(patch.object(RunFolder, "finished", finished))
        stack.enter_context(pytest.raises(Killed))
        run_in_process(settings, 2, "1")
    folder = Path(settings["output"]) / "ffa-lora-1"
    return folder, ServerLedger(folder / "ledgers" / "server.json", "site"), len(noised)


@pytest.mark.parametrize("place", PLACES)
def test_a_server_that_is_killed_has_charged_for_all_that_it_noised(settings: dict[str, Any], place: str) -> None:
    """What is resumed is charged again, and the total is of every charge."""
    folder, ledger, noised = killed(settings, place)
    before = len(ledger.charges())
    assert before == (1 if place == "before the charge" else 2) >= noised
    run_in_process({**settings, "resume": str(folder)}, 2)
    charges = ledger.charges()
    assert [one.round_number for one in charges] == [1, 2, 2][: before + 1]
    lines = read_lines(PrivacyLine, folder)
    assert [line.round_number for line in lines] == [1, 2]
    total = promised([Release(one.event, 1) for one in charges], 1e-3)[0]
    assert lines[-1].spent is not None
    assert lines[-1].spent.epsilon_total == total
    assert report_of(folder).headline.epsilon == total


def test_a_ledger_that_is_written_after_the_noise_is_found(settings: dict[str, Any]) -> None:
    real, due = ServerLedger.charge, list[tuple[Any, ...]]()

    def late(ledger: ServerLedger, *asked: Any) -> Any:
        """Write a charge once the next one is asked for."""
        beside = ServerLedger(ledger.path.with_name("beside.json"), "site")
        for one in due:
            real(ledger, *one)
        due[:] = [asked]
        return real(beside, *asked)

    with patch.object(ServerLedger, "charge", late), patch.object(ServerLedger, "rounds_of", lambda *_: 9):
        _, ledger, noised = killed(settings, "after the noise")
    assert len(ledger.charges()) < noised


def test_a_run_ends_well_before_the_round_that_its_budget_does_not_pay(settings: dict[str, Any]) -> None:
    budget = promised([Release(sampled_gaussian(2.0, 1.0), 2)], 1e-3)[0] + 1e-6
    folder = run_in_process({**settings, "rounds": 4, "privacy.epsilon": budget}, 2)
    ended = read_file(ResultFile, folder)
    assert (ended.status, ended.reached and ended.reached.rounds) == ("stopped", 2)
    assert "the budget is" in ended.reason
    assert [line.complete for line in read_lines(RoundLine, folder)] == [True, True, False]


def test_runs_that_name_one_ledger_add_up(settings: dict[str, Any], tmp_path: Path) -> None:
    shared = {**settings, "rounds": 1, "privacy.ledger": str(tmp_path / "sites.json")}
    run_in_process(shared, 2, run="a")
    folder = run_in_process(shared, 2, run="b")
    (line,) = read_lines(PrivacyLine, folder)
    assert line.spent is not None
    assert line.spent.epsilon_total == promised([Release(sampled_gaussian(2.0, 1.0), 2)], 1e-3)[0]
    assert [site.agreement for site in report_of(folder).sites] == ["larger"]
    with pytest.raises(RunFailed, match="the budget is"):
        run_in_process({**shared, "privacy.epsilon": line.spent.epsilon_total}, 2, run="c")


def test_a_deployed_server_has_one_ledger_for_all_its_runs(tmp_path: Path) -> None:
    assert with_ledger(SITE, tmp_path)["privacy.ledger"] == str(tmp_path / "sites-ledger.json")
    assert with_ledger({**SITE, "privacy.ledger": "/x/y.json"}, tmp_path)["privacy.ledger"] == "/x/y.json"
    assert with_ledger(SITE) == SITE
    assert with_ledger({"privacy.mode": "dp-sgd"}, tmp_path) == {"privacy.mode": "dp-sgd"}


def test_a_resumed_run_keeps_its_cohort_rate_and_ledger(settings: dict[str, Any]) -> None:
    folder = run_in_process({**settings, "rounds": 1}, 2)
    (folder / "result.json").unlink()
    for key, value in (("privacy.cohort", 9), ("privacy.site-rate", 0.5), ("privacy.ledger", "x.json")):
        with pytest.raises(ConfigError, match=f"{key} is "):
            run_in_process({**settings, "rounds": 1, key: value, "resume": str(folder)}, 2)


# --- what the server gives away ---------------------------------------------------------------------------------------

CLOCKS = re.compile(
    r'"(started|time|charged_at)": ?"[^"]*"|[0-9-]+T[0-9:+.]+|[0-9-]+ [0-9:]+ UTC|`report.json` \| `[0-9a-f]+`'
)
"""When a run began, the times of the server's own log and ledger, and the hash of a file that has them."""
NAMES = re.compile(r"site-[0-9]")


class Later(datetime):
    """A clock that goes ahead by days, hours and minutes: no run may begin in the same minute as another by chance."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> Later:
        return super().now(tz) + timedelta(days=40, hours=5, minutes=7)


class Restless(InProcessTransport):
    """Sites of which some cannot read their task; each plays the part of ``part``."""

    odd = 0

    def deliver(self, node: int, task: Task, content: Any) -> Any:
        return super().deliver(node, task, type(content)() if node % 3 == self.odd else content)


class Others(Restless):
    """Other sites that cannot, and all the others with other records, which take them longer."""

    odd = 1

    def deliver(self, node: int, task: Task, content: Any) -> Any:
        time.sleep(0.05)
        self._nodes[node]["partition-id"] = len(self._nodes) - 1 - node
        return super().deliver(node, task, content)


def content(path: Path) -> str:
    """Return a file without clocks, of tensors in an order that is the same every time."""
    if path.suffix != ".safetensors":
        return CLOCKS.sub("CLOCK", path.read_bytes().decode("latin-1"))
    with safe_open(str(path), framework="pt") as file:
        said = sorted((file.metadata() or {}).items())
        parts = [repr(said), *(f"{name} {file.get_tensor(name).tolist()}" for name in sorted(file.keys()))]
    # The length of a file with clocks has a digit more or less by them.
    return re.sub(r'"rounds.jsonl\\*": [0-9]+', "LENGTH", "\n".join(parts))


def given_away(settings: dict[str, Any], kind: type[InProcessTransport]) -> dict[str, str]:
    """Return the files of a run's folder, without clocks."""
    folder = run_in_process({**settings, "privacy.site-rate": 0.5}, 6, "1", kind)
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    files = {str(path.relative_to(folder)): content(path) for path in paths}
    shutil.rmtree(folder)
    return files


def leaks(settings: dict[str, Any]) -> set[str]:
    """Return the files that tell of single sites, or differ though all that was noised is the same.

    Two runs have other draws, other failures and other records; their noised sums are made equal. So whatever differs
    came from a site by another way than through the noise.
    """
    with patch("fedveil.server.collect.trusted.add_private_noise", lambda total, std: torch.full_like(total, 0.01)):
        one = given_away(settings, Restless)
        with patch("fedveil.server.records.datetime", Later):
            other = given_away(settings, Others)
    assert (
        {"checkpoint.safetensors", "rounds.jsonl", "log.jsonl", "report.json", "run.log"} <= one.keys() == other.keys()
    )
    return {name for name in one if one[name] != other[name] or NAMES.search(one[name])}


def test_nothing_of_a_site_is_in_the_run_s_folder_but_through_the_noise(settings: dict[str, Any]) -> None:
    assert leaks(settings) == set()


def of_the_exchange(got: Collected, exchange: Exchange) -> None:
    got.bytes_up = exchange.bytes_up


def naming(got: Collected, exchange: Exchange) -> None:
    got.refusals = {
        node: Absence(1, 1, reply.site, reply.kind, "no")
        for node, reply in exchange.replies.items()
        if isinstance(reply, Refusal)
    }


@pytest.mark.parametrize("leak", [of_the_exchange, naming])
def test_a_server_that_tells_of_replies_is_found(
    settings: dict[str, Any], leak: Callable[[Collected, Exchange], None]
) -> None:
    seen: list[Exchange] = []
    ask, collect = Sites.ask, TrustedCollector.collect

    def watched(sites: Sites, *rest: Any) -> Exchange:
        seen.append(ask(sites, *rest))
        return seen[-1]

    def telling(sites: TrustedCollector, *rest: Any) -> Collected:
        got = collect(sites, *rest)
        leak(got, seen[-1]) if seen else None
        return got

    with patch.object(Sites, "ask", watched), patch.object(TrustedCollector, "collect", telling):
        assert "rounds.jsonl" in leaks({**settings, "rounds": 6, "privacy.epsilon": 200.0})


PUBLISHED = {"report.json", "report.md", "report.html"}


def timed(folder: RunFolder, *lines: Any, real: Any = RunFolder._append) -> None:
    """Write down when a round ended."""
    real(folder, *(replace(line, seconds=time.monotonic()) if isinstance(line, RoundLine) else line for line in lines))


def test_a_server_that_tells_how_long_a_round_took_is_found(settings: dict[str, Any]) -> None:
    settings |= {"rounds": 3, "privacy.epsilon": 200.0}
    with patch.object(RunFolder, "_append", timed):
        found = leaks(settings)
        # A report drops what such a file holds.
        assert "rounds.jsonl" in found
        assert not found & PUBLISHED
        with patch("fedveil.reports.data._is_central", lambda files: False):
            assert "report.json" in leaks(settings)


def test_a_line_that_tells_how_long_a_round_took_is_found(settings: dict[str, Any]) -> None:
    def line(shown: Shown, outcome: Any, *others: Any) -> str:
        return f"{round_line(shown, outcome, *others)}  {outcome.seconds:.3f} s"

    with patch("fedveil.server.conduct.round_line", line):
        assert "run.log" in leaks({**settings, "rounds": 3, "privacy.epsilon": 200.0})


def test_the_log_says_that_it_is_not_to_be_published(settings: dict[str, Any]) -> None:
    folder = run_in_process(settings, 3)
    assert ShownOfCohort.log_note in (folder / "log.jsonl").read_text(encoding="utf-8")
    assert "is not to be published" in ShownOfCohort.log_note


@pytest.mark.parametrize("tracker", OBSERVERS)
def test_no_tracker_notes_when_a_round_ended_that_sites_were_drawn_for(settings: dict[str, Any], tracker: str) -> None:
    with pytest.raises(ConfigError, match="which may show who was drawn"):
        configure({**settings, "privacy.site-rate": 0.5, "tracker": tracker})
    assert configure({**settings, "tracker": tracker}).config.tracker == tracker


def test_a_tracker_hears_neither_time_nor_number_of_sites(settings: dict[str, Any]) -> None:
    told = rounds_of(run_in_process(settings, 3))
    assert set(told) == {0, 1, 2}
    assert {"accuracy", "epsilon", "bytes_up"} <= set(told[2])
    assert not {"seconds", "sites"} & set(told[2])


def test_a_watched_page_says_for_whom_it_is_and_nothing_of_the_round(settings: dict[str, Any]) -> None:
    folder = run_in_process(settings, 3)
    (folder / "result.json").unlink()
    (folder / "progress.json").write_text('{"phase": "training", "round": 2, "asked": 3}', encoding="utf-8")
    watched = Watched(folder)
    try:
        _, page, goes_on = watched.page("/")
    finally:
        watched.server_close()
    assert goes_on
    assert escape(TO_NOBODY) in page.decode()
    assert "sites have answered" not in page.decode()


def test_the_report_has_a_cohort_and_no_sites(settings: dict[str, Any]) -> None:
    folder = run_in_process({**settings, "privacy.site-rate": 0.5}, 6)
    page, text = (
        (folder / "report.html").read_text(encoding="utf-8"),
        (folder / "report.md").read_text(encoding="utf-8"),
    )
    assert ">The cohort</h2>" in page
    assert "## The cohort" in text
    for form in (page, text):
        assert UNTOLD in form
        assert not re.search(r">Sites</h2>|## Sites|rounds joined|refused<|seconds|>time<", form)
    assert {line.seconds for line in report_of(folder).rounds} == {None}
    assert report_of(folder).headline.seconds is None


class OneReply:
    """A grid with three nodes, each of which says that it has failed."""

    def get_node_ids(self) -> list[int]:
        return [1, 2, 3]

    def push_messages(self, messages: list[Any]) -> list[str]:
        return [f"m{number}" for number, _ in enumerate(messages)]

    def pull_messages(self, wanted: list[str]) -> list[Any]:
        return [SimpleNamespace(has_error=lambda: True, error=SimpleNamespace(reason="away"))]


def shown(mode: Mapping[str, Any], settings: dict[str, Any], drawn: Sequence[int]) -> list[ProgressFile]:
    """Return what a run's folder shows to whoever watches, in a round in which these nodes are asked."""
    told: list[ProgressFile] = []
    job = configure({**settings, **mode})
    folder = SimpleNamespace(progress=lambda line: told.append(line) if line else None, shown=shown_of(job))
    parts = (OneReply(), job, SimpleNamespace(reply_layout=lambda _: {}))
    transport = FlowerTransport(*cast(Any, (*parts, folder)))
    with patch("fedveil.server.app.Message", lambda *content, **terms: content):
        transport.nodes(1, ())
        if drawn:
            task = TrainTask("1", 1, {"x": {"B": torch.zeros(2)}}, {}, "", "ab" * 16, "cd" * 16)
            transport.exchange(dict.fromkeys(drawn, task), 5.0)
    return told


def test_whoever_watches_sees_the_same_whoever_is_drawn(settings: dict[str, Any]) -> None:
    found = [shown({}, settings, drawn) for drawn in ([], [1], [1, 2, 3])]
    assert found == [[ProgressFile("training")]] * 3
    # Where no server is trusted, it does tell.
    plain = {"privacy.mode": "dp-sgd", "privacy.unit": "record", "privacy.cohort": 0}
    assert shown(plain, settings, [1])[-1].asked == 1


def test_a_progress_line_that_tells_of_those_who_were_drawn_is_found(settings: dict[str, Any]) -> None:
    with patch.object(ShownOfCohort, "answered", Shown.answered):
        found = [shown({}, settings, drawn) for drawn in ([], [1], [1, 2, 3])]
    assert found != [[ProgressFile("training")]] * 3


def test_a_log_line_about_who_was_drawn_is_found(settings: dict[str, Any]) -> None:
    """A collector that notes what went wrong with a site, as the others do."""
    ask = Sites.ask

    def telling(sites: Sites, nodes: Any, round_number: int, state: ServerState) -> Exchange:
        exchange = ask(sites, nodes, round_number, state)
        told = {n: (r.site, r.kind, r.reason) for n, r in exchange.replies.items() if isinstance(r, Refusal)}
        sites.absent(Collected(attempts=1), round_number, told, set(exchange.replies))
        return exchange

    with patch.object(Sites, "ask", telling):
        assert "log.jsonl" in leaks({**settings, "rounds": 6, "privacy.epsilon": 200.0})


def test_no_update_lies_in_the_run_s_folder(settings: dict[str, Any]) -> None:
    sent: list[TrainResult] = []
    real = TrustedCollector._mean

    def seen(sites: TrustedCollector, results: Any, number: int, state: ServerState) -> Any:
        held = list(results)
        sent.extend(held)
        return real(sites, iter(held), number, state)

    with patch.object(TrustedCollector, "_mean", seen):
        folder = run_in_process(settings, 3)
    files = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert len(sent) == 6
    assert {one.public_size for one in sent} == {1}, "how many records a site has is none of the server's business"
    for one in sent:
        for _, _, tensor in entries(one.contribution):
            whole = tensor.numpy().tobytes()[:16]  # four numbers in a row
            assert not [name for name, content in files.items() if whole in content]
    assert not {path.name for path in folder.rglob("*.sqlite")}, "a site's ledger tells who was drawn"


def test_the_report_says_who_is_trusted_and_promises_no_record_anything(
    settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_in_process(settings, 2)
    report, text = report_of(folder), markdown_report(folder)
    capsys.readouterr()
    print_summary(folder)
    forms = {"Markdown": text, "page": to_html(report), "terminal": capsys.readouterr().out}
    assert report.claim.made
    assert report.claim.per == "site"
    assert "no record is protected from it" in report.claim.sentence
    assert "Everything that the sites sent" not in text
    (server,) = [actor for actor in report.actors if "server" in actor.who]
    assert server.trusted.startswith("with every record (central model")
    assert [site.site for site in report.sites] == [COHORT]
    assert report.headline.sites == COHORT_SIZE
    assert report.unprotected[0] == f"the number of sites in the cohort ({COHORT_SIZE})"
    assert "trusted server" in (folder / "run.log").read_text(encoding="utf-8")
    assert report.meaning is not None
    assert report.meaning.bounds.several == []
    for name, form in forms.items():
        said = " ".join(form.split())
        assert "who sees all that the server gave away, knows every other site" in said, name
        for attack in report.meaning.bounds.attacks:
            rate = f"at {100 * attack.false_positives:g} % false alarms finds at most"
            assert f"{rate} {bound_text(attack.true_positives)} of members" in said, name
        assert f"finds more than {bound_text(report.meaning.bounds.advantage)} beyond that" in said, name
    for page in (text, (folder / "report.html").read_text(encoding="utf-8")):
        assert "which is noised already" not in page
        assert "worst site" not in page
        assert f"at most {COHORT_SIZE} sites" in page
        assert "that sites state" not in page


# --- the site ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def site(settings: dict[str, Any], tmp_path: Path) -> OneSite:
    made = clinic(settings, tmp_path)
    made.rule(mechanisms=["client-level"])
    return made


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
