"""Secure aggregation: a sum whose parts no one sees, with noise that sites share and pairwise masks that cancel.

Every site rounds its noised vector to whole steps of a public grid, as words of 32 bits, and adds one mask for each
other site, modulo 2³². The two sites of a pair derive the same mask, one adds it and the other takes it away. What a
server gets from one site is then uniform; only all vectors of an attempt together have a sum that means something,
and that is the rounded sum of what the sites hold, plus noise of which each has drawn a part.

An attempt in which one vector is missing has no sum, unless its sites have shared the secrets of their masks
(``recovery``). Who may take part is a roster of signing keys that
a site's steward was given by hand (``roster``); the masks' keys are drawn for each attempt and signed
(``attempt``); everything that the sites must agree on goes into each mask (``context``), so that a server that sent
two sites different things gets uniform words. Why noise that each site rounds for itself keeps the price of one
Gaussian: ``docs/concepts/secure-aggregation.md``, which has the proof and the adversary.

The masks are those of Bonawitz et al. 2017, "Practical Secure Aggregation for Privacy-Preserving Machine Learning",
section 4.1.
"""

from __future__ import annotations

from fedveil.privacy.secure_sum.attempt import KeyOffer, SiteAttempt
from fedveil.privacy.secure_sum.context import AttemptName, Context, Task, Terms
from fedveil.privacy.secure_sum.identity import Identity
from fedveil.privacy.secure_sum.recovery import RecoverableAttempt, Sharing
from fedveil.privacy.secure_sum.roster import Roster
from fedveil.privacy.secure_sum.rounding import check_headroom, noise_share, rounded, total
from fedveil.privacy.secure_sum.shares import least_sites, may_be_lost, threshold
from fedveil.privacy.secure_sum.survivors import Agreement, Holder, are_shares, unmasked

__all__ = [
    "Agreement",
    "AttemptName",
    "Context",
    "Holder",
    "Identity",
    "KeyOffer",
    "RecoverableAttempt",
    "Roster",
    "Sharing",
    "SiteAttempt",
    "Task",
    "Terms",
    "are_shares",
    "check_headroom",
    "least_sites",
    "may_be_lost",
    "noise_share",
    "rounded",
    "threshold",
    "total",
    "unmasked",
]
