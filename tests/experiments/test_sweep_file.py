"""The file of a sweep says which runs there are; whatever is wrong in it is said before anything runs."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from fedveil.common.config.text import read_settings_file
from fedveil.common.errors import ConfigError
from fedveil.experiments.site_count import USUAL
from fedveil.experiments.sweep.arms import ARMS
from fedveil.experiments.sweep.file import Sweep, read_sweep
from fedveil.experiments.sweep.published import SHIPPED as SHIPPED_FIGURES
from fedveil.experiments.sweep.published import read_published
from fedveil.experiments.sweep.rows import Basis, Row, read_rows
from fedveil.server.checkpoint import MAY_CHANGE
from fedveil.strategies.job import configure, with_recipe

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
SHIPPED = sorted((EXPERIMENTS / "sweeps").glob("*.toml"))
CONFIGS = sorted((EXPERIMENTS / "configs").glob("*.toml"))


def written(tmp_path: Path, text: str) -> Sweep:
    (tmp_path / "mine.toml").write_text(text, encoding="utf-8")
    return read_sweep(tmp_path / "mine.toml")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_sweep_is_accepted_and_starts_with_its_command(path: Path) -> None:
    assert read_sweep(path).cells
    assert f"fedveil sweep experiments/sweeps/{path.name}" in path.read_text(encoding="utf-8").splitlines()[0]


RESULTS = sorted(path for path in (EXPERIMENTS / "results").glob("*.jsonl") if ".set-aside" not in path.name)


def stale(rows: list[Row], sweep: Sweep) -> list[str]:
    """Return in words what of rows is not what their sweep's runs have now.

    A setting that came after a row says nothing of it.
    """
    cells = {(cell.variant, cell.arm, cell.site, cell.epsilon, cell.seed): cell for cell in sweep.cells}
    told = []
    for row in rows:
        if row.key not in cells:
            told.append(f"{row.key} is no run of the sweep")
            continue
        settings = {key: value for key, value in cells[row.key].job(Path()).settings().items() if key not in MAY_CHANGE}
        if settings["adapter.name"] == "none":
            settings["adapter.targets"] = row.settings["adapter.targets"]  # of no layer
        then = settings | row.settings
        held = replace(row, settings={key: value for key, value in then.items() if key not in MAY_CHANGE})
        basis = Basis(settings, cells[row.key].sites, row.through, row.versions, row.code)
        told += [f"{row.key}: {differs}" for differs in [basis.differs(held)] if differs]
    return told


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_every_committed_row_is_of_its_sweeps_settings_now(path: Path) -> None:
    """Else a document cites what nobody gets: take the row out and run the sweep again, which goes on with the rest."""
    assert stale(read_rows(path), read_sweep(EXPERIMENTS / "sweeps" / f"{path.stem}.toml")) == []


def test_a_row_of_other_settings_or_of_no_run_is_found() -> None:
    rows, sweep = read_rows(EXPERIMENTS / "results" / "tiny.jsonl"), read_sweep(EXPERIMENTS / "sweeps" / "tiny.toml")
    other = replace(rows[0], settings={**rows[0].settings, "training.learning-rate": 0.5})
    assert "training.learning-rate 0.5, not 0.02" in stale([other], sweep)[0]
    assert stale([replace(rows[0], variant="gone")], sweep) == [f"{('gone', *rows[0].key[1:])} is no run of the sweep"]
    assert "sites 9, not 2" in stale([replace(rows[0], sites=9)], sweep)[0]


def default_of(name: str, epsilon: float | None) -> str:
    """Return the variant that is the default of a sweep's data at an ε."""
    base = read_settings_file(EXPERIMENTS / "configs" / f"{name}.toml") if name != "rotten-tomatoes" else {}
    own = {key: value for key, value in base.items() if key.startswith(("data.", "model."))}
    privacy = {"privacy.mode": "none"} if epsilon is None else {"privacy.epsilon": epsilon}
    recipe = configure({**own, **privacy}).config.recipe
    return {"metric": "metric", "head-only": "head-only", "open": "open"}[recipe]


@pytest.mark.parametrize("name", ["rotten-tomatoes", "sst2", "snli", "reuters", "medmcqa-specialties"])
def test_beside_every_method_stand_the_fitted_head_and_runs_of_each_site_and_of_all_records(name: str) -> None:
    cells = read_sweep(EXPERIMENTS / "sweeps" / f"{name}.toml").cells
    fitted = [cell for cell in cells if cell.arm == "fitted-head"]
    assert sorted(cell.seed for cell in fitted) == [1, 2, 3]
    assert all(cell.job(Path()).config.adapter.name == "none" and cell.epsilon is None for cell in fitted)
    # What has next to no noise is a control, and nobody's default.
    for epsilon in {cell.epsilon for cell in cells if cell.variant != "metric-without-noise"}:
        default = (default_of(name, epsilon), epsilon)
        with_arms = {(cell.variant, cell.epsilon, cell.arm) for cell in cells}
        assert {(*default, arm) for arm in ("federated", "local-only", "pooled")} <= with_arms
    open_runs = [
        cell for cell in cells if cell.variant == "metric" and cell.epsilon is None and cell.arm == "federated"
    ]
    assert [cell.job(Path()).config.adapter.start for cell in open_runs] == ["public-metric"] * len(open_runs)
    assert len(open_runs) == (0 if name in ("reuters", "medmcqa-specialties") else 3)


def test_a_sweep_is_variants_times_epsilons_times_seeds_with_baselines_beside_them(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text("rounds = 3\nadapter.rank = 4\n", encoding="utf-8")
    (tmp_path / "wide.toml").write_text("adapter.rank = 16\n", encoding="utf-8")
    sweep = written(
        tmp_path,
        """
        base = "base.toml"
        sites = 3
        seeds = [5, 6]
        epsilons = [1, 3.0, "none"]
        baselines = ["pooled", "local-only"]
        settings = { evaluate-every = 3 }
        variants.narrow = {}
        variants.wide = { config = "wide.toml", settings = { rounds = 2 }, epsilons = [8.0], baselines = [] }
        """,
    )
    assert sweep.name == "mine"
    assert Counter((cell.variant, cell.arm) for cell in sweep.cells) == {
        ("narrow", "federated"): 6,
        ("narrow", "local-only"): 18,
        ("narrow", "pooled"): 6,
        ("wide", "federated"): 2,
    }
    narrow, wide = sweep.cells[0], sweep.cells[-1]
    assert (narrow.name, narrow.settings["adapter.rank"], narrow.settings["rounds"]) == ("narrow-eps-1-seed-5", 4, 3)
    assert (wide.name, wide.settings["adapter.rank"], wide.settings["rounds"]) == ("wide-eps-8-seed-6", 16, 2)
    assert all(cell.settings["evaluate-every"] == 3 for cell in sweep.cells)
    for cell in sweep.cells:
        job = cell.job(tmp_path)
        assert job.config.seed == job.config.data.seed == cell.seed
        assert job.mechanism.claims == (cell.epsilon is not None)
        assert cell.epsilon in (None, job.config.privacy.epsilon)
    assert [c.name for c in sweep.cells if c.epsilon is None and c.seed == 5 and c.arm == "local-only"] == [
        f"narrow-eps-none-seed-5-local-only-{site}" for site in range(3)
    ]


def test_a_file_of_a_runs_settings_is_that_run(tmp_path: Path) -> None:
    sweep = written(tmp_path, "rounds = 3\nseed = 7\nprivacy.epsilon = 3.0\nadapter.rank = 4\n")
    (cell,) = sweep.cells
    assert (cell.name, cell.variant, cell.arm, cell.epsilon, cell.sites) == (
        *("base-eps-3-seed-7", "base", "federated", 3.0),
        USUAL,
    )
    config = cell.job(tmp_path).config
    assert (config.rounds, config.seed, config.privacy.epsilon, config.adapter.rank) == (3, 7, 3.0, 4)
    assert config.data.seed == configure({}).config.data.seed, "one run divides the records as fedveil run does"
    assert written(tmp_path, "privacy.mode = 'none'").cells[0].name == "base-eps-none-seed-1"


@pytest.mark.parametrize(
    "path", sorted((SHIPPED[0].parent.parent / "configs").glob("*.toml")), ids=lambda path: path.stem
)
def test_every_shipped_configuration_is_a_run_of_its_own(path: Path, tmp_path: Path) -> None:
    (cell,) = read_sweep(path).cells
    plain = configure(with_recipe(read_settings_file(path))[0]).config
    assert cell.job(tmp_path).config == replace(plain, output=str(tmp_path))


def test_the_records_are_divided_alike_for_all_seeds_where_that_is_asked_for(tmp_path: Path) -> None:
    sweep = written(tmp_path, "partition-by-seed = false\nsettings = { data.seed = 7 }")
    assert [(cell.settings["seed"], cell.settings["data.seed"]) for cell in sweep.cells] == [(1, 7), (2, 7), (3, 7)]


def test_the_sites_of_an_arm_are_those_of_one_division() -> None:
    federated, alone, pooled = (ARMS[name] for name in ("federated", "local-only", "pooled"))
    every = [{"partition-id": site, "num-partitions": 3} for site in range(3)]
    assert [federated.nodes(3, site) for site in federated.sites(3)] == [every]
    assert [alone.nodes(3, site) for site in alone.sites(3)] == [[node] for node in every]
    assert [pooled.nodes(3, site) for site in pooled.sites(3)] == [[{"partition-id": 0, "num-partitions": 1}]]


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    assert written(tmp_path, "\ufeffseeds = [1]") == written(tmp_path, "seeds = [1]")
    (tmp_path / "figures.toml").write_text(f"\ufeff{SHIPPED_FIGURES.read_text(encoding='utf-8')}", encoding="utf-8")
    assert read_published(tmp_path / "figures.toml") == read_published(SHIPPED_FIGURES)


def test_a_baseline_does_not_wait_for_the_sites_that_it_has_not(tmp_path: Path) -> None:
    sweep = written(tmp_path, 'seeds = [1]\nbaselines = ["pooled"]\nsettings = { min-sites = 4 }')
    assert [cell.settings["min-sites"] for cell in sweep.cells] == [4, 1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed = [1]", r"unknown key 'seed' \(did you mean 'seeds'\?\)"),
        ("variants.a.baseline = []", r"'variants.a.baseline' \(did you mean 'baselines'\?\)"),
        ("settings = { privacy.epsilon = 3.0 }", "'privacy.epsilon', which is the sweep's own: say it by epsilons"),
        ("variants.a.settings = { data.seed = 3 }", "variants.a.settings has 'data.seed'"),
        ("settings = { resume = '7' }", "'resume', which is the sweep's own"),
        ("settings = { rank = 3 }", "base, ε 8, seed 1: unknown setting 'rank'"),
        ("settings = { privacy.mode = 'none' }", "'none', which promises nothing, and ε 8"),
        ("epsilons = [0]", "epsilons must be numbers above 0, or 'none', not 0"),
        ("epsilons = [true]", "not True"),
        ("epsilons = []", "epsilons must be a list"),
        ("epsilons = [1.0000000001, 1.00000000009]", "two runs would have one name"),
        ("seeds = [1, 1]", "seeds names something twice"),
        ("seeds = ['a']", "seeds must be whole numbers"),
        ("", "it says nothing that is to be run: name seeds, epsilons, baselines, variants, settings or a base"),
        ("# epsilons = [3.0]\nsites = 3", "it says nothing that is to be run"),
        (f"epsilons = [1{'0' * 400}]", "is not TOML: a whole number has more than 64 bits"),
        (f"seeds = [1{'0' * 5000}]", "is not TOML: a whole number has more than 64 bits"),
        (f"seeds = {'[' * 5000}", "is not TOML: brackets or keys are nested too deeply"),
        (f"settings.{'a.' * 5000}b = 1", "is not TOML: brackets or keys are nested too deeply"),
        ("sites = 0\nseeds = [1]", "sites must be a whole number above 0"),
        ("baselines = ['federated']", "choose of local-only, pooled, fitted-head"),
        ("seeds = [1]\npartition-by-seed = 1", "true or false, not 1"),
        ("base = 3", "base must be the path of a file"),
        ("base = 'nowhere.toml'", "nowhere.toml: No such file"),
        ("variants = {}", "variants must be tables"),
        ("variants.a = 3", "variants.a must be a table"),
        ("variants.'a b' = {}", "'a b-eps-8-seed-1', which is not"),
        ("settings = 3", "settings must be a table"),
        ("sites = [", "is not TOML"),
        ("rounds = 3\nroundz = 4", "unknown setting 'roundz'"),
        ("rounds = 3\nprivacy.epsilon = 0", "epsilon"),
        ("rounds = 3\nprivacy.epsilon = '3'", "epsilon"),
        ("rounds = 3\nseed = 'a'", "seed must be a whole number"),
        ("rounds = 3\nresume = '7'", "resume is set"),
    ],
)
def test_whatever_is_wrong_is_named_with_the_file(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said) as raised:
        written(tmp_path, text)
    assert re.match(r"\S*mine\.toml", str(raised.value))
    assert "\n" not in str(raised.value)


def test_a_sweep_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the sweep"):
        read_sweep(tmp_path / "none.toml")


FOUR = ("fedavg-lora", "ffa-lora", "fed-sb", "fed-svd")


def test_variants_that_name_a_strategy_each_differ_in_nothing_but_that(tmp_path: Path) -> None:
    lines = [f'[variants.{name}]\nsettings = {{ strategy = "{name}" }}\n' for name in FOUR]
    sweep = written(tmp_path, f"seeds = [1]\n{''.join(lines)}")
    assert sweep.recipes == dict.fromkeys(FOUR, "plain")
    jobs = [cell.job(Path()) for cell in sweep.cells]
    assert len({(job.config.server, job.config.training) for job in jobs}) == 1


def test_variants_that_differ_in_more_than_they_name_are_refused_in_one_line(tmp_path: Path) -> None:
    open_one = "[variants.open-one]\nsettings = { evaluate-every = 3 }\n"
    named = '[variants.fed-sb]\nsettings = { strategy = "fed-sb" }\n'
    with pytest.raises(ConfigError, match=r"'open-one' gets the recipe 'metric' and 'fed-sb' gets 'plain'") as refusal:
        written(tmp_path, open_one + named)
    assert "\n" not in str(refusal.value)
    both = open_one.replace("{ ", '{ recipe = "metric", ') + named
    assert written(tmp_path, both).recipes == {"open-one": "metric", "fed-sb": "plain"}
    assert written(tmp_path, f'settings.recipe = "plain"\n{open_one}{named}').recipes == dict.fromkeys(
        ("open-one", "fed-sb"), "plain"
    )
    with pytest.raises(ConfigError, match="gets the recipe 'metric' and 'without' gets 'open'"):
        written(tmp_path, f'{open_one}[variants.without]\nepsilons = ["none"]\n')
    whole = 'epsilons = [8.0, "none"]\n' + open_one
    assert written(tmp_path, whole).recipes == {"open-one": "metric"}, "one method for all of a variant's ε"
