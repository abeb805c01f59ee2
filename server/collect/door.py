"""The one place at the server that asks what a run promises, to choose who collects a round and what is shown of it."""

from __future__ import annotations

from fedveil.server.admission import Admission
from fedveil.server.collect.base import Collector
from fedveil.server.collect.drop_outs import RecoveringCollector
from fedveil.server.collect.masked import MaskedCollector
from fedveil.server.collect.plain import PlainCollector
from fedveil.server.collect.shown import Shown, ShownOfCohort
from fedveil.server.collect.trusted import TrustedCollector
from fedveil.server.last_rounds import LastRounds
from fedveil.server.model import ServerModel
from fedveil.server.named import to_named
from fedveil.server.noise import noised_at_sites, without_noise
from fedveil.server.sites import Sites, Transport
from fedveil.strategies.job import Job


def collector_of(
    job: Job, run: str, transport: Transport, server_model: ServerModel, admission: Admission, resumes: int = 0
) -> Collector:
    """Return what collects the rounds of a run, by who may see what of a site.

    Args:
        job: the run.
        run: its id.
        transport: to the sites.
        server_model: knows what a site sends.
        admission: of what comes back.
        resumes: how often the run was resumed.

    Raises:
        ConfigError: the run names a site that is not registered.
    """
    sites = Sites(job, run, to_named(job, transport), server_model, admission)
    layout = server_model.reply_layout
    last_rounds = LastRounds(job, admission, resumes)
    match job.mechanism.noised:
        case "at the server":
            return TrustedCollector(job, sites, admission, layout)
        case "in the sum":
            kind = RecoveringCollector if job.config.privacy.drop_outs else MaskedCollector
            return kind(job, sites, admission, last_rounds, layout)
        case "at the site":
            return PlainCollector(job, sites, admission, last_rounds, noised_at_sites)
        case "nowhere":
            return PlainCollector(job, sites, admission, last_rounds, without_noise)


def shown_of(job: Job) -> Shown:
    """Return what a run's files, log and terminal show of its rounds."""
    config = job.config
    if job.mechanism.noised == "at the server":
        return ShownOfCohort(config.rounds, job.claim.per, config.privacy.cohort)
    return Shown(config.rounds, job.claim.per, config.privacy.honest_sites)
