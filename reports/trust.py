"""Parties and what each is trusted with, and quantities that nothing protects: in a report.

The words are those of NIST SP 800-226, "Guidelines for evaluating differential privacy guarantees" (2025): a curator
holds records as they are and adds the noise (central model); where the noise is there before anything reaches the
curator, the curator needs no trust (local model).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedveil.common.words import number_text
from fedveil.privacy import MECHANISMS
from fedveil.reports.claim import Claim
from fedveil.reports.sites import SiteReport


@dataclass(frozen=True)
class Actor:
    """One party, and what the claim has to trust it with."""

    who: str
    sees: str
    trusted: str


SERVER = {
    "at the site": "with no record (local model, of sites): the noise is there before anything reaches it",
    "at the server": "with every record (central model, of sites): it sees each site's update without noise, clips it, "
    "noises the sum, keeps the ledger, and must tell nobody who was drawn",
    "in the sum": "with no record, as long as the claim's honest sites are (secure sum, of sites): the noise is in the "
    "sum, and each site's part of it reaches the server under masks alone",
}
"""By ``Mechanism.noised``."""
OTHERS = {
    "at the site": "with no record",
    "at the server": "with no update of another site",
    "in the sum": "the claim's number of honest ones with their parts of the noise and with their keys: without these "
    "the price alone holds",
}
"""By the same."""
OWN = "as the curator of its records (central model): it clips, adds its noise and keeps the ledger"
TO_SERVER = "with its own records: it clips what it sends, and adds no noise"
"""What a site is trusted with; the second where the server is."""


def actors_of(claim: Claim, epsilon: float | None) -> list[Actor]:
    """Return the parties of a run; without a finite ε everyone who gets anything is trusted with records."""
    promised = claim.made and not (epsilon is not None and math.isinf(epsilon))
    whole = "" if promised else "with everything: no finite ε is promised"
    noised = MECHANISMS[claim.privacy_mode].noised if promised else ""
    central = promised and claim.trusts_server
    return [
        Actor(
            "a site, with its steward and its machine",
            "its own records",
            whole or (TO_SERVER if central else OWN),
        ),
        Actor(
            "the coordinator's server",
            "every message of every site",
            whole
            or SERVER[noised]
            + ("" if central else ". With the result: a dishonest server can spoil the model, not the claim"),
        ),
        Actor("the other sites", "the global model after every round", whole or OTHERS[noised]),
        Actor("everyone who gets the model", "the final model", whole or "with no record"),
        Actor(
            "the code that sites run, FedVeil and its packages",
            "the site's records",
            whole or "with everything: audits and fixed versions are what speaks for it",
        ),
    ]


def unprotected_of(sites: Sequence[SiteReport], cut_test: str, claim: Claim) -> list[str]:
    """Return the quantities that no noise protects, each a phrase; ``cut_test`` as ``data.cut_test`` returns it."""
    sizes = [site.public_size for site in sites if site.public_size is not None]
    said = [
        f"the number of {claim.per or 'record'}s that each site declares ({number_text(sum(sizes))} in all)",
        "which site took part in which round, when, and how long it took",
        "what each site's ledger says: steps, ε spent and left over all runs on its records, its budget and its δ",
    ]
    if claim.made and claim.trusts_server:
        said = [
            f"the number of sites in the cohort ({number_text(sum(sizes))})",
            "when rounds began and ended, from whoever watches the server or gets its logs",
            "whether enough sites were connected for a round",
        ]
    return [
        *said,
        "every setting of the run, its labels, and the public test part that accuracy is measured on"
        + (", which was cut from the same source as the sites' records" if cut_test else ""),
        "the base model, which may have been trained on the same records before",
    ]
