"""Means and intervals of a sweep's rows, and their pictures: each figure is the rows', and a page loads nothing."""

from __future__ import annotations

import csv
import math
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from swept_rows import OPEN, SEEDS, SITES, alone, row
from typer.testing import CliRunner

from fedveil.cli.main import app
from fedveil.common.adapters import ADAPTERS
from fedveil.common.errors import ConfigError, DataError
from fedveil.common.run_lines import BaselineFile, RoundLine
from fedveil.experiments.sweep.conduct import row_words
from fedveil.experiments.sweep.groups import beside, groups, interval
from fedveil.experiments.sweep.one_run import to_gain
from fedveil.experiments.sweep.pictures import bytes_figure, epsilon_figure, write_pictures
from fedveil.experiments.sweep.published import SHIPPED, Published, read_published
from fedveil.experiments.sweep.rows import Costs, Row, read_rows, write_rows
from fedveil.experiments.sweep.summary import markdown_of
from fedveil.reports.scores import beside_cells
from fedveil.strategies import ROWS
from fedveil.strategies.base import is_exact

ROOT = Path(__file__).resolve().parents[2]


@given(st.lists(st.integers(0, 1000).map(lambda right: right / 1000), min_size=2, max_size=12, unique=True))
def test_an_interval_is_scipys(values: list[float]) -> None:
    found = interval(values)
    low, high = stats.t.interval(0.95, len(values) - 1, sum(values) / len(values), stats.sem(values))
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-9)


def test_one_run_and_runs_of_a_model_that_diverged_have_no_interval() -> None:
    assert (interval([0.7]).mean, interval([0.7]).half) == (0.7, None)
    assert [(str(found.mean), found.half) for found in map(interval, ([1.0, math.inf], [math.nan, 1.0]))] == [
        ("inf", None),
        ("nan", None),
    ]


def test_a_seeds_value_of_sites_alone_is_their_mean_and_a_seed_without_one_does_not_count() -> None:
    (group,) = groups([*SITES, alone(0.1, 0, 3)])
    assert group.values == pytest.approx([0.65, 0.8])
    assert group.sites == pytest.approx([0.65, 0.8])
    assert group.accuracy.mean == pytest.approx(0.725)
    assert group.seconds == 20.0
    assert group.payload is None
    assert groups([alone(0.1, 0, 3)]) == []


def test_the_table_has_mean_interval_each_seed_and_each_site() -> None:
    text = markdown_of([*SEEDS, *SITES, *OPEN])
    assert (
        "| `wide` | metric | federated | 8 | 3 | **76.0** ± 6.6 (74.0, 75.0, 79.0) | 50.0 | 0.500 | 7.995 | 3.00 MB |"
        in text
    )
    assert "| `wide` | metric | local-only | 8 | 2 | **72.5** ± 95.3 (each site: 65.0, 80.0) |" in text
    assert "| `wide` | metric | federated | none | 1 | **85.0** | 50.0 | 0.500 | no claim |" in text
    assert "8 runs, 96.0 s in all, on x86_64, 2 cores, float32, code aaaaaaaaaaaa." in text
    assert markdown_of([]) == "No run has ended.\n"


def test_the_time_of_a_trusted_servers_run_is_told_nowhere() -> None:
    central = row(0.75, seed=4, seconds=None, seconds_in_all=None)
    assert "12 s" in row_words(SEEDS[0])
    assert " s" not in row_words(central).replace(" spent", "")
    assert "in all, on" in markdown_of(SEEDS)
    assert "in all, on" not in markdown_of([*SEEDS, central])


def test_a_line_about_a_sum_says_on_how_many_honest_sites_its_epsilon_counts() -> None:
    assert "ε 7.995 spent" in row_words(SEEDS[0])
    summed = replace(SEEDS[0], settings={**SEEDS[0].settings, "privacy.honest-sites": 3})
    assert "ε 7.995 (h = 3) spent" in row_words(summed)
    assert replace(summed, epsilon=None).honest == 0


def test_columns_of_newer_rows_stand_where_a_row_has_them() -> None:
    plain = row(0.75, sent=36_864, processor_seconds=90.0)
    settings = {**plain.settings, "strategy": "fedavg-lora", "adapter.name": "lora"}
    both = [
        replace(plain, settings=settings),
        replace(plain, variant="square", settings={**settings, "strategy": "fed-sb", "adapter.name": "lora-sb"}),
    ]
    header, _, *lines = markdown_of(both).splitlines()
    assert header.endswith("| numbers | exact | processor |")
    assert [line.split("|")[-4:-1] for line in lines[:2]] == [
        [" 36,864 ", " no ", " 90.0 s "],
        [" 36,864 ", " yes ", " 90.0 s "],
    ]
    assert "numbers" not in markdown_of([row(0.75)])


@pytest.mark.parametrize("strategy", ROWS)
def test_a_row_of_every_rule_has_its_line_the_control_arms_too(strategy: str) -> None:
    plain = row(0.75, sent=36_864)
    settings = {**plain.settings, "strategy": strategy, "adapter.name": "lora"}
    line = markdown_of([replace(plain, settings=settings)]).splitlines()[2]
    assert line.split("|")[-2] == (" yes " if is_exact(ROWS[strategy], ADAPTERS["lora"]) else " no ")


def test_a_seeds_processor_time_is_that_of_all_its_sites_alone() -> None:
    sites = [replace(held, processor_seconds=10.0 + i) for i, held in enumerate(SITES)]
    assert groups(sites)[0].processor_seconds == pytest.approx((10 + 11 + 12 + 13) / 2)
    assert groups([*sites[:3], SITES[3]])[0].processor_seconds is None


def test_the_words_below_say_what_a_seed_is_and_what_the_intervals_leave_out() -> None:
    shared = markdown_of(SEEDS)
    assert "a standard error of 1.4 points, which is not in the intervals" in shared
    divided = markdown_of([replace(r, settings={**r.settings, "data.seed": r.seed}) for r in SEEDS])
    assert "not in the intervals" not in divided
    assert "ε is per record, of the site that has spent most, at δ 1e-05" in divided
    rows = [replace(r, settings={**r.settings, "data.seed": r.seed, "data.test": "held-out.csv"}) for r in SEEDS]
    assert "not in the intervals" in markdown_of(rows)
    assert "never seeded" not in markdown_of(OPEN), "there is no noise in these"
    assert "code aaaaaaaaaaaa, bbbbbbbbbbbb." in markdown_of([SEEDS[0], replace(SEEDS[1], code="b" * 64)])


def test_an_epsilon_that_counts_on_honest_sites_names_them_wherever_runs_stand_beside_each_other() -> None:
    summed = [replace(r, variant="sum", settings={**r.settings, "privacy.honest-sites": 3}) for r in SEEDS]
    told = markdown_of([*SEEDS, *summed])
    lines = [line.split(" | ")[3] for line in told.splitlines() if line.startswith("| `")]
    assert lines == ["8", "8 (h = 3)"]
    assert "With h it counts on so many honest sites" in told
    assert "With h" not in markdown_of(SEEDS)
    (row_beside,) = beside(summed, summed[0].settings).rows
    assert beside_cells(row_beside)[2] == "8 (h = 3)"
    fewer = replace(summed[0], seed=9, settings={**summed[0].settings, "privacy.honest-sites": 2})
    assert groups([*summed, fewer])[0].honest == 2, "the boldest reading stood for all"
    open_rows = [replace(r, settings={**r.settings, "privacy.honest-sites": 3}) for r in OPEN]
    assert groups(open_rows)[0].honest == 0, "a run without privacy counts on nobody"


def curve(*rounds: tuple[float | None, int]) -> list[RoundLine]:
    """Return the lines of rounds, from round 1, each with its accuracy and the bytes that it sent."""
    fixed: dict[str, Any] = {"complete": True, "strategy": "ffa-lora", "participants": ["a"], "seconds": 1.0}
    fixed |= {"privacy": "none", "head": "", "noised_correct": [], "refusals": [], "attempts": 1, "failures": []}
    return [
        RoundLine(i, accuracy=accuracy, loss=accuracy and 1 - accuracy, bytes_down=sent, bytes_up=0, **fixed)
        for i, (accuracy, sent) in enumerate(rounds, 1)
    ]


def test_rounds_and_bytes_to_95_percent_of_the_gain_by_hand() -> None:
    start = BaselineFile(0.5, 0.5)
    # The gain is 0.2, of which 95 % are reached at 0.69: after 9/10 of the way from round 2 (0.6) to round 4 (0.7).
    lines = curve((None, 10), (0.6, 10), (None, 10), (0.7, 30), (0.7, 10))
    wanted = (2 + 0.9 * 2, 20 + 0.9 * 40)
    for labelled in (True, False):
        assert to_gain(start, lines, labelled=labelled) == pytest.approx(wanted)
    lost = [lines[0], replace(lines[1], complete=False, accuracy=None, loss=None, bytes_down=7), *lines[1:]]
    assert to_gain(start, lost, labelled=True) == pytest.approx((wanted[0], wanted[1] + 7)), "bytes of a lost round"
    assert to_gain(start, curve((0.8, 1), (0.7, 1), (0.7, 1)), labelled=True) == pytest.approx((0.19 / 0.3, 0.19 / 0.3))
    assert to_gain(start, curve((0.8, 1), (0.6, 1), (0.5, 1)), labelled=True) is None, "nothing was gained in the end"
    assert to_gain(start, curve((0.6, 1), (None, 1), (0.7, 1)), labelled=True) is None, "three scores are no curve"
    assert to_gain(start, [], labelled=True) is None
    begun = replace(start, begun_accuracy=0.7, begun_loss=0.3)
    first = replace(lines[0], round_number=0)
    assert to_gain(begun, [first, *lines], labelled=True) == pytest.approx((0.0, 9.5)), "the start had it at once"


def test_costs_have_columns_where_a_row_has_them_and_an_older_row_a_dash() -> None:
    costs = Costs(3.5, 2e6, 1.25, 2_000_000_000, None, {"layer.0.query": 2, "layer.1.query": 4})
    newer = row(0.76, seed=2, costs=costs)
    nothing = replace(newer, seed=3, costs=replace(costs, rounds_to_gain=None, bytes_to_gain=None))
    older = row(0.75, variant="old")
    header, _, new, old, *_ = markdown_of([newer, nothing, older]).splitlines()
    shown = [cell.strip() for cell in header.split("|")[-6:-1]]
    assert shown == ["rounds to 95 %", "bytes to 95 %", "a round", "memory", "ranks"]
    assert [cell.strip() for cell in new.split("|")[-6:-1]] == [
        "3.5 (of 1)",
        "2.00 MB (of 1)",
        "1.2 s",
        "2.00 GB",
        "2 to 4, mean 3.0 in 2 layers",
    ]
    assert [cell.strip() for cell in old.split("|")[-6:-1]] == ["–"] * 5
    assert "95 %" not in markdown_of([older]).splitlines()[0], "a table without a new figure has changed"


def test_a_row_of_older_code_is_written_as_it_was_and_a_newer_one_read_as_it_is(tmp_path: Path) -> None:
    costs = Costs(3.5, 2e6, 1.25, 2_000_000_000, None, {"layer.0.query": 2})
    rows = [row(0.75), row(0.76, seed=2, costs=costs)]
    write_rows(tmp_path / "some.jsonl", rows)
    assert read_rows(tmp_path / "some.jsonl") == rows
    assert "costs" not in (tmp_path / "some.jsonl").read_text(encoding="utf-8").splitlines()[0]
    old, new = csv.DictReader((tmp_path / "some.csv").read_text(encoding="utf-8").splitlines())
    assert (old["costs.memory"], new["costs.memory"], new["costs.ranks"]) == ("", "2000000000", '{"layer.0.query": 2}')
    write_rows(tmp_path / "old.jsonl", rows[:1])
    assert "costs" not in (tmp_path / "old.csv").read_text(encoding="utf-8")


# Pictures


class Loads(HTMLParser):
    """Everything that a page would load or run."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "link", "img", "iframe", "object", "embed"):
            self.found.append(tag)
        self.found += [str(v) for k, v in attrs if k in ("src", "href", "xlink:href") and not str(v).startswith("#")]
        self.found += [k for k, _ in attrs if k.startswith("on")]


PUBLISHED = [Published("FedSVD", "RoBERTa-large", "SST-2", "a table", 0.9046, 3.0, "copied <b>")]


def test_a_page_and_two_pngs_are_drawn_and_again_to_the_same_bytes(tmp_path: Path) -> None:
    rows = [*SEEDS, *SITES, *OPEN]
    written = write_pictures(rows, PUBLISHED, tmp_path, "made")
    assert sorted(path.name for path in written) == ["made-bytes.png", "made-epsilon.png", "made.html"]
    page = (tmp_path / "made.html").read_text(encoding="utf-8")
    assert Loads(page).found == []
    assert page.count("<svg") == 2
    for text in (
        "wide, local-only",
        "published: FedSVD, RoBERTa-large, SST-2",
        "no claim",
        "76.0",
        "90.5 %",
        "copied &lt;b&gt;",
    ):
        assert text in page, text
    identifiers = re.findall(r'\bid="([^"]+)"', page)
    assert len(identifiers) == len(set(identifiers)), "an identifier of one picture is another's, too"
    assert all(path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for path in written if path.suffix == ".png")
    before = {path: path.read_bytes() for path in written}
    assert {path: path.read_bytes() for path in write_pictures(rows, PUBLISHED, tmp_path, "made")} == before


def test_a_page_that_would_load_something_is_found() -> None:
    assert Loads('<svg><image xlink:href="http://x"/></svg><p onclick="a()">').found == ["http://x", "onclick"]


def lines_of(axes: Any) -> dict[str, tuple[list[float], list[float]]]:
    """Return the points of every line with a label."""
    handles, labels = axes.get_legend_handles_labels()
    lines = [handle[0] if isinstance(handle, tuple) else handle for handle in handles]
    return {name: (list(line.get_xdata()), list(line.get_ydata())) for name, line in zip(labels, lines, strict=True)}


def bars_of(axes: Any) -> list[tuple[float, float]]:
    """Return the ends of every interval that is drawn."""
    bars = [segment for container in axes.containers for bar in container.lines[2] for segment in bar.get_segments()]
    return [(bar[0][1], bar[1][1]) for bar in bars]


def test_points_stand_at_their_epsilon_and_published_ones_are_open_marks_in_a_part_of_their_own() -> None:
    figure = epsilon_figure(groups([*SEEDS, *SITES, *OPEN]), PUBLISHED)
    ours, theirs = figure.axes
    lines = lines_of(ours)
    assert set(lines) == {"wide", "wide, local-only"}
    assert lines["wide"] == ([pytest.approx(8.0, rel=0.05)], [pytest.approx(76.0)]), "no line leads to a run without ε"
    assert lines_of(theirs) == {"published: FedSVD, RoBERTa-large, SST-2": ([3.0], [pytest.approx(90.46)])}
    (marks,) = theirs.lines
    assert (marks.get_markerfacecolor(), marks.get_linestyle()) == ("none", "None")
    (by_itself,) = epsilon_figure(groups([*SEEDS, *SITES, *OPEN]), []).axes
    scales = [(*axes.get_xlim(), *axes.get_ylim()) for axes in (ours, by_itself)]
    assert scales[0] == pytest.approx(scales[1]), "other data widen our scales"
    points = [(x, y) for c in ours.containers for x, y in zip(*c.lines[0].get_data(), strict=True)]
    assert any(x > 16 and y == pytest.approx(85.0) for x, y in points)
    found = groups(SEEDS)[0].accuracy
    assert bars_of(ours)[0] == pytest.approx((100 * found.low, 100 * found.high))


def test_variants_at_one_epsilon_are_not_spread_over_an_axis_of_epsilon() -> None:
    rows = [replace(one, variant=name) for name in ("wide", "narrow", "deep", "flat") for one in SEEDS]
    (axes,) = epsilon_figure(groups(rows), []).axes
    assert {name: places for name, (places, _) in lines_of(axes).items()} == {
        name: [pytest.approx(number)] for number, name in enumerate(("wide", "narrow", "deep", "flat"))
    }
    assert (axes.get_xscale(), list(axes.get_xticks()), axes.get_xlabel()) == ("linear", [], "each at ε 8, at most")
    (axes,) = epsilon_figure(groups([*rows, *(replace(one, epsilon_asked=2.0) for one in rows)]), []).axes
    assert (axes.get_xscale(), axes.get_xlabel()) == ("log", "ε, at most")


def test_bytes_are_of_what_travels_with_a_part_for_each_epsilon() -> None:
    figure = bytes_figure(groups([*SEEDS, *SITES, *OPEN]))
    assert [axes.get_title() for axes in figure.axes] == ["ε 8", "no claim"]
    assert [lines_of(axes) for axes in figure.axes] == [
        {"wide": ([3e6], [pytest.approx(76.0)])},
        {"wide": ([3e6], [pytest.approx(85.0)])},
    ]
    assert [len(bytes_figure(found).axes[0].containers) for found in (groups(SITES), [])] == [0, 0]


def test_the_command_draws_tables_together_and_says_what_is_missing(tmp_path: Path) -> None:
    others = [replace(SEEDS[0], sweep="other", variant=name, accuracy=0.9) for name in ("wide", "narrow-x")]
    write_rows(tmp_path / "one.jsonl", SEEDS)
    write_rows(tmp_path / "two.jsonl", others)

    def drawn(*words: str, tables: tuple[str, ...] = ("one", "two")) -> tuple[int, str]:
        named = [str(tmp_path / f"{table}.jsonl") for table in tables]
        answer = CliRunner().invoke(app, ["pictures", *named, "--output", str(tmp_path / "drawn"), *words])
        page = tmp_path / "drawn" / "one.html"
        return answer.exit_code, page.read_text("utf-8") if not answer.exit_code else " ".join(answer.output.split())

    code, page = drawn()
    assert (code, "other: wide" in page) == (0, True)
    assert "made: wide" not in page, "the first table's names are plain"
    assert "ublished" not in page, "others' figures of other data stand beside ours unasked"
    assert "RoBERTa" in drawn("--published", "shipped")[1]
    assert "narrow" not in drawn("--without", "narrow*")[1]
    for chosen, order in (("narrow*,wide,w*", ["other: narrow-x", "wide", "other: wide"]), ("made: *", ["wide"])):
        rows = re.findall(r"<tr><td>([^<]+)</td>", drawn("--only", chosen)[1])
        assert rows == order, "not as they were named, once each"
    for words in (("--without", "narrow*, gone"), ("--only", "wide,gone*")):
        code, said = drawn(*words)
        assert (code, "no variant is 'gone" in said) == (1, True)
    assert "three.jsonl is not there" in drawn(tables=("three",))[1]


@pytest.mark.parametrize("length", [5, 40, 90])
def test_no_name_in_a_legend_is_cut_off(length: int) -> None:
    """Names of several tables together are long; those of published figures are longer."""
    rows = [replace(SEEDS[0], variant=f"{number}{'x' * length}") for number in range(5)]
    for figure in (epsilon_figure(groups(rows), []), bytes_figure(groups(rows))):
        figure.draw_without_rendering()
        (legend,) = figure.legends
        told, whole = legend.get_window_extent(), figure.bbox
        assert whole.x0 <= told.x0, f"{length} letters are cut off"
        assert told.x1 <= whole.x1, f"{length} letters are cut off"


def test_without_matplotlib_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match="pip install 'matplotlib"):
        write_pictures(SEEDS, [], tmp_path, "made")


# Published figures


def test_the_shipped_figures_name_their_model_data_and_source() -> None:
    figures = read_published(SHIPPED)
    assert len(figures) >= 5
    assert all(figure.model and figure.data and figure.source for figure in figures)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[published]]\nmethod = 'a'", "figure 1 of .* lacks the field 'model'"),
        ("[[figure]]", r"must hold \[\[published\]\] tables"),
        ("published = 3", r"must hold \[\[published\]\] tables"),
        ("[[published]]\nmethod='a'\nmodel='b'\ndata='c'\nsource='d'\naccuracy=90.5", "write a share"),
        ("[[published]]\nmethod='a'\nmodel='b'\ndata='c'\nsource='d'\naccuracy=0.5\neps=1", "unknown field 'eps'"),
        ("[", "is not TOML"),
    ],
)
def test_a_published_figure_that_is_none_is_named(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "published.toml").write_text(text, encoding="utf-8")
    with pytest.raises((ConfigError, DataError), match=said):
        read_published(tmp_path / "published.toml")
    with pytest.raises(ConfigError, match="cannot read the published figures"):
        read_published(tmp_path / "none.toml")


def test_variants_are_compared_seed_by_seed_from_ten_runs_on() -> None:
    first = [row(0.7 + seed / 100, seed=seed) for seed in range(10)]
    other = [replace(one, variant="other", accuracy=one.accuracy + 0.02 + (one.seed % 2) / 1000) for one in first]
    plain = replace(first[0], variant="plain", settings={**first[0].settings, "server.optimizer": "none"})
    made = groups([*first, *other, plain])
    assert [group.apart and group.apart.mean for group in made] == [None, pytest.approx(0.0205), None]
    low, high = stats.t.interval(0.95, 9, 0.0205, stats.sem([0.02, 0.021] * 5))
    assert made[1].apart is not None
    assert (made[1].apart.low, made[1].apart.high) == (pytest.approx(low), pytest.approx(high))
    text = markdown_of([*first, *other])
    assert "| +2.0 ± 0.0 |" in text or "| +2.1 ± 0.0 |" in text
    assert "not ranked" not in text
    few = markdown_of([*first[:3], *other[:3]])
    assert "Variants are not ranked: fewer than 10 runs" in few
    assert "apart" not in few.splitlines()[0]


# A task without labels


def by_loss(loss: float, seed: int, **changes: Any) -> Row:
    """Return a row of a language model, whose accuracy is of next tokens."""
    made = row(0.3, seed=seed, loss=loss, **changes)
    return replace(made, settings={**made.settings, "model.task": "causal-lm"})


def test_a_task_without_labels_is_told_and_drawn_by_its_loss(tmp_path: Path) -> None:
    rows = [by_loss(loss, seed) for seed, loss in enumerate((1.0, 1.1, 1.2), start=1)]
    text = markdown_of(rows)
    assert (
        "| `wide` | metric | federated | 8 | 3 | 30.0 ± 0.0 | 50.0 | **1.100** ± 0.248 (1.000, 1.100, 1.200) |" in text
    )
    assert "judge by the loss" in text
    assert "standard error" not in text
    (axes,) = epsilon_figure(groups(rows), PUBLISHED).axes
    assert lines_of(axes) == {"wide": ([pytest.approx(8.0)], [pytest.approx(1.1)])}, "published accuracies are none"
    assert axes.get_ylabel() == "loss on the public test part, nats a token"
    assert bars_of(axes)[0] == pytest.approx((1.1 - 0.2484, 1.1 + 0.2484), abs=1e-3)
    with pytest.raises(DataError, match="some by loss"):
        write_pictures([*rows, *(replace(one, variant="other") for one in SEEDS)], [], tmp_path, "both")
