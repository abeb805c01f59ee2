"""Means of a sweep's rows over seeds, with 95 % intervals by Student's t, as a Markdown table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fedveil.common.adapters import ADAPTERS
from fedveil.common.config.sections import Scalar
from fedveil.common.errors import DataError
from fedveil.common.run_lines import BesideFile, BesideRow
from fedveil.common.tasks import TASKS
from fedveil.common.words import UNKNOWN, bytes_text, counted, decimal_text, seconds_text
from fedveil.experiments.sweep.arms import ARMS
from fedveil.experiments.sweep.file import epsilon_name
from fedveil.experiments.sweep.rows import Row
from fedveil.privacy import mechanism_of
from fedveil.privacy.figures import NO_CLAIM, epsilon_text
from fedveil.strategies import ROWS
from fedveil.strategies.base import is_exact

CONFIDENCE = 0.95


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
    """Mean of a seed, all its runs one after another; None as of a run."""
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


def groups(rows: Sequence[Row]) -> list[Group]:
    """Return the groups in the order of their first rows; a seed in which a site is missing does not count."""
    held: dict[tuple[str, str, float | None], list[Row]] = {}
    for row in rows:
        held.setdefault((row.variant, row.arm, row.epsilon_asked), []).append(row)
    found = (_group(*key, members) for key, members in held.items())
    return [group for group in found if group]


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
        honest=_honest(counting),
    )


def _honest(rows: Sequence[Row]) -> int:
    """Return the fewest honest sites that an ε of the rows counts on; 0: none of them does."""
    return min((row.honest for row in rows if row.honest), default=0)


def _of_a_seed(seeds: Sequence[Sequence[float | None]]) -> float | None:
    if any(value is None for values in seeds for value in values):
        return None
    return statistics.mean(sum(value or 0.0 for value in values) for values in seeds)


def _exact(settings: Mapping[str, Scalar]) -> bool:
    strategy, adapter = ROWS[str(settings["strategy"])], ADAPTERS[str(settings["adapter.name"])]
    return is_exact(strategy, adapter)


def _intruders(rows: Sequence[Row]) -> tuple[float, float | None, int] | None:
    own = [row.intruders for row in rows if row.intruders is not None]
    noise = [row.intruders_of_noise for row in rows if row.intruders_of_noise is not None]
    some = len(noise) if len(noise) < len(own) else 0
    return (statistics.mean(own), statistics.mean(noise) if noise else None, some) if own else None


SAME = ("model.name", "model.task", "data.name", "data.test")
"""Settings in which runs must be alike to be read beside each other."""


def beside(rows: Sequence[Row], settings: Mapping[str, Scalar]) -> BesideFile:
    """Return what a sweep's runs came to that are on the same base model and data as a run.

    Args:
        rows: of the sweep.
        settings: of the run, flat.

    Raises:
        DataError: there is none.
    """
    alike = [row for row in rows if all(row.settings.get(key) == settings.get(key) for key in SAME)]
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
        for group in groups(alike)
    ]
    if not found:
        said = ", ".join(f"{key} {settings.get(key)!r}" for key in SAME)
        raise DataError(f"the table holds no finished run with this run's {said}: name the table of such a sweep")
    return BesideFile(found)


def markdown_of(rows: Sequence[Row], columns: Sequence[str] = ()) -> str:
    """Return the table of a sweep's rows with what its figures mean below it.

    Args:
        rows: of one sweep or several.
        columns: of ``COLUMNS``, in the table's order; none: all but those of ``OPTIONAL`` without a figure.
    """
    if not rows:
        return "No run has ended.\n"
    found = groups(rows)
    shown = columns or filled(found)
    lines = [f"| {' | '.join(shown)} |", "|" + "---|" * len(shown)]
    lines += [f"| {' | '.join(COLUMNS[name](group) for name in shown)} |" for group in found]
    needed, more = notes(rows, shown)
    lines += ["", " ".join(needed), "", f"<details><summary>{FOLDED}</summary>", ""]
    lines += [*(f"* {sentence}" for sentence in more), "", "</details>"]
    return "\n".join(lines) + "\n"


def filled(found: Sequence[Group]) -> list[str]:
    """Return the columns of a table of all: those of ``OPTIONAL`` that have no figure stay away."""
    return [
        name for name, words in COLUMNS.items() if name not in OPTIONAL or any(words(one) != UNKNOWN for one in found)
    ]


def _accuracy_words(group: Group) -> str:
    half = "" if group.accuracy.half is None else f" ± {100 * group.accuracy.half:.1f}"
    if not group.labelled:
        return f"{100 * group.accuracy.mean:.1f}{half}"
    each = [f"{100 * value:.1f}" for value in (group.sites or group.values)]
    told = f" ({'each site: ' if group.sites else ''}{', '.join(each)})" if len(each) > 1 else ""
    return f"**{100 * group.accuracy.mean:.1f}**{half}{told}"


def _loss_words(group: Group) -> str:
    if group.labelled:
        return decimal_text(group.loss.mean, 3)
    apart = "" if group.loss.half is None else f" ± {group.loss.half:.3f}"
    seeds = f" ({', '.join(decimal_text(value, 3) for value in group.losses)})" if len(group.losses) > 1 else ""
    return f"**{decimal_text(group.loss.mean, 3)}**{apart}{seeds}"


def _epsilon_words(group: Group) -> str:
    return epsilon_name(group.epsilon_asked) + (f" (h = {group.honest})" if group.honest else "")


def _payload_words(group: Group) -> str:
    return UNKNOWN if group.payload is None else bytes_text(round(group.payload))


def _intruder_words(group: Group) -> str:
    if group.intruders is None:
        return UNKNOWN
    own, noise, some = group.intruders
    of_noise = UNKNOWN if noise is None else f"{noise:.1f}" + (f" of {some}" if some else "")
    return f"{own:.1f} ({of_noise})"


def _sent_words(group: Group) -> str:
    return UNKNOWN if group.sent is None else f"{group.sent:,}"


def _exact_words(group: Group) -> str:
    if group.sent is None:
        return UNKNOWN
    return "yes" if group.exact else "no"


def _processor_words(group: Group) -> str:
    return seconds_text(group.processor_seconds)


COLUMNS: Mapping[str, Callable[[Group], str]] = {
    "variant": lambda group: f"`{group.variant}`",
    "recipe": lambda group: group.recipe,
    "arm": lambda group: group.arm,
    "ε": _epsilon_words,
    "runs": lambda group: str(len(group.values)),
    "accuracy, %": _accuracy_words,
    "start, %": lambda group: f"{100 * group.before:.1f}",
    "loss": _loss_words,
    "ε spent": lambda group: NO_CLAIM if group.epsilon is None else epsilon_text(group.epsilon),
    "bytes": _payload_words,
    "time": lambda group: seconds_text(group.seconds),
    "numbers": _sent_words,
    "exact": _exact_words,
    "processor": _processor_words,
    "intruders (of noise)": _intruder_words,
}
OPTIONAL = frozenset({"numbers", "exact", "processor", "intruders (of noise)"})
"""Columns that a table has only where one of its rows has a figure for them."""


FOLDED = "What a seed, an arm and each column is, and where the runs ran"
"""Over the sentences that a page folds away."""
MOST_CODES = 3
"""Of more states of the code than that the summary has the number, and each row its own."""


def notes(rows: Sequence[Row], shown: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return sentences on what the figures are, and are not: those that every reader needs, and the others.

    Args:
        rows: at least one.
        shown: columns of the table.
    """
    arms = [ARMS[name] for name in ARMS if any(row.arm == name for row in rows)]
    deltas = sorted({row.delta for row in rows if row.delta is not None})
    fitted = sorted({row.penalty for row in rows if row.penalty is not None})
    divided = len({row.settings["data.seed"] for row in rows}) > 1
    cut = divided and not any(row.settings["data.test"] for row in rows)
    paying = [mechanism_of(row.settings) for row in rows if row.epsilon is not None]
    units = sorted({row.claim.per for row in paying if row is not None})
    sizes = sorted({row.test_records for row in rows})
    mean = statistics.mean(row.accuracy for row in rows)
    error = 100 * math.sqrt(mean * (1 - mean) / sizes[0])
    codes = sorted({row.code[:12] for row in rows})
    machines = sorted({f"{row.machine}, {row.precision}" for row in rows})
    told = [f"Mean over seeds ± half of its {100 * CONFIDENCE:.0f} % interval (Student's t); in brackets each seed."]
    if any(not TASKS[str(row.settings["model.task"])].labelled for row in rows):
        told.append("Accuracy is the share of right next tokens: judge by the loss, in nats a token.")
    if deltas:
        held = ", ".join(f"{delta:g}" for delta in deltas)
        told.append(f"ε is per {' or '.join(units)}, of the site that has spent most, at δ {held}.")
    if _honest(rows):
        told.append("With h it counts on so many honest sites; what holds without them is in each run's report.")
    size = " to ".join(f"{size:,}" for size in dict.fromkeys((sizes[0], sizes[-1])))
    if all(TASKS[str(row.settings["model.task"])].labelled for row in rows):
        told.append(
            f"The test part has {size} records, so one accuracy has a standard error of {error:.1f} points"
            + ("." if cut else ", which is not in the intervals, as all runs share the test part.")
        )
    else:
        told.append(f"The test part has {size} records.")
    needed = told
    told = []
    if "arm" in shown:
        told.append(f"Arms: {'; '.join(f'{arm.name}, {arm.about}' for arm in arms)}.")
    if fitted:
        told.append(f"λ of the fitted heads: {', '.join(f'{penalty:.1g}' for penalty in fitted)}.")
    seed = "A seed gives the start and, without privacy, the order of batches"
    told.append(f"{seed}; {_division(divided, cut)}.")
    if deltas:
        told.append("Under privacy sampling and noise are never seeded: each run draws its own.")
    if "numbers" in shown:
        told.append("Numbers: the most that a site sends in a round, which is what it trains.")
    if "exact" in shown:
        told.append("Exact: whether new weights are exactly the mean of the sites' weights.")
    if "processor" in shown:
        told.append("Processor: seconds of all cores together, with loading and reports.")
    if "intruders (of noise)" in shown:
        told.append(
            "Intruders are new directions among the ten largest of each layer's weights, summed over layers, in "
            "brackets those that the run's noise alone makes."
        )
        if any(group.intruders and group.intruders[2] for group in groups(rows)):
            told.append("Where the noise's own count is known of some of the runs alone, brackets say of how many.")
    timed = [row.seconds_in_all for row in rows if row.seconds_in_all is not None]
    took = f", {seconds_text(sum(timed))} in all" if len(timed) == len(rows) else ""
    few = len(codes) <= MOST_CODES
    code = f"code {', '.join(codes)}" if few else f"{len(codes)} states of the code, of which each row names its own"
    told.append(f"{counted(len(rows), 'run')}{took}, on {'; '.join(machines)}, {code}.")
    return needed, told


def _division(divided: bool, cut: bool) -> str:
    if not divided:
        return "the division is the same for all"
    return f"it divides the records{' and cuts the test part' if cut else ''}, too"
