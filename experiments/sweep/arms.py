"""The arms of a comparison: the federation, and the baselines that show whether federating helped.

An arm is one row of ``ARMS``. Its runs go through the same code as every run; what differs is which sites there are.
But for ``fitted-head``, which is no run: a head that is fitted to all records once a seed (``fitted_head``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedveil.common.config.flat import Scalar

READ = ("model.", "data.", "head.pool", "head.start", "head.phrases", "device", "precision")
"""Settings, or their beginnings, that decide what a frozen encoder makes of which records."""
FROZEN: dict[str, Scalar] = {"strategy": "fedavg-lora", "adapter.name": "none", "privacy.mode": "none"}


@dataclass(frozen=True)
class Arm:
    """One way to bring the records of a division to a model."""

    name: str
    about: str
    """In words, for a table's legend."""
    dash: str
    """Of its lines in a picture, as matplotlib names it."""
    fill: str
    """Of its marks, likewise."""
    alone: bool = False
    """Whether each site has a run of its own, over its own part."""
    together: bool = False
    """Whether all records are at one site."""
    fitted: bool = False
    """Whether a head is fitted to the frozen encoder instead of a run: without privacy, whatever the ε."""
    baseline: bool = True
    """Whether it is compared with the federation; nothing of a baseline needs to travel."""

    def sites(self, sites: int) -> list[int | None]:
        """Return the site of each of its runs: every one of ``sites``, or None for a run that is not one site's own."""
        return list(range(sites)) if self.alone else [None]

    def nodes(self, sites: int, site: int | None) -> list[dict[str, Scalar]]:
        """Return the node configurations of one run; ``site`` is one of those that ``sites`` returns."""
        if self.together:
            return [{"partition-id": 0, "num-partitions": 1}]
        parts = range(sites) if site is None else (site,)
        return [{"partition-id": part, "num-partitions": sites} for part in parts]

    def overrides(self) -> dict[str, Scalar]:
        """Return the settings that its runs have whatever the variant says: a baseline has one site."""
        return {"min-sites": 1} if self.baseline else {}

    def settings(self, own: Mapping[str, Scalar]) -> dict[str, Scalar]:
        """Return what of a variant's settings its runs have: of a fitted head, what decides records and features."""
        if not self.fitted:
            return dict(own)
        return {key: value for key, value in own.items() if key.startswith(READ)} | FROZEN


ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm("federated", "all sites train together", "-", "full", baseline=False),
        Arm("local-only", "each site trains alone on its own part", ":", "none", alone=True),
        Arm("pooled", "all records at one site", "--", "bottom", together=True),
        Arm(
            "fitted-head",
            "a head fitted to all records on the frozen encoder, without privacy, its penalty by cross-validation",
            "-.",
            "top",
            fitted=True,
        ),
    )
}
FEDERATED = "federated"
BASELINES = tuple(name for name, arm in ARMS.items() if arm.baseline)
