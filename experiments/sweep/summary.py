"""A sweep's results as a Markdown table, with notes on what its figures are."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence

from fedveil.common.tasks import TASKS, Scored, headline_of
from fedveil.common.words import UNKNOWN, bytes_text, counted, decimal_text, seconds_text
from fedveil.experiments.sweep.arms import ARMS
from fedveil.experiments.sweep.file import epsilon_name
from fedveil.experiments.sweep.groups import CONFIDENCE, FEWEST_PAIRED, Group, fewest_honest, groups
from fedveil.experiments.sweep.rows import Row
from fedveil.privacy import mechanism_of
from fedveil.privacy.figures import NO_CLAIM, epsilon_text


def markdown_of(rows: Sequence[Row], columns: Sequence[str] = (), *, folded: bool = True) -> str:
    """Return the table of a sweep's rows with notes below it.

    Args:
        rows: of one sweep or several.
        columns: of ``COLUMNS``, in the table's order; none: all but those of ``OPTIONAL`` without a figure.
        folded: whether to add the notes that a page folds away.
    """
    if not rows:
        return "No run has ended.\n"
    header, *_ = table = table_of(rows, columns)
    lines = [*lines_of(table), "", " ".join(notes(rows)), ""]
    if folded:
        lines += [f"<details><summary>{FOLDED}</summary>", "", *(f"* {note}" for note in more_notes(rows, header))]
        lines += ["", "</details>"]
    return "\n".join(lines) + "\n"


def table_of(rows: Sequence[Row], columns: Sequence[str] = ()) -> list[list[str]]:
    """Return the header and the lines of a table, each cell in Markdown; arguments as for ``markdown_of``."""
    found = groups(rows)
    shown = list(columns) or [
        name for name, words in COLUMNS.items() if name not in OPTIONAL or any(words(one) != UNKNOWN for one in found)
    ]
    return [shown, *([COLUMNS[name](group) for name in shown] for group in found)]


def lines_of(table: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table in Markdown."""
    header, *rows = [f"| {' | '.join(cells)} |" for cells in table]
    return [header, "|" + "---|" * len(table[0]), *rows]


def _accuracy_words(group: Group) -> str:
    half = "" if group.accuracy.half is None else f" ± {100 * group.accuracy.half:.1f}"
    if not group.labelled:
        return f"{100 * group.accuracy.mean:.1f}{half}"
    each = [f"{100 * value:.1f}" for value in (group.sites or group.values)]
    each_of = f" ({'each site: ' if group.sites else ''}{', '.join(each)})" if len(each) > 1 else ""
    return f"**{100 * group.accuracy.mean:.1f}**{half}{each_of}"


def _loss_words(group: Group) -> str:
    if group.labelled:
        return decimal_text(group.loss.mean, 3)
    apart = "" if group.loss.half is None else f" ± {group.loss.half:.3f}"
    seeds = f" ({', '.join(decimal_text(value, 3) for value in group.losses)})" if len(group.losses) > 1 else ""
    return f"**{decimal_text(group.loss.mean, 3)}**{apart}{seeds}"


def _intruder_words(group: Group) -> str:
    if group.intruders is None:
        return UNKNOWN
    own, noise, some = group.intruders
    of_noise = UNKNOWN if noise is None else f"{noise:.1f}" + (f" of {some}" if some else "")
    return f"{own:.1f} ({of_noise})"


def _mean_words(group: Group, name: str, words: Callable[[float], str]) -> str:
    values = [getattr(costs, name) for costs in group.costs if getattr(costs, name) is not None]
    some = f" (of {len(values)})" if 0 < len(values) < len(group.costs) else ""
    return words(statistics.mean(values)) + some if values else UNKNOWN


def _most_words(group: Group, name: str) -> str:
    values = [getattr(costs, name) for costs in group.costs if getattr(costs, name) is not None]
    return bytes_text(max(values)) if values else UNKNOWN


def _rank_words(group: Group) -> str:
    ranks = [rank for costs in group.costs for rank in (costs.ranks or {}).values()]
    runs = [len(costs.ranks) for costs in group.costs if costs.ranks]
    if not ranks:
        return UNKNOWN
    return f"{min(ranks)} to {max(ranks)}, mean {statistics.mean(ranks):.1f} in {statistics.mean(runs):.4g} layers"


def _apart_words(group: Group) -> str:
    if group.apart is None:
        return UNKNOWN
    scale, decimals = (100, 1) if group.labelled else (1, 3)
    half = "" if group.apart.half is None else f" ± {scale * group.apart.half:.{decimals}f}"
    return f"{scale * group.apart.mean:+.{decimals}f}{half}"


COLUMNS: Mapping[str, Callable[[Group], str]] = {
    "variant": lambda group: f"`{group.variant}`",
    "recipe": lambda group: group.recipe,
    "arm": lambda group: group.arm,
    "ε": lambda group: epsilon_name(group.epsilon_asked) + (f" (h = {group.honest})" if group.honest else ""),
    "runs": lambda group: str(len(group.values)),
    "accuracy, %": _accuracy_words,
    "start, %": lambda group: f"{100 * group.before:.1f}",
    "loss": _loss_words,
    "apart": _apart_words,
    "ε spent": lambda group: NO_CLAIM if group.epsilon is None else epsilon_text(group.epsilon),
    "bytes": lambda group: UNKNOWN if group.payload is None else bytes_text(round(group.payload)),
    "time": lambda group: seconds_text(group.seconds),
    "numbers": lambda group: UNKNOWN if group.sent is None else f"{group.sent:,}",
    "exact": lambda group: UNKNOWN if group.sent is None else "yes" if group.exact else "no",
    "processor": lambda group: seconds_text(group.processor_seconds),
    "intruders (of noise)": _intruder_words,
    "rounds to 95 %": lambda group: _mean_words(group, "rounds_to_gain", lambda mean: f"{mean:.1f}"),
    "bytes to 95 %": lambda group: _mean_words(group, "bytes_to_gain", lambda mean: bytes_text(round(mean))),
    "a round": lambda group: _mean_words(group, "round_seconds", seconds_text),
    "memory": lambda group: _most_words(group, "memory"),
    "GPU memory": lambda group: _most_words(group, "gpu_memory"),
    "ranks": _rank_words,
}
OPTIONAL = frozenset(
    {
        "apart",
        "numbers",
        "exact",
        "processor",
        "intruders (of noise)",
        "rounds to 95 %",
        "bytes to 95 %",
        "a round",
        "memory",
    }
    | {"GPU memory", "ranks"}
)
"""Columns that a table has only where one of its rows has a figure for them."""


COLUMN_NOTES: Mapping[str, str] = {
    "apart": "Apart: the mean difference, seed by seed, from the first variant of the same arm and ε whose server "
    "takes the plain average, or has an optimiser, as its own; of accuracy in points (without labels, of loss), ± half "
    "of its 95 % interval (Student's t).",
    "numbers": "Numbers: the most that a site sends in a round, which is what it trains.",
    "exact": "Exact: whether new weights are exactly the mean of the sites' weights.",
    "processor": "Processor: seconds of all cores together, with loading and reports.",
    "intruders (of noise)": "Intruders are new directions among the ten largest of each layer's weights, summed over "
    "layers, in brackets those that the run's noise alone makes.",
    "rounds to 95 %": "Rounds, and bytes of all sites, until the score first had 95 % of its last gain over the start: "
    "means over the runs that gained, interpolated between scored rounds.",
    "a round": "A round: the median of a run's rounds.",
    "memory": "Memory: the most that the process of a run had resident, or torch on the GPU; the largest of the runs.",
    "ranks": "Ranks by layer at the end, where a run chose them.",
}
FOLDED = "What a seed, an arm and each column is, and where the runs ran"
"""Over the sentences that a page folds away."""
MOST_CODES = 3
"""Of more states of the code than that the summary has the number, and each row its own."""


def notes(rows: Sequence[Row]) -> list[str]:
    """Return the notes on a table's figures that every reader needs; at least one row."""
    deltas = sorted({row.delta for row in rows if row.delta is not None})
    paying = [mechanism_of(row.settings) for row in rows if row.epsilon is not None]
    units = sorted({row.claim.per for row in paying if row is not None})
    sizes = sorted({row.test_records for row in rows})
    labelled = [TASKS[str(row.settings["model.task"])].labelled for row in rows]
    found = [f"Mean over seeds ± half of its {100 * CONFIDENCE:.0f} % interval (Student's t); in brackets each seed."]
    if len({row.seed for row in rows}) < FEWEST_PAIRED:
        found.append(f"Variants are not ranked: fewer than {FEWEST_PAIRED} runs cannot tell most of them apart.")
    tokens = [not TASKS[str(row.settings["model.task"])].counted for row in rows]
    if any(tokens) and {headline_of(row.settings) for row in rows} == {Scored().headline}:
        found.append("Accuracy is the share of right next tokens: judge by the loss, in nats a token.")
    if deltas:
        at = ", ".join(f"{delta:g}" for delta in deltas)
        found.append(f"ε is per {' or '.join(units)}, of the site that has spent most, at δ {at}.")
    if fewest_honest(rows):
        found.append("With h it counts on so many honest sites; what holds without them is in each run's report.")
    size = " to ".join(f"{size:,}" for size in dict.fromkeys((sizes[0], sizes[-1])))
    if others := sorted({headline_of(row.settings) for row in rows} - {Scored().headline}):
        found.append(f"In place of accuracy is {' and '.join(others)}. The test part has {size} records.")
    elif all(labelled):
        mean = statistics.mean(row.accuracy for row in rows)
        error = 100 * math.sqrt(mean * (1 - mean) / sizes[0])
        shared = "." if _cuts_test(rows) else ", which is not in the intervals, as all runs share the test part."
        found.append(
            f"The test part has {size} records, so one accuracy has a standard error of {error:.1f} points{shared}"
        )
    else:
        found.append(f"The test part has {size} records.")
    return found


def more_notes(rows: Sequence[Row], shown: Sequence[str]) -> list[str]:
    """Return the other notes on a table: on its arms, seeds and columns, and on where the runs ran.

    Args:
        rows: at least one.
        shown: columns of the table.
    """
    arms = [ARMS[name] for name in ARMS if any(row.arm == name for row in rows)]
    found = [f"Arms: {'; '.join(f'{arm.name}, {arm.about}' for arm in arms)}."] if "arm" in shown else []
    if fitted := sorted({row.penalty for row in rows if row.penalty is not None}):
        found.append(f"λ of the fitted heads: {', '.join(f'{penalty:.1g}' for penalty in fitted)}.")
    seed = "A seed gives the start and, without privacy, the order of batches"
    found.append(f"{seed}; {_division(rows)}.")
    if any(row.delta is not None for row in rows):
        found.append("Under privacy sampling and noise are never seeded: each run draws its own.")
    found += [note for column, note in COLUMN_NOTES.items() if column in shown]
    if "intruders (of noise)" in shown and any(group.intruders and group.intruders[2] for group in groups(rows)):
        found.append("Where the noise's own count is known of some of the runs alone, brackets say of how many.")
    return [*found, _where(rows)]


def _where(rows: Sequence[Row]) -> str:
    codes = sorted({row.code[:12] for row in rows})
    machines = sorted({f"{row.machine}, {row.precision}" for row in rows})
    timed = [row.seconds_in_all for row in rows if row.seconds_in_all is not None]
    took = f", {seconds_text(sum(timed))} in all" if len(timed) == len(rows) else ""
    few = len(codes) <= MOST_CODES
    code = f"code {', '.join(codes)}" if few else f"{len(codes)} states of the code, of which each row names its own"
    return f"{counted(len(rows), 'run')}{took}, on {'; '.join(machines)}, {code}."


def _division(rows: Sequence[Row]) -> str:
    if not _is_divided(rows):
        return "the division is the same for all"
    return f"it divides the records{' and cuts the test part' if _cuts_test(rows) else ''}, too"


def _is_divided(rows: Sequence[Row]) -> bool:
    """Return whether seeds divide the records."""
    return len({row.settings["data.seed"] for row in rows}) > 1


def _cuts_test(rows: Sequence[Row]) -> bool:
    """Return whether seeds cut the test part as well."""
    return _is_divided(rows) and not any(row.settings["data.test"] for row in rows)
