"""Rows of a sweep grouped over seeds: means with 95 % intervals by Student's t."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fedveil.common.adapters import ADAPTERS
from fedveil.common.config.flat import Scalar
from fedveil.common.errors import DataError
from fedveil.common.messages.formats import FLOAT32
from fedveil.common.other_runs import BesideFile, BesideRow
from fedveil.common.tasks import TASKS
from fedveil.common.words import UNKNOWN
from fedveil.experiments.sweep.arms import ARMS
from fedveil.experiments.sweep.rows import Costs, Row
from fedveil.strategies import ROWS
from fedveil.strategies.base import is_exact

CONFIDENCE = 0.95
FEWEST_PAIRED = 10
"""Seeds from which on variants are compared seed by seed; fewer cannot rank what lies as near as most variants do."""


@dataclass(frozen=True)
class Interval:
    """A mean with the interval around it."""

    mean: float
    half: float | None
    """Half of the interval; None of a single value, which has none."""

    @property
    def low(self) -> float:
        """The lower end; the mean itself without an interval."""
        return self.mean - (self.half or 0.0)

    @property
    def high(self) -> float:
        """The upper end, likewise."""
        return self.mean + (self.half or 0.0)


def interval(values: Sequence[float]) -> Interval:
    """Return the mean of at least one value with its 95 % interval: t of n - 1 degrees · s / √n.

    >>> found = interval([0.74, 0.75, 0.76])
    >>> round(found.mean, 4), round(found.half, 4)
    (0.75, 0.0248)
    """
    from scipy.special import stdtrit

    count = len(values)
    if count < 2 or not all(map(math.isfinite, values)):  # a model that diverged has no interval
        return Interval(statistics.mean(values), None)
    t = float(stdtrit(count - 1, (1 + CONFIDENCE) / 2))
    return Interval(statistics.mean(values), t * statistics.stdev(values) / math.sqrt(count))


@dataclass(frozen=True)
class Group:
    """The rows of a variant, an arm and an ε, over seeds. Of ``local-only`` a seed's value is the mean over sites."""

    variant: str
    recipe: str
    """Of its runs; unknown of a fitted head, which none fills in."""
    arm: str
    epsilon_asked: float | None
    seeds: list[int]
    values: list[float]
    """The accuracy of each seed."""
    accuracy: Interval
    sites: list[float]
    """The mean accuracy of each site, of runs that are one site's own."""
    before: float
    losses: list[float]
    """The loss of each seed, in nats."""
    loss: Interval
    labelled: bool
    """Whether accuracy is of labels. Where it is of next tokens, runs are judged by their loss."""
    epsilon: float | None
    """The largest that was spent; None without a claim."""
    delta: float | None
    payload: float | None
    """Mean bytes of a run, both ways and all sites; None of a baseline."""
    seconds: float | None
    """Mean of a seed, all its runs one after another; None as for a run."""
    intruders: tuple[float, float | None, int] | None
    """Mean count of a run, that of the noise alone of as many runs as it is known of, and how many these are, 0 where
    they are all; None where none are counted."""
    sent: int | None
    """The most numbers that one site sends in a round; None where that is not known."""
    processor_seconds: float | None
    """Mean of a seed, as ``seconds``; None where that of a run is not known."""
    exact: bool
    """Whether the new weights are exactly the mean of the sites' weights."""
    honest: int
    """How many honest sites its ε counts on; 0: on none, as each site adds all of its noise itself."""
    costs: list[Costs]
    """Of its runs, as far as they are known."""
    averages: bool
    """Whether the server takes the plain average, and has no optimiser."""
    apart: Interval | None = None
    """Mean difference, seed by seed, from the first group of the same arm, ε and ``averages``: of accuracy, or of loss
    without labels. None of that one, and of fewer seeds than ``FEWEST_PAIRED``."""


def groups(rows: Sequence[Row]) -> list[Group]:
    """Return the groups in the order of their first rows; a seed in which a site is missing does not count."""
    members: dict[tuple[str, str, float | None], list[Row]] = {}
    for row in rows:
        members.setdefault((row.variant, row.arm, row.epsilon_asked), []).append(row)
    found = [group for key, of_group in members.items() if (group := _group(*key, of_group))]
    return [replace(group, apart=_apart(group, found)) for group in found]


def _apart(group: Group, others: Sequence[Group]) -> Interval | None:
    same = [one for one in others if _kind(one) == _kind(group)]
    own, first = (
        dict(zip(one.seeds, one.values if one.labelled else one.losses, strict=True)) for one in (group, same[0])
    )
    common = own.keys() & first.keys()
    if group is same[0] or len(common) < FEWEST_PAIRED:
        return None
    return interval([own[seed] - first[seed] for seed in sorted(common)])


def _kind(group: Group) -> tuple[str, float | None, bool]:
    return group.arm, group.epsilon_asked, group.averages


def _group(variant: str, arm: str, epsilon: float | None, rows: Sequence[Row]) -> Group | None:
    seeds = dict.fromkeys(row.seed for row in rows)
    by_seed = [[row for row in rows if row.seed == seed] for seed in seeds]
    whole = [members for members in by_seed if len(members) == len(ARMS[arm].sites(members[0].sites))]
    if not whole:
        return None
    counting = [row for members in whole for row in members]
    sites = sorted({row.site for row in counting if row.site is not None})
    values = [statistics.mean(row.accuracy for row in members) for members in whole]
    spent = [row.epsilon for row in counting if row.epsilon is not None]
    losses = [statistics.mean(row.loss for row in members) for members in whole]
    payloads = [
        row.bytes_down + row.bytes_up for row in counting if row.bytes_down is not None and row.bytes_up is not None
    ]
    return Group(
        variant=variant,
        recipe=UNKNOWN if ARMS[arm].fitted else str(counting[-1].settings.get("recipe", UNKNOWN)),
        arm=arm,
        epsilon_asked=epsilon,
        seeds=[members[0].seed for members in whole],
        values=values,
        accuracy=interval(values),
        sites=[statistics.mean(row.accuracy for row in counting if row.site == site) for site in sites],
        before=statistics.mean(row.accuracy_before for row in counting),
        losses=losses,
        loss=interval(losses),
        labelled=TASKS[str(rows[0].settings["model.task"])].labelled,
        epsilon=max(spent, default=None),
        delta=max((row.delta for row in counting if row.delta is not None), default=None),
        payload=statistics.mean(payloads) if payloads else None,
        seconds=_of_a_seed([[row.seconds for row in members] for members in whole]),
        intruders=_intruders(counting),
        sent=max((row.sent for row in counting if row.sent is not None), default=None),
        processor_seconds=_of_a_seed([[row.processor_seconds for row in members] for members in whole]),
        exact=_exact(counting[-1].settings),
        honest=fewest_honest(counting),
        costs=[row.costs for row in counting if row.costs is not None],
        averages=counting[-1].settings.get("server.optimizer") == "none",
    )


def fewest_honest(rows: Sequence[Row]) -> int:
    """Return the fewest honest sites that an ε of the rows counts on; 0: none of them does."""
    return min((row.honest for row in rows if row.honest), default=0)


def _of_a_seed(seeds: Sequence[Sequence[float | None]]) -> float | None:
    if any(value is None for values in seeds for value in values):
        return None
    return statistics.mean(sum(value or 0.0 for value in values) for values in seeds)


def _exact(settings: Mapping[str, Scalar]) -> bool:
    strategy, adapter = ROWS[str(settings["strategy"])], ADAPTERS[str(settings["adapter.name"])]
    return is_exact(strategy, adapter) and settings.get("wire.precision", FLOAT32) == FLOAT32


def _intruders(rows: Sequence[Row]) -> tuple[float, float | None, int] | None:
    own = [row.intruders for row in rows if row.intruders is not None]
    noise = [row.intruders_of_noise for row in rows if row.intruders_of_noise is not None]
    some = len(noise) if len(noise) < len(own) else 0
    return (statistics.mean(own), statistics.mean(noise) if noise else None, some) if own else None


SAME = ("model.name", "model.task", "data.name", "data.test")
"""Settings that runs share if their results are compared."""


def beside(rows: Sequence[Row], settings: Mapping[str, Scalar]) -> BesideFile:
    """Return the results of a sweep's runs on the same base model and data as a run.

    Args:
        rows: of the sweep.
        settings: of the run, flat.

    Raises:
        DataError: the sweep has no such run.
    """
    same = [row for row in rows if all(row.settings.get(key) == settings.get(key) for key in SAME)]
    found = [
        BesideRow(
            variant=group.variant,
            arm=group.arm,
            epsilon_asked=group.epsilon_asked,
            accuracy_before=group.before,
            accuracy=group.accuracy.mean,
            half=group.accuracy.half,
            runs=len(group.values),
            honest=group.honest,
        )
        for group in groups(same)
    ]
    if not found:
        said = ", ".join(f"{key} {settings.get(key)!r}" for key in SAME)
        raise DataError(f"the table holds no finished run with this run's {said}: name the table of such a sweep")
    return BesideFile(found)
