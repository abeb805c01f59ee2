"""Client-level DP with a trusted server (Geyer, Klein and Nabi 2017, arXiv 1712.07557; McMahan et al. 2018, DP-FedAvg).

The unit is a whole site. A site trains as it likes and sends its change of the round, clipped once. The server clips
it again, since a site may lie, adds up what came, and noises the sum before it writes, scores or passes on anything.
The mean is the noised sum over a public constant: the rate at which sites are drawn times the cohort, never the number
of replies. What did not come, or is no update, counts as zero. All sites weigh the same: how many records one has is
private here.

The promise is against anyone who sees what the server gives away. It does not hold against the server, which sees every
update as it is: no record of a site is protected from it. So a site's ledger holds such a round as a release without
privacy, and the ledger that is charged is the server's.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from fedveil.common.errors import ConfigError
from fedveil.common.requirements import Requirement
from fedveil.privacy.claim import Claim
from fedveil.privacy.events import Event
from fedveil.privacy.figures import most_delta_text
from fedveil.privacy.mechanism import Mechanism, Pace
from fedveil.privacy.no_privacy import ExposingPlan
from fedveil.privacy.plan import PrivacyPlan
from fedveil.privacy.units import SITE, Unit

if TYPE_CHECKING:
    from torch import Tensor

    from fedveil.common.config.run import RunConfig
    from fedveil.common.config.sections import PrivacyConfig, TrainingConfig
    from fedveil.common.messages.state import AdapterState


@dataclass(frozen=True)
class ClippedPlan(ExposingPlan):
    """What a site does: train as without privacy, and send a change that is no longer than the clip."""

    clip_norm: float
    """L2 bound of the whole change, over all that is sent."""

    def told_size(self, public_size: int) -> int:
        """Return 1: every site has the same weight, and the number of its records stays at the site."""
        del public_size
        return 1

    def outgoing(self, contribution: AdapterState, received: AdapterState) -> AdapterState:
        """Return what was received plus the change, clipped once; as it was received if the change is not finite."""
        from fedveil.common.messages.tensors import apply, subtract

        before = {layer: {name: received[layer][name] for name in factors} for layer, factors in contribution.items()}
        change = apply(lambda tensor: tensor.double(), subtract(contribution, before))
        return apply(lambda old, moved: (old.double() + moved).to(old.dtype), before, clipped(change, self.clip_norm))


def clipped(change: AdapterState, clip_norm: float) -> AdapterState:
    """Return a site's change, float64, scaled to at most ``clip_norm`` in L2 over all its tensors together.

    One that is not finite contributes zero.
    """
    from fedveil.common.messages.tensors import apply, entries

    squares = math.fsum(float(tensor.double().square().sum()) for _, _, tensor in entries(change))
    norm = math.sqrt(squares) if math.isfinite(squares) else math.inf

    def scaled(tensor: Tensor) -> Tensor:
        if not math.isfinite(norm):  # 0 times infinity is not 0
            return tensor.new_zeros(tensor.shape)
        return tensor * (clip_norm / norm) if norm > clip_norm else tensor

    return apply(scaled, change)


class ClientLevelPlan(PrivacyPlan):
    """What the server does in a round: one release of the sum of clipped changes. Its public size is the cohort."""

    @classmethod
    def event_of(cls, privacy: PrivacyConfig, training: TrainingConfig, noise_multiplier: float) -> Event:
        """Return one noised sum, of sites that were drawn at ``privacy.site-rate``."""
        event = super().event_of(privacy, training, noise_multiplier)
        return event.having(sample_rate=privacy.site_rate)


class ClientLevel(Mechanism):
    """The unit is one site, and the server is trusted."""

    name: ClassVar[str] = "client-level"
    claim: ClassVar[Claim] = Claim(
        unit=SITE.what,
        adjacency=SITE.adjacency,
        adversary="anyone who sees what the server gives away: every round's model, the final one, and the run's "
        "folder; also other sites. The server is trusted: it sees every site's update without noise, so nothing is "
        "promised against it, about a site or about any record",
        sampler="Poisson, each site on its own, by the server, from the operating system's entropy; who was drawn is "
        "told to nobody but the sites that are asked. At a rate of 1 every site is in every round",
        per=SITE.name,
        leaves_out=SITE.leaves_out,
        across=SITE.across,
    )
    unit: Unit = SITE
    units: ClassVar[tuple[Unit, ...]] = (SITE,)
    noised: ClassVar[Literal["at the site", "in the sum", "at the server", "nowhere"]] = "at the server"
    # By the site's ledger, in which nothing pays for what the server sees.
    charged: ClassVar[bool] = False
    counted: ClassVar[bool] = False
    starts: ClassVar[frozenset[str]] = frozenset({"nothing", "weights", "public records"})
    rehearsed: ClassVar[bool] = False
    # A site that fails says so to the server, which counts it as zero and tells nobody.
    conceals: ClassVar[bool] = False
    exposes: ClassVar[str] = "the server is sent an update without noise: no record is protected from it"
    # A site's steps are free, as without privacy; what is paid for is one update a round.
    pace: ClassVar[Pace] = Pace(server_optimizer="none", local_steps=16, sample_rate=0.018, head_rate=5.0)
    head: ClassVar[str] = ", inside the clip"
    # No site is measured against the others, which would let one decide whether another counts.
    longest: ClassVar[float] = 1.0
    needs: ClassVar[str] = "privacy.cohort"
    requires: ClassVar[tuple[Requirement, ...]] = (
        Requirement("server.most-noise", 0.0, "the noise is the server's, and no site states any"),
    )
    plans: ClassVar[type[PrivacyPlan] | None] = ClientLevelPlan

    def check(self, config: RunConfig) -> None:
        """Refuse a run without a public cohort, and whatever would look at single updates."""
        privacy = config.privacy
        if not privacy.cohort:
            raise ConfigError(
                "privacy.mode 'client-level' needs privacy.cohort: how many sites there are, at most, a public number "
                "that the noised sum is divided by, such as 200"
            )
        if privacy.cohort < config.min_sites:
            raise ConfigError(
                f"min-sites is {config.min_sites}, more than privacy.cohort, which is {privacy.cohort}: lower min-sites"
            )
        if privacy.cohort < len(config.site_names):
            raise ConfigError(
                f"named-sites names {len(config.site_names)} sites, more than privacy.cohort, which is "
                f"{privacy.cohort}: raise it, or name fewer"
            )
        if privacy.delta > 1 / privacy.cohort:
            raise ConfigError(
                f"privacy.delta is {privacy.delta:g}, above 1/{privacy.cohort} of the cohort's sites: set it to "
                f"{most_delta_text(privacy.cohort)} or less"
            )

    def broken_rule(
        self, allowed: Collection[str], *, without_privacy: bool, least_noise: float
    ) -> tuple[str, str, str] | None:
        """Return the rule as elsewhere, and one that asks for noise of the site's own, which adds none."""
        broken = super().broken_rule(allowed, without_privacy=without_privacy, least_noise=least_noise)
        asked = f"privacy.mode = {self.name!r}"
        if broken:
            return *broken[:2], f"{asked}, in which no record is protected from the server"
        if least_noise:
            return "min-noise-multiplier", f"{least_noise:g}", f"{asked}, in which a site adds none"
        return None

    def exposing_plan(self, privacy: PrivacyConfig, training: TrainingConfig) -> ClippedPlan:
        """Return the run's rate, pass and clip."""
        return ClippedPlan(training.sample_rate, training.batch_tokens, privacy.clip_norm)

    def promise(self, privacy: PrivacyConfig) -> str:
        """Return the budget of the cohort, and who is trusted."""
        return (
            f"ε ≤ {privacy.epsilon:g} at δ = {privacy.delta:g} for each whole site, with a trusted server: no record "
            "is protected from it"
        )
