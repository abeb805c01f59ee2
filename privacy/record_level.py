"""Record-level DP-SGD at the sites (Abadi et al. 2016, "Deep Learning with Differential Privacy", algorithm 1).

Every step of a site is one release: a Poisson sample of its records, each record's gradient clipped in
L2, the sum noised at the site and divided by a public constant. The server is not trusted with anything.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from fedveil.privacy.claim import Claim
from fedveil.privacy.mechanism import Mechanism, Pace
from fedveil.privacy.plan import PrivacyPlan
from fedveil.privacy.units import RECORD

if TYPE_CHECKING:
    from fedveil.common.config.sections import PrivacyConfig


class DPSGD(Mechanism):
    """The unit is one record; see ``PrivacyPlan`` for what a site does, and ``privacy.dpsgd`` for how."""

    name: ClassVar[str] = "dp-sgd"
    claim: ClassVar[Claim] = Claim(
        unit="one training record of one site",
        adjacency="add or remove one record",
        adversary="a server that sees every upload and knows who took part, and anyone who sees the final model",
        sampler="Poisson, each record on its own, from the operating system's entropy",
        per="record",
        leaves_out=RECORD.leaves_out,
    )
    noised: ClassVar[Literal["at the site", "in the sum", "at the server", "nowhere"]] = "at the site"
    charged: ClassVar[bool] = True
    counted: ClassVar[bool] = True
    starts: ClassVar[frozenset[str]] = frozenset({"nothing", "weights", "public records", "paid release"})
    rehearsed: ClassVar[bool] = True
    conceals: ClassVar[bool] = True
    # A step pays for its noise, so a round is one step on one large batch. The one Adam of the run is the server's: it
    # sees noise that the sites' average has already lowered.
    pace: ClassVar[Pace] = Pace(server_optimizer="adam", local_steps=1, sample_rate=0.33, head_rate=4.0)
    head: ClassVar[str] = ", inside the clip"
    # Honest ones were up to 1.13 times as long where noise or Adam decided, 2.05 times with SGD on models so tiny that
    # the records did.
    longest: ClassVar[float] = 2.0
    plans: ClassVar[type[PrivacyPlan]] = PrivacyPlan

    def promise(self, privacy: PrivacyConfig) -> str:
        """Return the budget of a site."""
        return f"ε ≤ {privacy.epsilon:g} at δ = {privacy.delta:g} for each site"
