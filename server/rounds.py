"""The round loop, top to bottom; the only one."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from common.errors import RunFailed
from common.model.federated import Score
from common.run_lines import ShortenedLine
from common.starts import PaidStart
from common.words import counted
from server.admission import Admission, Member
from server.aggregation import contributions, warn_of_noise
from server.checkpoint import Checkpoint
from server.drop_outs import RecoveringSites
from server.last_rounds import cannot_pay, not_alone, refused
from server.model import ServerModel
from server.noise import averaged_noise, statistic_noise, with_noises
from server.replies import clean
from server.ruled import round_step
from server.sites import Gathering, Sites, Transport
from server.sums import SummedSites
from server.trusted import TrustedSites
from server.watched import watched
from strategies import mean
from strategies.job import Job
from strategies.state import Contribution, ServerState


@dataclass(frozen=True)
class RoundOutcome:
    """One finished round, as the records and the terminal see it."""

    round_number: int
    got: Gathering
    """What came of asking the sites; its results have been paid for, whether or not the round counts."""
    score: Score | None
    """None in a round that is not scored (``evaluate-every``)."""
    seconds: float
    counts: bool = True
    """Whether the quorum was reached; if not, nothing was averaged."""
    shortened: tuple[ShortenedLine, ...] = ()
    """The updates that were longer than is likely, and what they were multiplied by."""


class Observer(Protocol):
    """Who is told about a run while it goes on: the run's folder, the terminal."""

    def started(
        self, baseline: Score, state: ServerState, members: Mapping[str, Member], begun: Score | None = None
    ) -> None:
        """The model was scored before any record was used; and once more before round 1, if round 0 used some."""

    def resumed(self, checkpoint: Checkpoint) -> None:
        """The run goes on after the checkpoint's round."""

    def asks(self) -> None:
        """Sites are about to be asked, and to pay: raise RunFailed where what they answer could not be saved."""

    def initialised(self, outcome: RoundOutcome) -> None:
        """Round 0 brought what the start needs, from the outcome's sites (none: from public records)."""

    def finished(self, outcome: RoundOutcome, state: ServerState, members: Mapping[str, Member]) -> None:
        """A round is complete and counts."""

    def renewed(self, state: ServerState, members: Mapping[str, Member]) -> None:
        """After the head's rounds, which are saved, what the start has of them is in the state; no site has seen it."""

    def missed(self, outcome: RoundOutcome) -> None:
        """A round did not reach its quorum in any attempt: what was trained before stays, and the run ends."""

    def stopped(self, reason: str) -> None:
        """The run ends before its last round, and well."""


def run_rounds(
    job: Job,
    run: str,
    transport: Transport,
    server_model: ServerModel,
    observer: Observer,
    saved: Checkpoint | None = None,
) -> ServerState:
    """Run every round, or those after ``saved``, and return the last state.

    Sites whose budget is spent refuse and the others go on; when too few are left for a quorum the
    run ends early and well, with what was trained so far.

    Raises:
        RunFailed: fewer than ``min-sites`` sites succeeded in a round, in ``round-retries`` attempts
            after the first too; names each with its reason.
    """
    resumes = saved.resumes if saved else 0
    admission = Admission(job, saved.members if saved else {}, transport.registered, run)
    sites = _kind_of_sites(job)(job, run, transport, server_model, admission)
    if saved:
        state, score = saved.state, saved.score
        observer.resumed(saved)
    else:
        asked = job.origin.asked == "sites"
        # What round 0 brings is paid for as what the others bring: "before" is before it.
        before = server_model.score(job.start(server_model.start).adapter) if asked else None
        state = _initialise(job, sites, server_model, observer)
        score = server_model.score(state.adapter)
        observer.started(before or score, state, admission.members, score if asked else None)
    if job.renews_after(state.round_number) and not (saved and saved.renewed):
        state = _renewed(server_model, state, admission, observer)
    measured = server_model.rule_statistic(state)
    for round_number in range(state.round_number + 1, job.config.rounds + 1):
        began = time.monotonic()
        if lacking := cannot_pay(job, admission, round_number, resumes):
            observer.stopped(not_alone(job, admission, lacking, round_number))
            break
        observer.asks()
        got = sites.gather(round_number, state)
        if got.results and (lacking := refused(job, admission, got, round_number, resumes)):
            observer.missed(RoundOutcome(round_number, got, score, time.monotonic() - began, counts=False))
            observer.stopped(not_alone(job, admission, lacking, round_number))
            break
        if not got.counts(job.config.min_sites):
            observer.missed(RoundOutcome(round_number, got, score, time.monotonic() - began, counts=False))
            if round_number > 1 and got.spent:
                observer.stopped(got.spent)
                break
            # Nothing but spent budgets went wrong, in any attempt: the run has had all the rounds that it can have.
            # A site that refused a sum in an earlier round is asked no more: it is among the refusals alone.
            spent = [r for r in got.refusals.values() if r.kind == "budget"]
            if round_number > 1 and spent and all(failure.kind == "budget" for failure in got.failures):
                observer.stopped(_without_budget(job, got, round_number))
                break
            raise too_few(got, round_number, job.config.min_sites)
        results = list(got.results.values())
        if round_number == 1 and not got.summed:
            warn_of_noise(job, results)
        averaged = list(got.summed) or with_noises(job, contributions(job, results, state), results)
        step = round_step(job, measured, results, averaged)
        if job.config.server.scores:
            step = watched(job, step, server_model.base_weight, averaged_noise(job, results, averaged, usual=True))
        state = job.strategy.server_update(state, averaged, step)
        due = round_number % job.config.evaluate_every == 0 or round_number == job.config.rounds
        score = server_model.score(state.adapter) if due else None
        outcome = RoundOutcome(
            *(round_number, got, score, time.monotonic() - began),
            shortened=_shortened(averaged),
        )
        observer.finished(outcome, state, admission.members)
        if job.renews_after(round_number):
            state = _renewed(server_model, state, admission, observer)
            measured = server_model.rule_statistic(state)
    return state


def _shortened(averaged: Sequence[Contribution]) -> tuple[ShortenedLine, ...]:
    return tuple(ShortenedLine(one.site, one.factor) for one in averaged if one.factor < 1)


def _renewed(server_model: ServerModel, state: ServerState, admission: Admission, observer: Observer) -> ServerState:
    """Return the state with what the start has of the head.

    The paid round is saved before it, so that a text that cannot be read costs nobody that round again. It is saved
    before it is sent: another machine would make it anew to the last bit but one, and sites would pay again.
    """
    state = server_model.around_head(state)
    observer.renewed(state, admission.members)
    return state


def _kind_of_sites(job: Job) -> type[Sites]:
    """Return how a run's sites are asked, by who may see what of them."""
    if job.mechanism.central:
        return TrustedSites
    if job.mechanism.summed:
        return RecoveringSites if job.config.privacy.drop_outs else SummedSites
    return Sites


def _initialise(job: Job, sites: Sites, server_model: ServerModel, observer: Observer) -> ServerState:
    """Return the state before round 1; only a start that server and sites cannot derive has a round 0."""
    state = job.start(server_model.start)
    if job.derived:
        return state
    began = time.monotonic()
    if job.origin.asked == "sites":
        observer.asks()
        got = sites.gather(0, state)
        if len(got.results) < job.config.min_sites:
            score = server_model.score(state.adapter)
            observer.missed(RoundOutcome(0, got, score, time.monotonic() - began, counts=False))
            raise too_few(got, 0, job.config.min_sites)
        results = list(got.results.values())
        averaged = contributions(job, results, state)
        seconds = time.monotonic() - began
        observer.initialised(RoundOutcome(0, got, None, seconds, shortened=_shortened(averaged)))
        measured = mean(averaged)
        if isinstance(job.origin, PaidStart):
            noise = statistic_noise(job, results, averaged)
            server_model.found = job.origin.found(measured, job.adapter.rank, noise)
        state = job.begin(server_model.start, server_model.completed(measured))
        return job.start(server_model.calibrated(state.adapter)) if job.calibrated else state
    if job.origin.asked == "server":
        state = job.begin(server_model.start, server_model.public_statistic())
    if job.calibrated:
        state = job.start(server_model.calibrated(state.adapter))
    observer.initialised(RoundOutcome(0, Gathering(attempts=1), None, time.monotonic() - began))
    return state


def _without_budget(job: Job, got: Gathering, round_number: int) -> str:
    if job.mechanism.summed:
        return f"too few sites for a sum have budget left after round {round_number - 1}"
    left = counted(len(got.results), "site") if got.results else "no site"
    have = "have" if len(got.results) > 1 else "has"
    return f"{left} {have} budget left after round {round_number - 1}, {job.config.min_sites} needed"


def too_few(got: Gathering, round_number: int, wanted: int) -> RunFailed:
    """Return why a round does not count: who did not take part, those of one reason together."""
    last, sites = got.failures[-1] if got.failures else None, dict[tuple[str, str], list[str]]()
    for absent in got.refusals.values():
        sites.setdefault((absent.kind, absent.reason), []).append(absent.site)
    # Of a reason that all have, such as a full memory, one line is read and not one for each.
    told = [f"{', '.join(names)} ({kind}): {reason}" for (kind, reason), names in sites.items()]
    # What no site answers for, such as how many make a sum, and what to do then.
    reasons = "; ".join([*([last.reason] if last and not last.site else []), *told])
    attempts = f" in {got.attempts} attempts" if got.attempts > 1 else ""
    return RunFailed(
        f"round {round_number}: {counted(len(got.results), 'site')} succeeded{attempts}, {wanted} needed. "
        f"{clean(reasons, 2000)}"
    )
