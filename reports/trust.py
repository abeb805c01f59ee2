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
    "at the site": "no record (local model, sites as parties): noise is added before anything reaches it",
    "at the server": "every record (central model, sites as parties): it sees each site's update without noise, clips "
    "it, adds noise to the sum, keeps the ledger, and must keep secret who was drawn",
    "in the sum": "no record, as long as the claim's honest sites are honest (secure sum): the noise is in the sum, "
    "and each site's part of it reaches the server only under masks",
}
"""By ``Mechanism.noised``."""
RESULT = ". It is trusted with the result: a dishonest server can spoil the model, not the claim"
OTHERS = {
    "at the site": "no record",
    "at the server": "no update of another site",
    "in the sum": "as many of them as the claim counts on must add their noise and keep their keys: otherwise the ε "
    "'alone' holds",
}
"""By the same."""
OWN = "its records, as their curator (central model): it clips, adds noise and keeps the ledger"
TO_SERVER = "its own records: it clips what it sends, and adds no noise"
"""What a site is trusted with; the second where the server is."""


def actors_of(claim: Claim, epsilon: float | None) -> list[Actor]:
    """Return the parties of a run; without a finite ε everyone who gets anything is trusted with records."""
    promised = claim.made and not (epsilon is not None and math.isinf(epsilon))
    whole = "" if promised else "everything: no finite ε is promised"
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
            whole or SERVER[noised] + ("" if central else RESULT),
        ),
        Actor("the other sites", "the global model after every round", whole or OTHERS[noised]),
        Actor("everyone who gets the model", "the final model", whole or "no record"),
        Actor(
            "the code that sites run, FedVeil and its packages",
            "the site's records",
            whole or "everything: audits and pinned versions are the evidence for it",
        ),
    ]


def unprotected_of(sites: Sequence[SiteReport], cut_test: str, claim: Claim) -> list[str]:
    """Return the quantities that no noise protects, each a phrase; ``cut_test`` as ``data.cut_test`` returns it."""
    sizes = [site.public_size for site in sites if site.public_size is not None]
    said = [
        f"the number of {claim.per or 'record'}s that each site declares ({number_text(sum(sizes))} in all)",
        "which site took part in which round, when, and how long it took",
        "each site's ledger: steps, ε spent and left over all runs on its records, its budget and its δ",
    ]
    if claim.made and claim.trusts_server:
        said = [
            f"the number of sites in the cohort ({number_text(sum(sizes))})",
            "when rounds began and ended, from anyone who watches the server or gets its logs",
            "whether enough sites were connected for a round",
        ]
    return [
        *said,
        "every setting of the run, its labels, and the public test set"
        + (", which was held out from the same source as the sites' records" if cut_test else ""),
        "the base model, which may have been trained on the same records before",
    ]
