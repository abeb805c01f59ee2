"""Rounds of a trusted server, which draws sites, clips and sums what they send, and noises the sum.

What single sites sent lives in ``collect`` alone, in memory or in nameless files beside the state (``server.spool``),
which end with the process. From there goes on one noised mean, and beside it nothing
that follows from a reply: not who was drawn or answered, how many did, what went wrong, or how many bytes came. The
round counts whatever came, since whether it counts would tell of the replies. So no rule here compares sites, and none
looks at a name, a size or a length that a site could use to push another one out of the sum.

Whether sites are connected is looked at before anything is charged, drawn or sent, and is not protected.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import torch

from fedveil.common.errors import BudgetExhausted, LedgerError
from fedveil.common.files import expanded
from fedveil.common.log import about
from fedveil.common.messages.blocks import Layout, bytes_of, payload_bytes
from fedveil.common.messages.columns import narrowed
from fedveil.common.messages.round import Spending, TrainResult, TrainTask
from fedveil.common.messages.state import AdapterState
from fedveil.common.messages.tensors import fingerprint
from fedveil.common.messages.wire import encode_task
from fedveil.common.paths import run_folder
from fedveil.common.run_lines import COHORT, Absence
from fedveil.privacy.client_level import clipped
from fedveil.privacy.events import Event
from fedveil.privacy.plan import PrivacyPlan
from fedveil.privacy.privacy_filter import History, noise_after
from fedveil.privacy.randomness import add_private_noise, private_poisson_sample
from fedveil.server.admission import Admission
from fedveil.server.collect.base import Collected
from fedveil.server.collect.noise import ServerNoise
from fedveil.server.ledger import ServerLedger
from fedveil.server.members import Member
from fedveil.server.sites import Sites
from fedveil.strategies.job import Job
from fedveil.strategies.state import Contribution, ServerState

log = logging.getLogger("fedveil.server")


@dataclass(frozen=True)
class NoisedMean:
    """What a round made of the updates of all sites."""

    change: AdapterState
    """The noised sum over the public divisor, float64, of what moves in the round."""
    noise: float
    """Standard deviation of the noise on one of its numbers."""


class TrustedCollector:
    """Asks drawn sites once a round, and hands on their noised mean.

    Args:
        job: the run.
        sites: to ask.
        admission: knows the names under which keys are registered.
        layout: returns names and shapes of what a site sends in a round that starts from a state.
    """

    members: Mapping[str, Member] = MappingProxyType({})
    """None: what a site sent is remembered by nobody."""

    def __init__(
        self, job: Job, sites: Sites, admission: Admission, layout: Callable[[int, ServerState], Layout]
    ) -> None:
        self._job, self._sites, self._admission, self._layout = job, sites, admission, layout
        self._ledger = ServerLedger(ledger_path(job, sites.run), job.claim.per)
        self._plan = sums_plan(job, self._ledger.history(sites.run), self._ledger.first_event(sites.run))

    def ends_before(self, round_number: int) -> str:
        """Return nothing: the ledger says whether a round can be paid for when it is charged."""
        del round_number
        return ""

    def collect(self, round_number: int, state: ServerState) -> Collected:
        """Charge the round, ask the sites that are drawn, and return the noised mean.

        A round that does not count was neither charged nor sent: too few or too many nodes are connected, or the budget
        is spent (``ending``).

        Raises:
            LedgerError: it cannot be written, or lacks rounds that the run has done.
        """
        self._check_ledger(state)
        got, nodes = Collected(needed=self._job.config.min_sites, attempts=1), self._online(round_number)
        if isinstance(nodes, str):
            self._sites.note(got, Absence(round_number, 1, "", "quorum", nodes))
            return got
        try:
            spent = self._charge(round_number)
        except BudgetExhausted as error:
            got.ending = str(error) if round_number > 1 else ""
            self._sites.note(got, Absence(round_number, 1, "", "budget", str(error)))
            return got
        cohort = self._job.config.privacy.cohort
        got.pay([TrainResult(self._sites.run, round_number, COHORT, cohort, {}, spent)])
        drawn = [nodes[i] for i in private_poisson_sample(len(nodes), self._plan.event.sample_rate).tolist()]
        replies = self._sites.ask(drawn, round_number, state).replies.values() if drawn else ()
        mean = self._mean((reply for reply in replies if isinstance(reply, TrainResult)), round_number, state)
        got.averaged = (Contribution(COHORT, cohort, self._moved(state, mean.change), noise=mean.noise),)
        got.noise, got.participants = ServerNoise(mean.noise), (COHORT,)
        got.bytes_down, got.bytes_up = self._usual_bytes(round_number, state)
        return got

    def _charge(self, round_number: int) -> Spending:
        plan = self._plan
        whole = [plan.release(self._job.config.rounds)]
        return self._ledger.charge(self._sites.run, round_number, plan.event, plan.delta, plan.max_epsilon, whole)

    def _mean(self, results: Iterable[TrainResult], round_number: int, state: ServerState) -> NoisedMean:
        """Return the noised mean of what sites sent; one that sent nothing, or no update, is zero in it."""
        before, plan = self._moving(round_number, state), self._plan
        total = {layer: {n: torch.zeros_like(t) for n, t in factors.items()} for layer, factors in before.items()}
        for result in results:
            change = _change(result.contribution, before)
            if change is None:
                continue
            for layer, factors in clipped(change, plan.event.clip_norm).items():
                for name, tensor in factors.items():
                    total[layer][name] += tensor
        noised = {
            layer: {n: add_private_noise(t, plan.noise_std) / plan.expected_batch_size for n, t in factors.items()}
            for layer, factors in total.items()
        }
        return NoisedMean(noised, plan.gradient_noise_std)

    def _moving(self, round_number: int, state: ServerState) -> AdapterState:
        """Return, in float64, what is summed in a round: what sites send in it."""
        held = narrowed(state.adapter, self._job.trained_columns(state))
        return {
            layer: {name: held[layer][name].double() for name in factors}
            for layer, factors in self._job.sent(round_number, self._layout(round_number, state)).items()
        }

    def _online(self, round_number: int) -> list[int] | str:
        """Return the nodes that may be drawn, one a site as far as names are registered, or why no round can begin."""
        config, names = self._job.config, self._admission.registered()
        nodes: list[int] = []
        for _ in range(config.round_retries + 1):
            nodes = self._sites.transport.nodes(config.min_sites, ())
            if names is not None:
                nodes = list({names[node]: node for node in sorted(nodes) if node in names}.values())
            if len(nodes) >= config.min_sites:
                break
            log.warning("%d sites are connected", len(nodes), extra=about(self._sites.run, round_number))
        cohort = config.privacy.cohort
        if len(nodes) < config.min_sites:
            return f"{len(nodes)} sites are connected, {config.min_sites} are needed for min-sites"
        if len(nodes) > cohort:
            return f"{len(nodes)} sites are connected, more than privacy.cohort, which is {cohort}: shut out the others"
        return nodes

    def _check_ledger(self, state: ServerState) -> None:
        rounds = self._ledger.rounds_of(self._sites.run)
        if rounds < state.round_number:
            raise LedgerError(
                f"the ledger {self._ledger.path} has {rounds} rounds of run {self._sites.run!r}, which has done "
                f"{state.round_number}: put back the one that it was charged to"
            )

    def _usual_bytes(self, round_number: int, state: ServerState) -> tuple[int, int]:
        """Return payload bytes down and up of as many sites as are drawn on average: how many were is private."""
        basis = self._job.basis(state)
        down = self._job.strategy.downlink(state)
        mark = fingerprint(basis) if basis else ""
        precision = self._job.config.wire.precision
        task = TrainTask(
            *(self._sites.run, round_number, down, {}, mark, self._sites.base, self._sites.start), precision=precision
        )
        up, sites = bytes_of(self._layout(round_number, state), precision), self._plan.expected_batch_size
        return round(sites * payload_bytes(encode_task(task))), round(sites * up)

    def _moved(self, state: ServerState, change: AdapterState) -> AdapterState:
        """Return all that sites train, moved by the change; what is frozen in the round as it is."""
        moved: AdapterState = {}
        for layer, factors in narrowed(state.adapter, self._job.trained_columns(state)).items():
            own = change.get(layer, {})
            trained = {name: tensor for name, tensor in factors.items() if name in own or state.trains(layer, name)}
            if trained:
                moved[layer] = {
                    name: (tensor.double() + own[name]).to(tensor.dtype) if name in own else tensor
                    for name, tensor in trained.items()
                }
        return moved


def sums_plan(job: Job, history: History, first: Event | None = None) -> PrivacyPlan:
    """Return the plan of all rounds, with the noise that fits into what earlier runs of the ledger have left.

    Where none does, it is that of a ledger that holds nothing, which then refuses.

    Args:
        job: the run.
        history: of the ledger before it.
        first: what its first round was charged for, whose noise stays; None: none was.
    """
    config, privacy = job.config, job.config.privacy
    privacy = replace(privacy, delta=min(privacy.delta, history.delta))
    plan = job.mechanism.plan(privacy, config.training, config.rounds, privacy.cohort)
    noise = plan.event.noise_multiplier
    if privacy.noise_multiplier:
        return plan
    if first == plan.event.having(noise_multiplier=first.noise_multiplier if first else noise):
        noise = first.noise_multiplier
    elif history.releases:
        noise = noise_after(history, plan.event, config.rounds, (), privacy.epsilon, privacy.delta) or noise
    return replace(plan, event=plan.event.having(noise_multiplier=noise))


def ledger_path(job: Job, run: str) -> Path:
    """Return the file of the server's ledger."""
    named = job.config.privacy.ledger
    if named:
        return expanded(named).absolute()
    return run_folder(job.config, run) / "ledgers" / "server.json"


def _change(sent: AdapterState, before: AdapterState) -> AdapterState | None:
    """Return what a site sent minus what it received, float64; None if it lacks anything or has another shape."""
    change: AdapterState = {}
    for layer, factors in before.items():
        own = sent.get(layer, {})
        if any(name not in own or own[name].shape != tensor.shape for name, tensor in factors.items()):
            return None
        change[layer] = {name: own[name].double() - tensor for name, tensor in factors.items()}
    return change
