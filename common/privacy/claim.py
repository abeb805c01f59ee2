"""The words of the privacy claim: unit, neighbours, adversary, sampler. Every report prints them."""

from __future__ import annotations

UNIT = "one training record of one site"
ADJACENCY = "add or remove one record"
ADVERSARY = "a server that sees every upload and knows who took part, and anyone who sees the final model"
SAMPLER = "Poisson, each record on its own, from the operating system's entropy"
NO_CLAIM = "none: privacy.mode is 'none', so nothing is promised about any record"
