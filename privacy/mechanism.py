"""The interface of a mechanism: what a run promises about whose records, and how that comes about.

A mechanism states its unit, its claim in words, how a site's records are sampled, clipped and noised
(its plan), what each release is priced as (the plan's event) and where the noise is added. No other
module asks whether a run is private: what a caller needs to know is a property here, named for what it means.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar, Literal

from fedveil.common.errors import ConfigError, MechanismError
from fedveil.common.requirements import Requirement
from fedveil.privacy.accounting import Release
from fedveil.privacy.claim import NOTHING, Claim
from fedveil.privacy.units import PERSON, RECORD, UNITS, Unit

if TYPE_CHECKING:
    from fedveil.common.config.run import RunConfig
    from fedveil.common.config.sections import PrivacyConfig, TrainingConfig
    from fedveil.privacy.events import Event
    from fedveil.privacy.plan import Plan, PrivacyPlan


@dataclass(frozen=True)
class Pace:
    """What is filled in where the training settings of a run with this mechanism are open."""

    server_optimizer: str
    local_steps: int
    sample_rate: float
    head_rate: float


class Mechanism(ABC):
    """One way to protect a site's records, or none. A row states all of it; nothing has a default that promises."""

    name: ClassVar[str]
    """What ``privacy.mode`` calls it."""
    claim: ClassVar[Claim]
    unit: Unit = RECORD
    """Whom the claim speaks of, and what is drawn and clipped."""
    units: ClassVar[tuple[Unit, ...]] = (RECORD, PERSON)
    """What ``privacy.unit`` may be: see ``of_unit``."""
    noised: ClassVar[Literal["at the site", "in the sum", "at the server", "nowhere"]]
    """Where the noise is added that the price counts on."""
    charged: ClassVar[bool]
    """Whether a round is charged to the site's ledger as releases. If not, it is written down there as an exposure, for
    which no budget pays: the site's steward must allow that, and no ε holds afterwards. Where the noise is added at the
    server, the ledger that is charged is the server's."""
    counted: ClassVar[bool]
    """Whether adding or removing one unit moves a count of records by at most 1, so that a noised count has a price."""
    starts: ClassVar[frozenset[str]]
    """What the factors' start may be made from (``Start.needs``)."""
    rehearsed: ClassVar[bool]
    """Whether a model rehearses before its first round: each record must have a gradient of its own, in a shape that
    follows from the record alone."""
    conceals: ClassVar[bool]
    """Whether a round that fails after it was written down is answered all the same, by steps on no record: a refusal
    would tell of the records."""
    pace: ClassVar[Pace]
    head: ClassVar[str]
    """What a report adds to a head that is trained."""
    longest: ClassVar[float]
    """How many times the round's middle update an honest one may be long."""
    exposes: ClassVar[str] = ""
    """What a site's log says of a round that is an exposure although something is promised; empty: nothing."""
    needs: ClassVar[str] = ""
    """A setting without which no run has it, because only people know its value; empty: every setting has a default."""
    requires: ClassVar[tuple[Requirement, ...]] = ()
    """Settings and the values that they must have; one that is left open gets it."""
    plans: ClassVar[type[PrivacyPlan] | None] = None
    """What its plans are, where a site is charged."""

    def of_unit(self, name: str) -> Mechanism:
        """Return the row with another unit: all that it does and says is then by that.

        A row that promises nothing is what it is by any unit.

        Raises:
            ConfigError: it cannot protect such units.
        """
        if name == self.unit.name or not self.claims:
            return self
        if name not in UNITS or UNITS[name] not in self.units:
            known = " or ".join(repr(unit.name) for unit in self.units)
            raise ConfigError(f"privacy.mode {self.name!r} does not protect a {name}: set privacy.unit to {known}")
        return _of_unit(self, UNITS[name])

    @property
    def claims(self) -> bool:
        """Whether anything is promised."""
        return self.claim is not NOTHING

    @property
    def summed(self) -> bool:
        """Whether the server is given a sum of what sites send, and no part of it."""
        return self.noised == "in the sum"

    @property
    def central(self) -> bool:
        """Whether the server is trusted: it clips, sums, noises, keeps the ledger, and passes on nothing else."""
        return self.noised == "at the server"

    @property
    def pooled(self) -> bool:
        """Whether a strategy is given what all sites make together, and no site's part of it."""
        return self.summed or self.central

    @property
    def only_a_sum(self) -> str:
        """Who takes no more of the sites than a sum, in words; empty: a strategy is given what each site sends."""
        if not self.pooled:
            return ""
        seen = "nobody sees" if self.summed else "no strategy is given"
        return f"with privacy.mode {self.name!r} {seen}"

    @property
    def requirements(self) -> tuple[Requirement, ...]:
        """What the row and its kind require of a run's settings."""
        return (
            *self.requires,
            *(() if self.summed else _OF_SUMS),
            *(() if self.central else _OF_COHORTS),
            *((Requirement("shorten-updates", True, _NO_SITE_ALONE),) if self.claims else ()),
        )

    def check(self, config: RunConfig) -> None:
        """Raise ConfigError, saying what to do, unless the run's figures fit what this row alone asks for."""
        del config

    def check_row(self) -> None:
        """Raise MechanismError if the row contradicts itself: who promises anything charges for it, and adds noise."""
        paid = self.charged or self.central
        if not self.claims == paid == (self.noised != "nowhere") == (self.plans is not None):
            raise MechanismError(
                f"the mechanism {self.name!r} must promise something, charge for it, add noise and have a plan, or do "
                "none of it"
            )
        if self.charged and self.central:
            raise MechanismError(
                f"the mechanism {self.name!r} must charge the server's ledger, and no site's: its noise is the server's"
            )
        if (self.claims and not self.claim.per) or self.counted > self.charged:
            raise MechanismError(f"the mechanism {self.name!r} must name its unit in one word, and charge for counts")
        if self.charged and not self.conceals:
            raise MechanismError(f"the mechanism {self.name!r} must conceal failures: a refusal would tell of records")
        if self.charged and "records, without privacy" in self.starts:
            raise MechanismError(f"the mechanism {self.name!r} has a start from records that nobody is charged for")
        if not self.charged and "paid release" in self.starts:
            raise MechanismError(f"the mechanism {self.name!r} has a start from a release that no plan of it makes")

    def plan(
        self,
        privacy: PrivacyConfig,
        training: TrainingConfig,
        total_steps: int,
        public_size: int,
        before: Sequence[Release] = (),
    ) -> PrivacyPlan:
        """Return the plan of a site that is charged, as ``PrivacyPlan.for_run``.

        Raises:
            ConfigError: nothing is charged, or as there.
            PrivacyError: as there.
        """
        return self._planned().for_run(privacy, training, total_steps, public_size, before)

    def site_plan(self, privacy: PrivacyConfig, training: TrainingConfig, total_steps: int, public_size: int) -> Plan:
        """Return what an honest site does at least: a plan that pays, as ``plan``, or else the exposing one.

        Raises:
            ConfigError, PrivacyError: as for ``plan``.
        """
        if self.charged:
            return self.plan(privacy, training, total_steps, public_size)
        return self.exposing_plan(privacy, training)

    def sample_rate(self, privacy: PrivacyConfig, training: TrainingConfig) -> float:
        """Return at which rate a site's step draws, which need not be what the run asks for."""
        return self.event(privacy, training).sample_rate if self.charged else training.sample_rate

    def broken_rule(
        self, allowed: Collection[str], *, without_privacy: bool, least_noise: float
    ) -> tuple[str, str, str] | None:
        """Return the rule of a site's policy that forbids runs of this row, its value and the run's, or None.

        Args:
            allowed: the rows that the policy allows, of those that promise something.
            without_privacy: whether it allows runs that promise nothing.
            least_noise: the least noise multiplier that it asks of the site's own noise; 0: it asks for none.
        """
        del without_privacy, least_noise
        if self.name in allowed:
            return None
        return "mechanisms", ", ".join(allowed), f"privacy.mode = {self.name!r}"

    def unfit_start(self, needs: str, unfit: str) -> str:
        """Return why a start that is made from what it ``needs`` cannot be had, as it says itself; empty: it can."""
        return "" if needs in self.starts else unfit

    def event(self, privacy: PrivacyConfig, training: TrainingConfig) -> Event:
        """Return what one step releases at the noise that the run sets; 1 where it leaves it open.

        Raises:
            ConfigError: nothing is charged.
        """
        return self._planned().event_of(privacy, training, privacy.noise_multiplier or 1.0)

    def _planned(self) -> type[PrivacyPlan]:
        if self.plans is None:
            raise ConfigError(
                f"privacy.mode is {self.name!r}: there is nothing to plan; set it to 'dp-sgd' for a private run"
            )
        return self.plans

    def exposing_plan(self, privacy: PrivacyConfig, training: TrainingConfig) -> Plan:
        """Return what a site does that is not charged, by the run's settings."""
        raise ConfigError(f"privacy.mode is {self.name!r}, in which every round is charged: it has no plan without")

    @abstractmethod
    def promise(self, privacy: PrivacyConfig) -> str:
        """Return in a few words what a run with these settings promises, for its first line."""


_NO_SITE_ALONE = "under a promise no site may draw the model as far as it likes"
_OF_SUMS = (
    Requirement("privacy.honest-sites", 0, "only in 'secure-sum' is noise shared"),
    Requirement("privacy.drop-outs", 0, "only in 'secure-sum' is a sum lost with a site"),
)
_OF_COHORTS = (
    Requirement("privacy.cohort", 0, "only in 'client-level' is the unit a whole site"),
    Requirement("privacy.site-rate", 1.0, "only in 'client-level' are sites drawn"),
    Requirement("privacy.ledger", "", "only in 'client-level' does the server keep a ledger"),
)


@lru_cache(maxsize=16)
def _of_unit(row: Mechanism, unit: Unit) -> Mechanism:
    made = copy.copy(row)
    # Of this instance: the row has them as its class's.
    vars(made).update(
        unit=unit, claim=unit.said(row.claim, summed=row.summed), counted=row.counted and not unit.grouped
    )
    return made
