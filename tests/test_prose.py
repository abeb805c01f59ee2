"""Figures in the prose of README and docs: each is of committed rows, of the README's run, or of the log."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli import cited, reference
from cli.prose import FIGURE, ROOT, TABLES, RowsOf, Saying, figures_of, read_sayings, rows_in, with_figures
from common.errors import ConfigError, DataError
from experiments.sweep.rows import Row, read_rows, write_rows

MADE = {*reference.PAGES, "settings.md"}
PAGES = [page for page in cited.PAGES if page.name not in MADE | {"LOG.md"}]
SAYINGS = read_sayings()
BESIDE = rf"```.*?```|{TABLES.pattern}|<!--.*?-->|`[^`\n]*`|\]\([^)]*\)"
"""What is no prose: code, tables of rows, comments, names, targets of links."""
BLOCK = re.compile(r"(?:^.*\S.*\n)+", flags=re.MULTILINE)
NO_UNIT = r"(?!\d|\.\d|-fold|\s*(?:[kMG]i?B|m?s|min|minutes?|seconds|hours|times|million|thousand|clips)\b)"
SHARE = rf"(?<![\d.,])[3-9]\d\.\d{NO_UNIT}"
POINTS = rf"(?<![\d.,])\d\.\d{NO_UNIT}"
LOSS = rf"(?<![\d.,])\d\.\d\d\d?{NO_UNIT}"


def figures(text: str) -> Iterator[re.Match[str]]:
    """Yield the figures of a page that look like results.

    They are accuracies: per cent with one decimal from 30 on, in prose and in tables of such; differences of them,
    with one decimal, where points or a gain are spoken of; and losses, with two decimals or three, below a heading
    from where a loss is spoken of.
    """
    text = re.sub(BESIDE, lambda match: re.sub(r"[^\n]", " ", match[0]), text, flags=re.DOTALL)
    judged = False
    for block in BLOCK.finditer(text):
        words = block[0]
        judged = (judged and not words.startswith("#")) or bool(re.search(r"(?<![Pp]rivacy )\bloss\b", words))
        kinds = [SHARE] + [POINTS] * bool(re.search(r"\bpoints?\b|\bgain", words)) + [LOSS] * judged
        table = words.lstrip().startswith("|")
        whole = not table or re.search(r"%|points|accuracy|loss", words.splitlines()[0])
        for cell in re.finditer(r".+" if whole else r"[^|\n]*%[^|\n]*", words):
            found = re.compile("|".join(kinds))
            yield from found.finditer(text, block.start() + cell.start(), block.start() + cell.end())


def untold(page: str, text: str, sayings: list[Saying]) -> list[str]:
    """Return the figures of a page that stand in no saying, each with what is around it."""
    told = [said.found(text).span() for said in sayings if said.page == page]
    return [
        f"{page} says {text[max(0, figure.start() - 60) : figure.end() + 20]!r}"
        for figure in figures(text)
        if not any(start <= figure.start() and figure.end() <= end for start, end in told)
    ]


def entries(log: str) -> dict[str, list[str]]:
    """Return the blocks of every entry of a log: paragraphs, items of lists, rows of tables."""
    held = {}
    for entry in re.split(r"^## ", log, flags=re.MULTILINE)[1:]:
        heading, _, body = entry.partition("\n")
        held[heading] = re.split(r"\n\s*\n|\n(?=\* |\|)", body)
    return held


def unheld(said: Saying, held: dict[str, list[str]]) -> bool:
    """Return whether no block of the entry has all the typed figures of a saying."""
    blocks = [FIGURE.findall(block) for block in held.get(said.log, [])]
    return not any(set(said.typed) <= set(block) for block in blocks)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_figure_of_the_prose_says_where_it_comes_from(page: Path) -> None:
    missing = untold(page.relative_to(ROOT).as_posix(), page.read_text(encoding="utf-8"), SAYINGS)
    assert not missing, f"put into docs/figures.toml: {missing}"


def test_typed_figures_stand_in_the_entry_of_the_log() -> None:
    held = entries((ROOT / "experiments" / "LOG.md").read_text(encoding="utf-8"))
    assert len(held) > 30
    missing = [f"{said.page}: {said.says}" for said in SAYINGS if said.log and unheld(said, held)]
    assert not missing, "no paragraph, item or row of that entry has these figures"


def test_sayings_are_of_pages_that_are_there() -> None:
    assert {said.page for said in SAYINGS} <= {page.relative_to(ROOT).as_posix() for page in PAGES}


@pytest.mark.parametrize("page", ["README.md", "docs/secure-sum.md", "docs/systems-measured.md"])
def test_one_digit_is_found_whatever_a_figure_is_of(page: str) -> None:
    """Figures of rows are put right, and words with another figure of the log are not there."""
    text = (ROOT / page).read_text(encoding="utf-8")
    sayings, rows_of = [said for said in SAYINGS if said.page == page], rows_in()
    places = [said.found(text) for said in sayings]
    for figure in figures(text):
        wrong = f"{text[: figure.end() - 1]}{(int(figure[0][-1]) + 1) % 10}{text[figure.end() :]}"
        place = next(place for place in places if place.start() <= figure.start() < place.end())
        if any(place.start(gap) <= figure.start() < place.end(gap) for gap in range(1, place.re.groups + 1)):
            assert with_figures(wrong, sayings, rows_of) == text, figure[0]
        else:
            with pytest.raises(ConfigError, match="says 0 times"):
                with_figures(wrong, sayings, rows_of)


PROSE = """# Page

It has 79.1 % at ε = 8, 2.2 points more, in 12.5 s, and 61.0
on the way.

The loss is 1.38. Of `77.7` nothing is known.

| bytes | time |
|---|---|
| 99.9 | 88.8 |

| job | after |
|---|---|
| 55.5 | 66.6 % |

## Another

Privacy loss is 1.23; 40.5 MB.
"""


def test_figures_of_prose_and_tables_are_found() -> None:
    assert [figure[0] for figure in figures(PROSE)] == ["79.1", "2.2", "61.0", "1.38", "66.6"]


def test_a_figure_that_stands_in_no_saying_is_found() -> None:
    sayings = [Saying("p", "It has 79.1 % at ε = 8, 2.2 points more, in 12.5 s, and 61.0 on the way", log="a")]
    assert len(untold("p", PROSE, sayings)) == 2
    sayings += [Saying("p", "loss is 1.38", log="a"), Saying("p", "66.6 %", log="a"), Saying("q", "nowhere", log="a")]
    assert not untold("p", PROSE, sayings)
    assert len(untold("p", PROSE.replace("the way.", "the way to 70.3."), sayings)) == 1


def test_typed_figures_must_stand_together() -> None:
    held = entries("## a\n\nOnly 79.1 and\n61.0 %.\n\n| 55.5 | 1.0 |\n| 66.6 | 2.0 |\n* 1.38\n* 1.39\n\n## b\n\n70.3\n")
    for says, found in (
        ("61.0 or 79.1", True),
        ("79.1 or 55.5", False),
        ("55.5", True),
        ("55.5 or 66.6", False),
        ("1.38 or 1.39", False),
        ("70.3", False),
    ):
        assert unheld(Saying("p", says, log="a"), held) is not found, says
    assert unheld(Saying("p", "79.1", log="c"), held)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Return a folder with rows of two sweeps, whose accuracies and losses are told apart by seed, ε and variant."""
    row = read_rows(cited.RESULTS / "tiny.jsonl")[0]

    def made(variant: str, seed: int, accuracy: float, arm: str = "federated", site: int | None = None) -> Row:
        told = {"variant": variant, "seed": seed, "accuracy": accuracy, "arm": arm, "site": site, "epsilon_asked": 8.0}
        return Row(**{**vars(row), **told, "loss": 2 * accuracy, "accuracy_before": 0.1, "loss_before": 3.0})

    ours = [made("ours", seed, accuracy) for seed, accuracy in ((2, 0.7), (1, 0.8), (3, 0.78))]
    theirs = [made("theirs", seed, accuracy) for seed, accuracy in ((1, 0.5), (2, 0.6), (3, 0.7))]
    alone = [
        made("ours", seed, accuracy, "local-only", site)
        for seed, site, accuracy in ((1, 0, 0.4), (1, 1, 0.6), (2, 0, 0.41), (2, 1, 0.63))
    ]
    write_rows(tmp_path / "one.jsonl", ours + theirs + alone)
    write_rows(tmp_path / "other.jsonl", [made("ours", 1, 0.9)])
    return tmp_path


@pytest.fixture
def rows_of(results: Path) -> RowsOf:
    """Return what reads them."""
    return rows_in(results)


@pytest.mark.parametrize(
    ("name", "figures"),
    [
        ("ours 8", ["76.0"]),
        ("ours 8: each", ["80.0", "70.0", "78.0"]),
        ("ours 8: seed 2", ["70.0"]),
        ("ours 8: before", ["10.0"]),
        ("ours 8: loss", ["1.52"]),
        ("ours 8: loss before", ["3.00"]),
        ("ours 8: loss seed 3", ["1.56"]),
        ("ours 8: low", ["62.9"]),  # 76 - 4.3027 · 5.2915 / √3
        ("ours 8: high", ["89.1"]),
        ("ours 8: least", ["70.0"]),
        ("ours 8: most", ["80.0"]),
        ("ours 8 - theirs 8", ["16.0"]),
        ("ours 8 - theirs 8: each", ["30.0", "10.0", "8.0"]),
        ("ours 8 - theirs 8: low", ["−14.2"]),  # 16 - 4.3027 · 12.1655 / √3
        ("theirs 8 - ours 8", ["−16.0"]),
        ("other/ours 8 - theirs 8", ["30.0"]),  # not of the same seeds
        ("ours 8 local-only", ["51.0"]),
        ("ours 8 local-only: each", ["50.0", "52.0"]),
        ("ours 8 local-only: sites", ["40.5", "61.5"]),
        ("ours 8 local-only: most", ["63.0"]),
    ],
)
def test_a_figure_of_rows_is_what_its_name_says(name: str, figures: list[str], rows_of: RowsOf) -> None:
    assert figures_of(name, "one", rows_of) == figures


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("hours 8", "no row is of 'hours 8'"),
        ("ours 3", "no row is of 'ours 3'"),
        ("ours 8 pooled", "no row is of 'ours 8 pooled'"),
        ("ours 8: seed 4", "is no figure of one"),
        ("ours 8: median", "is no figure of one"),
        ("other/ours 8 - theirs 8: low", "is no figure of one"),
    ],
)
def test_a_figure_of_no_row_is_refused(name: str, said: str, rows_of: RowsOf) -> None:
    with pytest.raises(ConfigError, match=said):
        figures_of(name, "one", rows_of)


def test_gaps_are_filled_in_their_order_over_broken_lines(rows_of: RowsOf) -> None:
    said = Saying("p", "has {} % and {}, {} and {} by seed", rows="one", are=["ours 8", "ours 8: each"])
    text = "It has 1.0 %\nand 2.0, 3.0 and\n  −4.0 by seed."
    assert with_figures(text, [said], rows_of) == "It has 76.0 %\nand 80.0, 70.0 and\n  78.0 by seed."


@pytest.mark.parametrize(
    ("said", "error"),
    [
        (Saying("p", "has {} %", rows="one", are=["ours 8: each"]), "3 figures for 1 gaps"),
        (Saying("p", "had {} %", rows="one", are=["ours 8"]), "p says 0 times, not once"),
        (Saying("p", "{} %", rows="one", are=["ours 8"]), "p says 2 times, not once"),
    ],
)
def test_a_saying_that_does_not_fit_its_page_is_refused(said: Saying, error: str, rows_of: RowsOf) -> None:
    with pytest.raises(ConfigError, match=error):
        with_figures("It has 1.0 %, and 2.0 %.", [said], rows_of)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ('says = "{} %"', "a gap needs rows"),
        ('says = "no gap"\nrows = "one"', "a gap needs rows"),
        ('says = "79.1 %"', "a typed figure log or other"),
        ('says = "{} %"\nrows = "one"\nlog = "a"', "a typed figure log or other"),
        ('says = "{} %"\nrow = "one"', "unknown field 'row'"),
    ],
)
def test_an_entry_that_says_too_little_is_refused(entry: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "figures.toml").write_text(f'[[figures]]\npage = "p"\n{entry}\n', encoding="utf-8")
    with pytest.raises(DataError, match=said):
        read_sayings(tmp_path / "figures.toml")


def test_a_run_that_stands_in_two_tables_counts_once(results: Path) -> None:
    rows = [
        Row(**{**vars(row), "seconds_in_all": 3600.0, "processor_seconds": 1800.0})
        for row in read_rows(results / "one.jsonl")
    ]
    untimed = Row(**{**vars(rows[0]), "seed": 7, "processor_seconds": None, "machine": "abacus, 3 cores"})
    write_rows(results / "one.jsonl", [*rows, untimed])
    write_rows(results / "other.jsonl", [Row(**{**vars(rows[0]), "sweep": "other", "variant": "as-said-there"})])
    said = cited.compute(results)
    assert f"of {len(rows) + 1} runs" in said
    assert f"took {len(rows) + 1}.0 hours" in said
    assert f"{len(rows)} of them tell their processor's time, {len(rows) / 2:.1f} hours" in said
    assert "abacus, 3 cores (1 run)" in said
    marked = "a\n<!-- compute -->\nold\n<!-- end of compute -->\nb\n"
    assert cited.with_results(marked, results) == marked.replace("old", said)
