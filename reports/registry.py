"""The record of a run for OpenDP's registry of differentially private deployments, as YAML.

Layout and words are those of the registry's schema at the commit that ``SCHEMA_COMMIT`` names. What the run's files
know is filled in, of all three tiers. What they cannot know is quoted from what the coordinator declares; where nothing
is declared the record says so, and it stays a draft. The kind of publisher is one of three words, none of which says
that nobody has declared it: a record without it is not valid yet.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Any

import yaml

from common.errors import ConfigError
from common.privacy import MECHANISMS
from common.privacy.figures import epsilon_text
from common.words import counted, numbers_text, percent_text, visible
from reports.claim import server_is_trusted
from reports.connection import NO_NETWORK
from reports.data import ReportData, cares_of, setting_of
from reports.declared import Declared, several
from reports.meaning import attack_sentence, several_sentence
from reports.sharing import THIS_RUN, others_of, rests_on
from reports.sites import distinct
from reports.trials import trials_figure, trials_sentence

NAME = "deployment.yaml"
SCHEMA_COMMIT = "057e5d81cf60150dd3307e0cf4504b957802fb3b"
"""Of github.com/opendp/deployments-registry-data; the newest that was at hand in November 2026."""
UNSTATED = "Not stated by the coordinator."
TUNING = "preprocessing_and_hyper" + "parameter_tuning"
"""The registry's name for how settings were chosen; they have another name everywhere else here."""
NOISED = {
    "at the site": "Each site clips and noises what it computes before anything leaves it: the local model, with a "
    "site in the place of a person. The server is trusted with nothing.",
    "at the server": "A trusted server clips each site's update, noises their sum and gives away nothing else: the "
    "central model, with a site in the place of a person. Nothing is promised against the server.",
    "in the sum": "The noise that the claim counts on is in the sum over sites, which the server sees alone.",
}
"""What ``Mechanism.noised`` means for whoever asks whom to trust."""
BY_SITES = (
    "Every site's ledger composes all runs on its records and stops at its budget. A site can be asked again until "
    "then."
)
BY_RUN = "A simulation: the ledgers of its sites are of this run alone, and nothing else counts towards its figures."
BY_SERVER = "The server's ledger composes all runs that are charged to it, and stops at the budget."
"""What composes a run with others."""


def _composed(data: ReportData, *, central: bool) -> str:
    if central:
        return BY_SERVER
    said = {text for connection in data.connections for text in connection.said}
    return BY_SITES if said.isdisjoint(NO_NETWORK.values()) else BY_RUN


def registry_record(data: ReportData, declared: Declared) -> str:
    """Return the record of a run as YAML.

    Raises:
        ConfigError: the run makes no privacy claim, or its ε is not finite, so it is no deployment of that kind.
    """
    head, mechanism = data.headline, MECHANISMS.get(data.claim.privacy_mode)
    epsilon = epsilon_text(head.epsilon)
    if not data.claim.made or mechanism is None or head.delta is None or epsilon == "∞":
        raise ConfigError(
            f"run {data.run} makes no finite privacy claim (ε: {epsilon}), and the registry is of runs that do: name "
            "another run"
        )
    record = {
        "url_slug": _slug(declared.name or f"fedveil {data.method} {data.run}"),
        "deployment": {
            "basic": _basic(data, declared),
            "dp_variant": {
                "variant_name": "Approximate DP",
                "data_domain": f"Sets of training records at a site; task {setting_of(data, 'model.task')}.",
                "unprotected_quantities": _lines(data.unprotected),
            },
            "privacy_loss": {
                "privacy_unit": f"{data.claim.per.capitalize()}-level",
                "privacy_unit_details": f"{data.claim.unit}; neighbours: {data.claim.neighbours}.",
                **_units(data),
                "privacy_parameters": {"epsilon": float(epsilon), "delta": head.delta},
                "privacy_parameters_details": _lines(_parameters(data)),
            },
            "deployment_model": {
                "model_name": "Central" if mechanism.central else "Federated",
                "model_name_details": NOISED.get(mechanism.noised, ""),
                "trust_assumptions": _lines([f"{actor.who}: trusted {actor.trusted}" for actor in data.actors]),
                "actors": _lines([f"{actor.who} sees {actor.sees}" for actor in data.actors]),
                "release_type": "Many releases" if _more(data) else "One release",
                "release_type_details": _composed(data, central=mechanism.central),
                "data_source_type": "Static",
                "access_type": "Non-interactive",
            },
            "implementation": {
                TUNING: _tuning(data, declared),
                "mechanisms": _lines(_mechanisms(data)),
                "composition": f"All releases of all rounds are composed, adaptively, by {data.claim.accountant}. "
                f"The federation's ε is the largest of its sites': {mechanism.of_unit(data.claim.per).claim.across}",
                "post_processing": _lines(_afterwards(data)),
                "justification": declared.justification or UNSTATED,
                "utility": f"Accuracy on public records: {percent_text(head.accuracy_before)} before training, "
                f"{percent_text(head.accuracy_after)} after.",
            },
            "administrative": {
                "evidence_sources": {"report": _report(data, declared)},
                "status": "Draft",
                "registry_authors": several(declared.authors) or [UNSTATED],
                "tier": 3,
            },
        },
    }
    return yaml.safe_dump(record, sort_keys=False, allow_unicode=True, width=100)


def _slug(text: str) -> str:
    """Return words as the address of a record.

    >>> _slug("Reviews, judged (2026)")
    'reviews-judged-2026'
    >>> _slug("Ärzte"), _slug("评论")
    ('arzte', 'deployment')
    """
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-") or "deployment"


def _lines(items: list[str]) -> str:
    return "".join(f"- {visible(item)}\n" for item in items)


def _units(data: ReportData) -> dict[str, int]:
    """Return the number of privacy units as far as sites declare it."""
    sizes = [site.public_size for site in data.sites]
    known = [size for size in sizes if size is not None]
    return {"number_of_privacy_units": sum(known)} if known and len(known) == len(sizes) else {}


def _more(data: ReportData) -> bool:
    return any(site.agreement == "larger" for site in data.sites)


def _basic(data: ReportData, declared: Declared) -> dict[str, Any]:
    base = data.origin.base_model if data.origin else str(setting_of(data, "model.name"))
    base = base.rstrip("/").rpartition("/")[2]
    kind = {"data_curator_type": declared.curator_type} if declared.curator_type else {}
    sector = {"data_product_sector": declared.sector} if declared.sector else {}
    return {
        "name": declared.name or f"{visible(base)}, fine-tuned by {data.method}",
        "data_curators": [{"data_curator_name": name, **kind} for name in several(declared.curators) or [UNSTATED]],
        "intended_use": declared.intended_use or UNSTATED,
        "data_product_type": "Machine learning model",
        "data_product_region": declared.region or UNSTATED,
        "description": declared.description
        or f"{visible(base)}, fine-tuned on the records of {counted(data.headline.sites, 'site')} that no record left.",
        "publication_date": declared.published or data.started[:10],
        **sector,
    }


def _parameters(data: ReportData) -> list[str]:
    lines = [f"largest of all sites, over all rounds; site {data.headline.worst_site}"]
    if server_is_trusted(data.claim.privacy_mode):
        lines = ["of every site of the cohort, over all rounds"]
    if data.sharing is not None:
        lines += [f"ε holds {rests_on(data.sharing)}"]
        lines += [f"{THIS_RUN}, {other}" for other in others_of(data.sharing)]
    if data.tuning is not None:
        lines.append(f"this run is one of several trials; {trials_figure(data.tuning)}")
    if data.meaning is not None:
        said = (attack_sentence(data.meaning), several_sentence(data.meaning), data.meaning.caution)
        lines += [text for text in said if text]
    return lines + cares_of(data)


def _tuning(data: ReportData, declared: Declared) -> str:
    told = [trials_sentence(data.tuning, data.claim.per)] if data.tuning else []
    unstated = f"{UNSTATED} Choices made by looking at earlier runs on the same records are not covered."
    return " ".join([*told, declared.tuning or ("" if told else unstated)]).strip()


def _afterwards(data: ReportData) -> list[str]:
    optimizer = setting_of(data, "server.optimizer")
    return [
        f"the noised mean of the sites' updates is taken by {data.strategy}"
        if server_is_trusted(data.claim.privacy_mode)
        else f"the sites' noised contributions are averaged by {data.strategy}",
        f"the server's optimiser ({optimizer}) steps on the average" if optimizer != "none" else "no server optimiser",
        "scores on public records, and the choice of the last round",
    ]


def _mechanisms(data: ReportData) -> list[str]:
    events = [event for site in data.sites for event in site.events]
    figures = (("noise multiplier", "noise_multiplier"), ("sample rate", "sample_rate"), ("clip norm", "clip_norm"))
    versions = ", ".join(f"{name} {number}" for name, number in data.versions.items())
    code = f"; the server's code has the hash {data.origin.bundle}" if data.origin and data.origin.bundle else ""
    return [
        f"{data.claim.privacy_mode}: "
        + "; ".join(f"{name} {numbers_text(distinct(events, key))}" for name, key in figures),
        f"sampling: {data.claim.sampler}",
        "noise from the operating system's entropy, on a public grid, so that floating point tells nothing of the sum",
        "time is not covered, but where a site answers at a fixed time (docs/privacy-kept.md)",
        f"implemented by FedVeil with {versions}{code}",
    ]


def _report(data: ReportData, declared: Declared) -> dict[str, Any]:
    """Return the run's report as a source, in the fields of BibTeX."""
    audits = [f"{result.audit}: {'passed' if result.passed else 'FAILED'}" for result in data.audit_results]
    told = "; ".join(["it states every release of every site", *audits])
    url = {"url": declared.report_url} if declared.report_url else {}
    own = {"title": f"Report of run {visible(data.run)}", "note": visible(told), **url}
    return {"evidence_source_type": "Authorized organizational attestation", "misc": own}
