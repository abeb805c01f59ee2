"""Tables of measured results from ``experiments/results``: the pages of ``docs/results`` and README's table."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from docs.make.page import page
from docs.make.tables import markdown
from fedveil.common.errors import DataError
from fedveil.common.tasks import headline_of
from fedveil.common.words import UNKNOWN, bytes_text
from fedveil.experiments.sweep.groups import Group, Interval, groups, interval
from fedveil.experiments.sweep.rows import Row, read_rows, results_file
from fedveil.experiments.sweep.summary import COLUMN_NOTES, markdown_of

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "experiments" / "results"
MOVIES = "rotten-tomatoes"
TRANSFERS = "transfer.csv"
TITLES: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "movie-reviews": ("Movie reviews", {"Rotten Tomatoes, four sites": MOVIES}),
    "sst2": ("SST-2", {"SST-2, six sites": "sst2"}),
    "pairs": ("Pairs of sentences", {"SNLI, three sites": "snli"}),
    "newswire": ("Newswire", {"Reuters, 52 topics, three sites": "reuters"}),
    "medical-questions": (
        "Medical questions",
        {"MedMCQA by 16 specialties, four sites with unequal shares of them": "medmcqa-specialties"},
    ),
    "names-and-labels": (
        "Names in texts, and several labels a text",
        {"Names in tweets, five sites": "names", "Comments with any of 28 labels, three sites": "goemotions"},
    ),
    "encoders": (
        "A larger encoder",
        {
            "all-mpnet-base-v2 on movie reviews": "mpnet",
            "all-mpnet-base-v2 on SST-2, six sites, ε = 3": "mpnet-sst2",
        },
    ),
    "word-problems": (
        "A language model",
        {
            "ASDiv, SmolLM2-135M-Instruct, two sites": "asdiv",
            "The same, begun at a library of five other tasks": "library",
        },
    ),
    "preferences-and-rewards": (
        "Preferences and rewards",
        {"Pairs of answers, two sites": "preferences", "GRPO on word problems, two sites": "grpo"},
    ),
    "speech": (
        "Speech",
        {
            "Sentences of made-up voices, four sites": "spoken-sentences",
            "Digits, fourteen sites of one voice": "spoken-digits",
        },
    ),
    "persons": ("Persons", {"Sentences of IMDB reviews, at one ε per record and per person": "persons"}),
    "secure-aggregation": ("Secure aggregation", {"Four sites": "secure-sum", "Twenty sites": "secure-sum-of-twenty"}),
    "systems": (
        "Published systems",
        {
            "Movie reviews, the plain job, ε = 8": "systems",
            "Arithmetic word problems, ε = 8": "systems-asdiv",
            "As published: own steps and plain averages, ε = 8": "as-published",
        },
    ),
}
"""Pages of results: their title, and the sweeps of their tables by heading."""
SHORT = ("variant", "recipe", "arm", "ε", "runs", "accuracy, %", "start, %", "loss", "bytes", "processor")
README_ROWS: Mapping[str, tuple[str, str]] = {
    "default": ("metric", "open"),
    "head alone": ("head-only", "head-only"),
    "`fedavg-lora`": ("fedavg-lora", "fedavg-lora"),
    "`ffa-lora`": ("ffa-lora", "ffa-lora"),
    "`fed-sb`": ("fed-sb", "fed-sb"),
    "`fed-svd`": ("fed-svd", "fed-svd"),
}
"""Rows of README's table: the variant with privacy, and the one without."""
LATER: Mapping[str, tuple[str, str, str, str]] = {
    "DPO": ("preferences", "dpo", "dpo-open", ""),
    "judge of format, Bradley-Terry": ("preferences", "judge-of-format", "judge-of-format", ""),
    "judge of format, in text": ("preferences", "judge-in-text-of-format-plain", "judge-in-text-of-format-open", ""),
    "judge of format, in text, long steps": ("preferences", "judge-in-text-of-format", "", ""),
    "judge of facts, in text": ("preferences", "judge-in-text-plain", "", ""),
    "judge of facts, in text, long steps": ("preferences", "judge-in-text", "", ""),
    "judge of facts, Bradley-Terry": ("preferences", "judge-of-facts", "judge-of-facts", ""),
    "GRPO on Fed-SB": ("grpo", "fed-sb", "open", ""),
    "GRPO on DoRA": ("grpo", "dora", "dora-open", ""),
    "GRPO on Fed-SB, a judge's reward": ("grpo", "", "judged-open", ""),
    "library, by vote": ("library", "vote", "", "zero"),
    "library, by descriptions": ("library", "described", "described-open", "zero"),
    "mixture of a library": ("library", "mixture", "", "zero"),
    "the same by plain steps": ("library", "mixture-plain", "mixture-open", "zero"),
    "composed, linear": ("library", "composed-by-linear", "composed-by-linear-open", "zero"),
    "composed, TIES": ("library", "composed-by-ties", "composed-by-ties-open", "zero"),
    "dictation, FedAvg-LoRA": ("spoken-sentences", "fedavg-lora", "fedavg-lora", ""),
    "dictation, S2-LoRA in turn": ("spoken-sentences", "s2-lora", "s2-lora", "fedavg-lora"),
    "spoken digits, head alone": ("spoken-digits", "head-only", "head-only", ""),
    "spoken digits, FFA-LoRA": ("spoken-digits", "ffa-lora", "ffa-lora", "head-only"),
    "S2-LoRA in turn": ("systems", "s2-lora-in-turn", "s2-lora-in-turn", "head-only"),
    "EVA, ranks spread": ("systems", "eva-ranks", "eva-ranks", "head-only"),
    "DiffoRA, gates in turn": ("systems", "diffora-gates", "diffora-gates", "head-only"),
    "Bone": ("systems", "bone", "bone", "head-only"),
    "full fine-tuning of square layers": ("systems", "full-square", "full-square", "head-only"),
}
"""Systems of other tasks, or that complete a row: sweep, variants with and without privacy, control."""
README_TABLE = re.compile(r"(<!-- results -->\n).*?(<!-- end of results -->)", flags=re.DOTALL)
SERIES: Mapping[tuple[str, bool], str] = {
    ("metric", True): "default",
    ("head-only", True): "head alone",
    ("fed-svd", True): "FedSVD",
    ("ffa-lora", True): "FFA-LoRA",
    ("open", False): "no privacy",
}
"""The five series of README's plot, by variant and whether the run is private."""
PLOT = ROOT / "docs" / "pictures" / "accuracy.png"


def rows_of(sweep: str, folder: Path = RESULTS) -> list[Row]:
    """Return the committed rows of a sweep.

    Raises:
        DataError: it has none, or they cannot be read.
    """
    rows = read_rows(results_file(folder, sweep))
    if not rows:
        raise DataError(f"{results_file(folder, sweep)} has no rows: run the sweep with --results experiments/results")
    return rows


def results_page(title: str, sweeps: Mapping[str, str], folder: Path = RESULTS) -> str:
    """Return a page of ``docs/results``."""
    parts = []
    for heading, sweep in sweeps.items():
        command = f"`fedveil sweep experiments/sweeps/{sweep}.toml --results experiments/results` makes these rows."
        rows = rows_of(sweep, folder)
        found = groups(rows)
        columns: Sequence[str] = SHORT
        if any(costs.rounds_to_gain for group in found for costs in group.costs):
            columns = (*SHORT, "rounds to 95 %", "bytes to 95 %", "memory")
            command += (
                " Rounds and bytes of all sites until the score first had 95 % of its gain; the most memory of a run."
            )
        if any(group.apart for group in found):
            columns, command = (*columns, "apart"), f"{command} {COLUMN_NOTES['apart']}"
        table = markdown_of(rows, columns).partition("\n\n<details>")[0]
        parts.append((heading, table, command))
    return page(title, "", *parts)


def later_table(folder: Path = RESULTS) -> str:
    """Return the table of ``LATER``: each system's score before training, its control's, and its own."""
    rows = []
    for name, (sweep, private, open_, control) in LATER.items():
        of_sweep = rows_of(sweep, folder)
        found = {(group.variant, group.epsilon_asked): group for group in _federated(of_sweep)}
        wanted = ((control, 8.0), (private, 3.0), (private, 8.0), (open_, None))
        scores = [_accuracy(found[key]) if key in found else UNKNOWN for key in wanted]
        row = next(row for row in of_sweep if row.variant in (private, open_))
        rows.append([name, headline_of(row.settings), f"{100 * row.accuracy_before:.1f}", *scores])
    rows += _transfers(folder / TRANSFERS)
    return markdown(("system", "figure, in %", "zero start", "control, ε = 8", "ε = 3", "ε = 8", "no privacy"), rows)


def _transfers(file: Path) -> list[list[str]]:
    """Return a row of each base model that finished runs were taught to."""
    with file.open(encoding="utf-8", newline="") as stream:
        table = list(csv.DictReader(stream))

    def mean(base: str, column: str, *, private: bool) -> str:
        chosen = [row for row in table if row["base model"] == base and (row["epsilon"] != "none") == private]
        return _percent(interval([float(row[column]) for row in chosen])) if chosen else UNKNOWN

    both = "head and adapter"
    return [
        [
            f"transfer to {base}",
            "accuracy",
            UNKNOWN,
            mean(base, "head alone", private=True),
            UNKNOWN,
            mean(base, both, private=True),
            mean(base, both, private=False),
        ]
        for base in dict.fromkeys(row["base model"] for row in table)
    ]


def systems_page() -> str:
    """Return the page of published systems, with those of other tasks beside their controls."""
    title, sweeps = TITLES["systems"]
    text = (
        "Rows of the tables above, of [speech](speech.md) and of [preferences and "
        "rewards](preferences-and-rewards.md). The control of a system on movie reviews or digits is the head alone, "
        "on dictation FedAvg-LoRA, of a library the zero start, of a transfer a head alone on the teacher's answers "
        "([log](../../experiments/log/2026-12-01-transfer-to-another-base-model.md)), and of DPO and GRPO fine-tuning "
        "on the answers, which has the larger reward at ε = 8 "
        "([log](../../experiments/log/2026-12-01-rewards-and-pairs.md)). Before training both answers of a pair "
        "have one score, which is not right: chance is 50. Of one run where no interval stands."
    )
    heading = "Systems of other tasks beside their controls"
    return f"{results_page(title, sweeps)}\n## {heading}\n\n{text}\n\n{later_table()}\n"


PAGES: Mapping[str, Callable[[], str]] = {
    f"results/{name}.md": partial(results_page, title, sweeps) for name, (title, sweeps) in TITLES.items()
} | {"results/systems.md": systems_page}
"""The pages of results by their names in ``docs``."""


def readme_table(folder: Path = RESULTS) -> str:
    """Return README's table of results: mean accuracy on movie reviews, with 95 % intervals over divisions."""
    found = {(group.variant, group.epsilon_asked): group for group in _federated(rows_of(MOVIES, folder))}
    rows = []
    for name, (private, open_) in README_ROWS.items():
        with_privacy, without = found[private, 8.0], found[open_, None]
        sent = bytes_text(round(with_privacy.payload or 0.0))
        rows.append([name, _accuracy(with_privacy), _accuracy(without), sent])
    return markdown(("run", "ε = 8, accuracy in %", "no privacy, accuracy in %", "bytes of a run at ε = 8"), rows)


def with_results(readme: str, folder: Path = RESULTS) -> str:
    """Return README with its table of results as the committed rows have it."""
    return README_TABLE.sub(lambda match: f"{match[1]}{readme_table(folder)}\n{match[2]}", readme)


def plotted(folder: Path = RESULTS) -> list[Row]:
    """Return the rows of README's plot, each called by its series."""
    order = list(SERIES.values())
    rows = [
        replace(row, variant=SERIES[row.variant, row.epsilon_asked is not None])
        for row in rows_of(MOVIES, folder)
        if row.arm == "federated" and (row.variant, row.epsilon_asked is not None) in SERIES
    ]
    return sorted(rows, key=lambda row: order.index(row.variant))


def plot(folder: Path = RESULTS) -> bytes:
    """Return README's plot as a PNG, which carries the hash of its rows."""
    from fedveil.experiments.sweep.pictures import drawn_from, epsilon_figure, png

    rows = plotted(folder)
    return png(epsilon_figure(groups(rows), []), drawn_from(rows, []))


def is_current(picture: bytes, folder: Path = RESULTS) -> bool:
    """Return whether a picture was drawn from these rows. Its bytes also depend on the version of matplotlib."""
    from fedveil.experiments.sweep.pictures import drawn_from

    return f"rows {drawn_from(plotted(folder), [])}".encode() in picture


def _federated(rows: Sequence[Row]) -> list[Group]:
    return groups([row for row in rows if row.arm == "federated"])


def _accuracy(group: Group) -> str:
    return _percent(group.accuracy)


def _percent(found: Interval) -> str:
    half = "" if found.half is None else f" ± {100 * found.half:.1f}"
    return f"{100 * found.mean:.1f}{half}"
