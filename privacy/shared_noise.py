"""Record-level DP-SGD on a sum of all sites, whose parts no one sees: the sites share its noise.

A round is one step: every site sends the noised sum of its clipped gradients, masked (``privacy.secure_sum``), and the
server divides the sum of all and steps. What a site draws is a part of the noise that is priced; the parts of
``privacy.honest-sites`` make the whole. So the price depends on them, and a ledger holds a second one: of the site's
own noise alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from fedveil.common.errors import ConfigError
from fedveil.common.requirements import Requirement, one_plain_step
from fedveil.privacy.claim import Claim
from fedveil.privacy.events import Event, SummedGaussian
from fedveil.privacy.mechanism import Mechanism, Pace
from fedveil.privacy.plan import PrivacyPlan
from fedveil.privacy.units import RECORD

if TYPE_CHECKING:
    from fedveil.common.config.run import RunConfig
    from fedveil.common.config.sections import PrivacyConfig, TrainingConfig
    from fedveil.privacy.dpsgd import PrivateSteps


class SecureSumPlan(PrivacyPlan):
    """A plan whose noise is a part of what is priced."""

    kind: ClassVar[str] = SummedGaussian.name

    @classmethod
    def event_of(cls, privacy: PrivacyConfig, training: TrainingConfig, noise_multiplier: float) -> Event:
        """Return one sum of all sites."""
        event = super().event_of(privacy, training, noise_multiplier)
        return event.having(honest_sites=privacy.honest_sites)

    @property
    def noise_std(self) -> float:
        """Standard deviation of this site's part: ``honest_sites`` of them are no less than what is priced."""
        from fedveil.privacy.secure_sum.rounding import noise_share

        event = self.event
        return noise_share(event.noise_multiplier, event.clip_norm, int(event.figures["honest_sites"]))

    def stepping(self) -> type[PrivateSteps]:
        """Return the step whose sum is sent."""
        from fedveil.privacy import dpsgd

        return dpsgd.SummedSteps


class SecureSum(Mechanism):
    """The unit is one record; the noise is that of the sum."""

    name: ClassVar[str] = "secure-sum"
    claim: ClassVar[Claim] = Claim(
        unit="one training record of one site",
        adjacency="add or remove one record",
        adversary="a server that sees every upload and knows who took part, together with some of the sites, as long "
        "as privacy.honest-sites others of each sum are honest, and anyone who sees the final model",
        sampler="Poisson, each record on its own, from the operating system's entropy",
        per="record",
        leaves_out=(
            *RECORD.leaves_out_of_sums,
            "what holds where fewer sites are honest than privacy.honest-sites, or the masks fail: each site's own "
            "noise alone, at the second price in its ledger",
        ),
        across=RECORD.across_sums,
    )
    noised: ClassVar[Literal["at the site", "in the sum", "at the server", "nowhere"]] = "in the sum"
    charged: ClassVar[bool] = True
    counted: ClassVar[bool] = False
    starts: ClassVar[frozenset[str]] = frozenset({"nothing", "weights", "public records"})
    rehearsed: ClassVar[bool] = True
    conceals: ClassVar[bool] = True
    pace: ClassVar[Pace] = Pace(server_optimizer="adam", local_steps=1, sample_rate=0.33, head_rate=4.0)
    head: ClassVar[str] = ", inside the clip"
    longest: ClassVar[float] = 2.0
    needs: ClassVar[str] = "privacy.honest-sites"
    requires: ClassVar[tuple[Requirement, ...]] = one_plain_step("a round is one sum of clipped gradients")
    plans: ClassVar[type[PrivacyPlan]] = SecureSumPlan

    def check(self, config: RunConfig) -> None:
        """Refuse too few sites."""
        from fedveil.privacy.secure_sum.roster import LEAST_SITES
        from fedveil.privacy.secure_sum.shares import least_sites

        privacy = config.privacy
        if not privacy.honest_sites:
            raise ConfigError(
                "privacy.mode 'secure-sum' needs privacy.honest-sites: how many sites of a sum do as they should and "
                "tell the server nothing, such as 3 of 4"
            )
        if privacy.honest_sites + privacy.colluders < LEAST_SITES:
            raise ConfigError(
                f"privacy.honest-sites and privacy.colluders ask for {privacy.honest_sites + privacy.colluders} sites "
                f"in a sum, which needs {LEAST_SITES}: in a sum of two, each knows the other's part"
            )
        begins = least_sites(privacy.honest_sites, privacy.colluders, privacy.drop_outs)
        begins = max(begins, config.min_sites + privacy.drop_outs)
        if 0 < len(config.site_names) < begins:
            raise ConfigError(
                f"named-sites names {len(config.site_names)} sites, and a sum with these min-sites, "
                f"privacy.honest-sites, colluders and drop-outs begins with {begins}: name more, or lower one"
            )

    def unfit_start(self, needs: str, unfit: str) -> str:
        """Return why a start cannot be had; no site's own release is seen."""
        reason = super().unfit_start(needs, unfit)
        if not reason or needs != "paid release":
            return reason
        return (
            f"asks each site for a release of its own, and with privacy.mode {self.name!r} nobody sees "
            "more than a sum: choose another, such as 'public-metric'"
        )

    def promise(self, privacy: PrivacyConfig) -> str:
        """Return the budget of a site, and on whom it depends."""
        budget = f"ε ≤ {privacy.epsilon:g} at δ = {privacy.delta:g} for each site"
        if privacy.honest_sites == 1:
            return f"{budget}, whatever other sites do (h = 1)"
        return f"{budget}, as long as {privacy.honest_sites} sites of each sum are honest (h = {privacy.honest_sites})"
