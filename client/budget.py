"""The price of a round at a site: the stricter of run, policy and ledger, charged before a record is used.

A round of a mechanism that is not charged costs what no budget can pay: it is written down, before a record is used.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace

from fedveil.client.ledger.file import BUSY_SECONDS
from fedveil.client.ledger.ledger import Ledger
from fedveil.client.ledger.record_hashes import record_hashes
from fedveil.client.ledger.rows import Charge, Terms
from fedveil.client.pins import refusal
from fedveil.client.site import Site
from fedveil.common.errors import BudgetExhausted, LedgerError, ProtocolError
from fedveil.common.log import about
from fedveil.common.messages.round import KeyTask, Spending, TrainTask
from fedveil.common.starts import PaidStart
from fedveil.common.tasks import TASKS
from fedveil.privacy.accountant import EVALUATION
from fedveil.privacy.accounting import Release, check_terms, gaussian_release
from fedveil.privacy.plan import Plan, PrivacyPlan
from fedveil.privacy.privacy_filter import FRESH, History, noise_after, price_after, promised_noise
from fedveil.privacy.secure_sum import check_headroom
from fedveil.strategies.job import Job

log = logging.getLogger("fedveil.site")


def enter_round(
    site: Site, job: Job, task: TrainTask, before_charge: Callable[[], None]
) -> tuple[Plan, Spending | None]:
    """Charge a round, or write it down where nothing is charged; return what to do to the records, and the price.

    Args:
        site, job, task: of the round.
        before_charge: called once the last figure that depends on a record is known; what it raises, this raises.
    """
    if job.mechanism.charged:
        return pay_round(site, job, task, before_charge)
    note_exposure(site, job, task)
    return job.site_plan(job.config.training.local_steps, site.public_size), None


def pay_round(site: Site, job: Job, task: TrainTask, before_charge: Callable[[], None]) -> tuple[PrivacyPlan, Spending]:
    """Charge a round, and its noised evaluation if the policy sends one; return what to do to the records.

    Round 0 is the release that the run's start is made from; a training round is its steps. Arguments as for
    ``enter_round``.

    Raises:
        BudgetExhausted: the round would exceed the budget, or that of another data set that shares records.
        PolicyRefusal: the run has had all its rounds or steps here, or records were released without privacy.
        ProtocolError: it is round 0, and the start is made from no release.
    """
    steps = job.config.training.local_steps
    with Ledger(site.ledger_path, apart=site.apart) as ledger:
        plan = _plan(ledger, site, job, task.run)
        if task.round_number:
            releases = (plan.release(steps), *evaluation_releases(job, site, 1))
            charge = _offered(site, job, task, releases, plan)
            fewer = releases[0].count < steps
            return plan, _charge(ledger, site, charge, task, before_charge, _within(site, steps, fewer=fewer))
        if not isinstance(job.origin, PaidStart):
            raise ProtocolError(f"no release is made for the start {job.origin.name!r}")
        least = _least_start_noise(job, site, plan.max_epsilon, plan.delta)
        charge = _offered(site, job, task, (job.origin.release(least),), plan)
        return job.origin.plan(plan, site.public_size, least), _charge(ledger, site, charge, task, before_charge)


def check_budget(site: Site, job: Job, task: KeyTask, *, whole: bool = False) -> None:
    """Raise if the site could not pay for a round that others are about to pay for, too; ``whole``: for the whole run.

    By all that its ledger holds of its records, under whatever name: an attempt that one site cannot pay for is thrown
    away, and the others have paid.

    Raises:
        BudgetExhausted, PolicyRefusal: as ``pay_round`` and ``Ledger.charge`` would.
    """
    steps = job.config.training.local_steps
    with Ledger(site.ledger_path, apart=site.apart) as ledger:
        plan = _plan(ledger, site, job, task.run)
        releases = (plan.release(steps),)
        _within(site, steps, fewer=releases[0].count < steps)(*ledger.trained(site.dataset_id, task.run))
        charge = _offered(site, job, task, releases, plan)
        charge = replace(charge, releases=charge.planned) if whole else replace(charge, site=site.name)
        known = record_hashes(site.data, ledger.key)
        ledger.check(charge, records=known, after_exposure=site.policy.after_no_privacy)


def note_exposure(site: Site, job: Job, task: TrainTask) -> None:
    """Write down that a round releases records without privacy; round 0, a start from them, has no steps.

    A trusted server receives what follows from records without noise, so that counts. In a simulation, whose ledgers
    lie in the run's folder, they would tell anyone with that folder which sites were drawn, so nothing is written.

    Raises:
        PolicyRefusal: the run has had all its rounds or steps here; nothing was written.
    """
    if warning := job.mechanism.exposes:
        if site.simulated:
            return
        log.warning("%s", warning, extra=about(task.run, task.round_number, site.name))
    steps = job.config.training.local_steps if task.round_number else 0
    with Ledger(site.ledger_path) as ledger:
        ledger.expose(
            site.dataset_id,
            run=task.run,
            round_number=task.round_number,
            steps=steps,
            records=record_hashes(site.data, ledger.key),
            allow=_within(site, steps) if task.round_number else None,
            held_out=site.held_out,
        )


def note_failure(site: Site, task: TrainTask, reason: str, patience: float = BUSY_SECONDS) -> None:
    """Write down that a charged round failed and is answered by noise alone, once its reply is there.

    A ledger that is locked for more than ``patience`` seconds, or cannot be written, is reported in the site's log: a
    refusal, or a late answer, would reveal the failure.
    """
    try:
        with Ledger(site.ledger_path, patience=min(BUSY_SECONDS, patience)) as ledger:
            ledger.fail(site.dataset_id, run=task.run, round_number=task.round_number, reason=reason)
    except LedgerError as error:
        where = about(task.run, task.round_number)
        log.error("the ledger has no row of a round that failed: %s", error, extra=where)


def _within(site: Site, steps: int, *, fewer: bool = False) -> Callable[[int, int], None]:
    """Return what refuses one more round of ``steps``, where the policy has no more.

    Where a round is ``fewer`` releases than it has steps, each round counts with its steps.
    """
    return lambda rounds, taken: site.policy.check_round(rounds + 1, (rounds * steps if fewer else taken) + steps)


def evaluation_releases(job: Job, site: Site, rounds: int) -> list[Release]:
    """Return what the noised counts of ``rounds`` rounds cost: nothing unless policy, task and mechanism allow them.

    Where each record is right or wrong as a whole, a count of the right ones changes by at most 1 with one
    record: that is its clip, without any clipping, and its noise multiplier is its standard deviation.
    """
    allowed = site.policy.send_noised_metrics and TASKS[job.config.model.task].counted and job.mechanism.counted
    return [gaussian_release(site.policy.metrics_noise, 1.0, rounds, EVALUATION, clip_norm=1.0)] if allowed else []


def plan_of(job: Job, site: Site, terms: Terms, history: History = FRESH) -> PrivacyPlan:
    """Return the site's plan for the whole run, with room for its initialisation and evaluations.

    Noise is calibrated for what the ``history`` of its records leaves of the stricter budget of run and site
    (``terms``), and for the most rounds that the policy lets the site join; it is never below the policy's least.
    Where no noise would do, it is that of records that have spent nothing, and the ledger stops the run.

    Raises:
        BudgetExhausted: the run's sites must do the same, and what is left is too little for all of its rounds.
        PolicyRefusal: they must, and the policy asks for more noise.
        ConfigError: the run asks for figures that no honest job has.
    """
    config = job.config
    epsilon, delta = terms.stricter(config.privacy.epsilon, config.privacy.delta)
    if shares_noise(job):
        return _common_plan(job, site, epsilon, delta, history)
    rounds, steps = site.policy.most_of(job)
    paid = job.origin.release(_least_start_noise(job, site, epsilon, delta))
    beside = [*([paid] if paid else []), *evaluation_releases(job, site, rounds)]
    privacy = replace(config.privacy, epsilon=epsilon, delta=delta)
    plan = job.mechanism.plan(privacy, config.training, steps, site.public_size, beside)
    least = site.policy.min_noise_multiplier
    noise = max(plan.event.noise_multiplier, least)
    if history.releases and not privacy.noise_multiplier:
        noise = noise_after(history, plan.event, steps, beside, epsilon, delta, least=least) or noise
    return replace(plan, event=plan.event.having(noise_multiplier=noise))


def _least_start_noise(job: Job, site: Site, epsilon: float, delta: float) -> float:
    """Return the least noise of what the run's start is made from, at a site whose budget is this one.

    The run's noise takes a part of the run's budget. Where the site's is stricter, the noise is larger by as much as
    the whole budget asks for, so that the release takes about the same part of it: else a site that agreed to less
    would spend it before round 1.

    Raises:
        ConfigError: as ``check_terms``.
    """
    least, run, paid = site.policy.min_noise_multiplier, job.config.privacy, job.origin.release()
    if paid is None or (epsilon, delta) == (run.epsilon, run.delta):
        return least
    for each in (delta, run.delta):
        check_terms([paid], each)
    own, asked = (promised_noise(paid.event, e, d, paid.count) for e, d in ((epsilon, delta), (run.epsilon, run.delta)))
    return max(least, paid.event.noise_multiplier * own / asked)


def _common_plan(job: Job, site: Site, epsilon: float, delta: float, history: History) -> PrivacyPlan:
    """Return the plan of a run whose sites must do the same: the run's own noise, and what the site lets it cost.

    Raises:
        BudgetExhausted, PolicyRefusal: as ``plan_of``.
        ConfigError: the site's own part does not fit a sum's words.
    """
    config, least = job.config, site.policy.min_noise_multiplier
    plan = job.plan(config.total_steps, site.public_size)
    # What the site itself adds to the sum must fit, before anybody pays.
    sites = config.privacy.honest_sites + config.privacy.colluders
    check_headroom(plan.expected_batch_size, plan.event.clip_norm, plan.noise_std, sites)
    noise = plan.noise_std / plan.event.clip_norm
    if noise < least:
        asked = f"noise multiplier {noise:g} of each site, and {plan.event.noise_multiplier:g} of the sum"
        raise refusal("min-noise-multiplier", f"{least:g}", asked)
    _, steps = site.policy.most_of(job)
    open_noise = history.releases and not config.privacy.noise_multiplier
    # A budget that is stricter than the run's ends before the run does, with earlier runs or without.
    if open_noise and price_after(FRESH, [plan.release(steps)], delta)[0] <= epsilon:
        needed = noise_after(history, plan.event, steps, (), epsilon, delta)
        if needed != plan.event.noise_multiplier:
            raise BudgetExhausted(
                f"earlier runs leave too little of the budget of {epsilon:g} at delta {delta:g} for {steps} steps at "
                f"noise {plan.event.noise_multiplier:g}, and the sites of a sum share one noise: "
                + (f"set privacy.noise-multiplier to {needed:g}" if needed else "ask for fewer rounds")
            )
    return replace(plan, delta=delta, max_epsilon=epsilon)


def shares_noise(job: Job) -> bool:
    """Return whether the run's sites share the noise of one sum, so that all must do the same."""
    return job.mechanism.summed


def _plan(ledger: Ledger, site: Site, job: Job, run: str) -> PrivacyPlan:
    terms = ledger.lower_budget(site.dataset_id, site.policy.epsilon, site.policy.delta)
    # Whether a sum can end is asked before its first round; from then on the ledger says when it ends.
    begun = shares_noise(job) and ledger.trained(site.dataset_id, run) != (0, 0)
    with site.apart():
        return plan_of(job, site, terms, FRESH if begun else ledger.history(site.dataset_id, run))


def _offered(
    site: Site, job: Job, task: KeyTask | TrainTask, releases: tuple[Release, ...], plan: PrivacyPlan
) -> Charge:
    """Return the charge of a round's ``releases`` on the site's terms, with all that the run's ``plan`` releases."""
    policy, unit = site.policy, job.claim.per
    most, ceiling = policy.person_terms(unit)
    start = job.origin.release(_least_start_noise(job, site, plan.max_epsilon, plan.delta))
    rounds, steps = policy.most_of(job)
    return Charge(
        site.dataset_id,
        task.run,
        task.round_number,
        releases,
        plan.delta,
        plan.max_epsilon,
        unit,
        max_alone=policy.epsilon_alone,
        records_per_person=most,
        max_person=ceiling,
        planned=(*([start] if start else []), plan.release(steps), *evaluation_releases(job, site, rounds)),
        held_out=site.held_out,
    )


def _charge(
    ledger: Ledger,
    site: Site,
    charge: Charge,
    task: TrainTask,
    before_charge: Callable[[], None],
    allow: Callable[[int, int], None] = lambda rounds, steps: None,
) -> Spending:
    """Write the round's cost to the site's ledger, durably, and return it for the report."""

    def allowed(rounds: int, steps: int) -> None:
        before_charge()
        allow(rounds, steps)

    key = next((offer.public for offer in task.offers if offer.site == site.name), b"")
    charge = replace(charge, mask_key=key, site=site.name if key else "")
    charged = ledger.charge(
        charge,
        records=record_hashes(site.data, ledger.key),
        allow=allowed,
        after_exposure=site.policy.after_no_privacy,
    )
    return Spending(
        purpose=charge.releases[0].purpose,
        event=charge.releases[0].event,
        steps_round=charged.steps_round,
        steps_total=charged.steps_total,
        delta=charged.delta,
        epsilon_round=charged.epsilon_increment,
        epsilon_total=math.inf if charged.exposed else charged.epsilon_after,
        epsilon_budget=charged.max_epsilon,
        epsilon_remaining=0.0 if charged.exposed else charged.epsilon_remaining,
        accountant=charged.accountant,
    )
