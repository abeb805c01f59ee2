"""The reference of settings: each has a meaning, a unit and a range, and what is printed is what is checked."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from docs.make.settings import flower_table, page, pyproject
from fedveil.cli.main import app
from fedveil.cli.settings_reference import all_settings, lines_of, select
from fedveil.common.check import NOT_NEGATIVE, POSITIVE, Digits, Interval, OneOf, Rule
from fedveil.common.config.fields import Section, kinds_of, rules_of, unit_of
from fedveil.common.config.flat import Scalar
from fedveil.common.config.run import RunConfig
from fedveil.common.config.text import flatten, parse_settings
from fedveil.common.errors import ConfigError
from fedveil.common.starts import STARTS
from fedveil.strategies import ROWS, STRATEGIES
from fedveil.strategies.job import configure
from fedveil.strategies.options import known_settings
from fedveil.strategies.rules import RULES

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = all_settings()


def sections() -> Iterator[type[Any]]:
    """Yield every dataclass whose fields are settings."""
    kinds = kinds_of(RunConfig)
    yield RunConfig
    yield from (kind for kind in kinds.values() if isinstance(kind, type) and issubclass(kind, Section))
    yield from (*STARTS.values(), *ROWS.values(), *RULES.values())


def fields_of(kind: type) -> list[tuple[type[Any], str]]:
    return [(s, f.name) for s in sections() for f in dataclasses.fields(s) if kinds_of(s)[f.name] is kind]


NUMBERS = [*fields_of(int), *fields_of(float)]


def spoken(value: Any) -> str:
    return value.__name__ if isinstance(value, type) else str(value)


# Every setting is described


def test_the_reference_has_every_setting_and_no_other() -> None:
    assert SETTINGS.keys() == known_settings().keys()
    for key, setting in SETTINGS.items():
        assert (setting.key, setting.default) == (key, known_settings()[key])


@pytest.mark.parametrize("key", SETTINGS)
def test_a_setting_says_what_it_means_in_sentences(key: str) -> None:
    meaning = SETTINGS[key].meaning
    assert meaning, f"{key} has no text under its field"
    assert meaning[0].isupper() or meaning[0] == "`", f"{key}: {meaning}"
    assert meaning.endswith("."), f"{key}: {meaning}"
    assert "``" not in meaning


@pytest.mark.parametrize(("section", "field"), NUMBERS, ids=spoken)
def test_a_number_declares_its_unit_and_unless_it_is_a_seed_its_range(section: type[Any], field: str) -> None:
    assert unit_of(section, field) is not None, f"{section.__name__}.{field} declares no unit: RATIO is one"
    assert field == "seed" or field in rules_of(section), f"{section.__name__}.{field} declares no range"


def test_a_field_that_declares_nothing_is_found() -> None:
    @dataclasses.dataclass(frozen=True)
    class Bare(Section):
        size: int = 3

    assert unit_of(Bare, "size") is None
    assert rules_of(Bare) == {}


def test_options_of_one_name_are_declared_alike_in_every_start() -> None:
    seen: dict[str, tuple[Any, ...]] = {}
    for start in STARTS.values():
        for item in dataclasses.fields(start):
            unit = unit_of(start, item.name)
            declared = (item.default, kinds_of(start)[item.name], rules_of(start).get(item.name), unit)
            assert seen.setdefault(item.name, declared) == declared, f"start.{item.name} differs in {start.name}"


# What is printed is what is checked


def edges(rule: Interval) -> tuple[list[float], list[float]]:
    """Return numbers in an interval near its ends, and numbers outside of it."""
    inside = [rule.low + 1e-9 if rule.low < 1e-6 else rule.low * 1.001]
    outside = [rule.low - 1.0, float("nan"), float("inf")]
    (inside if rule.low_too or rule.or_zero else outside).append(rule.low)
    if rule.high < float("inf"):
        (inside if rule.high_too else outside).append(rule.high)
        outside.append(rule.high * 1.001)
    return inside, outside


@pytest.mark.parametrize(("section", "field"), NUMBERS, ids=spoken)
def test_what_is_refused_is_what_the_words_leave_out(section: type[Any], field: str) -> None:
    rules = rules_of(section).get(field, ())
    whole = kinds_of(section)[field] is int
    for rule in rules:
        assert isinstance(rule, Interval)
        inside, outside = edges(rule)
        for value in [1, rule.low] if whole and rule.low_too else [1] if whole else inside:
            assert getattr(section(**{field: value}), field) == value
        for value in [int(rule.low) - 1] if whole else outside:
            with pytest.raises(ConfigError) as refusal:
                section(**{field: value})
            assert f"{field.replace('_', '-')} must be {rule.words}, not {value!r}" in str(refusal.value)


@pytest.mark.parametrize(
    ("rule", "words", "inside", "outside"),
    [
        (POSITIVE, "above 0", [1e-9, 3], [0, -1]),
        (NOT_NEGATIVE, "at least 0", [0, 3], [-1e-9]),
        (Interval(0, 1, or_zero=True), "above 0 and at most 1, or 0", [0, 0.5, 1], [-0.5, 1.5]),
        (Interval(1, 2, low_too=True, why="as said"), "from 1 to 2, as said", [1, 2], [0.9, 2.1]),
        (OneOf(("a", "b")), "one of a, b", ["a", "b"], ["c", ""]),
        (Digits(4, "x"), "4 hexadecimal digits, as x prints them, or empty", ["", "00af"], ["00a", "00ag", "00af0"]),
    ],
)
def test_a_rule_holds_as_its_words_say(rule: Rule, words: str, inside: list[Any], outside: list[Any]) -> None:
    assert rule.words == words
    assert all(rule.holds(value) for value in inside)
    for value in outside:
        with pytest.raises(ConfigError, match=r"^x "):
            rule.check("x", value)


def test_a_table_has_the_rows_that_it_has_when_it_is_asked() -> None:
    table = {"a": 1}
    rule = OneOf(table)
    table["b"] = 2
    assert rule.holds("b")
    assert rule.words == "one of a, b"


# What is left open


def test_a_configuration_leaves_nothing_open_that_one_value_holds_for() -> None:
    open_values = {key for key, value in configure({"recipe": "plain"}).settings().items() if value in (0, "auto", "")}
    each_machines = {"device", "precision", "training.batch-tokens"}
    each_sites = {"privacy.noise-multiplier", "max-update-norm"}
    the_models = {"adapter.targets"}
    none = {
        "privacy.honest-sites",
        "privacy.drop-outs",
        "resume",
        "data.test",
        "data.text-pair",
        "data.labels",
        "data.records",
        "data.key",
        "head.phrases",
        "training.weight-decay",
    }
    none |= {"privacy.cohort", "privacy.ledger"}
    none |= {
        "data.slice",
        "data.person",
        "adapter.site-ranks",
        "phases",
        "server.most-noise",
    }
    none |= {"data.label-separator", "model.checkpointing", "data.system", "data.context", "named-sites", "project"}
    none |= {"data.template"}
    assert open_values == each_machines | each_sites | the_models | none


# What is made from it


def test_pyprojects_settings_are_the_codes() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert pyproject(text) == text, "run: python -m docs.make"


def test_the_table_of_flower_is_written_anew_and_nothing_around_it() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    spoilt = text.replace('rounds = "auto"\n', "rounds = 7\nnonsense = 1\n").replace(
        "[tool.flwr.app.config.fed-svd]", "[a]"
    )
    assert spoilt != text
    damaged = text.replace('rounds = "auto"\n', "rounds = 7\nnonsense = 1\n")
    assert pyproject(damaged) == text
    assert flatten(tomllib.loads(flower_table())["tool"]["flwr"]["app"]["config"]) == known_settings()
    with pytest.raises(ConfigError, match="has no table"):
        pyproject("[project]\nname = 'x'\n")


def test_an_option_more_is_in_all_that_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclasses.dataclass(frozen=True)
    class Other(STRATEGIES["ffa-lora"]):  # type: ignore[misc]
        """Another rule."""

        name = "other"
        patience: int = 3
        """How long it waits."""

    monkeypatch.setitem(STRATEGIES, "other", Other)
    assert "\n[tool.flwr.app.config.other]\npatience = 3\n" in flower_table()
    assert "| `other.patience` | `3` | whole number | – | How long it waits. |" in page()


# The command


def run(*words: str) -> str:
    result = CliRunner().invoke(app, ["settings", *words])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_what_the_command_prints_is_a_file_that_makes_the_same_run(tmp_path: Path) -> None:
    settings = 'strategy="fed-svd" privacy.mode="none" fed-svd.period=3 adapter.rank=4'
    file = tmp_path / "run.toml"
    file.write_text(run("-c", settings), encoding="utf-8")
    assert configure(parse_settings([str(file)])) == configure(parse_settings([settings]))
    assert parse_settings([str(file)]).keys() == SETTINGS.keys()


def test_a_value_that_is_left_open_is_printed_with_what_the_run_makes_of_it() -> None:
    printed = run("training.local-steps", "-c", 'privacy.mode="none" recipe="plain"')
    assert printed.splitlines()[-2:] == [
        "# (whole number above 0, or 'auto'; unit: steps; here 16)",
        'training.local-steps = "auto"',
    ]
    assert '; default "auto")\nrounds = 9\n' in run("rounds", "-c", "rounds=9")


def test_a_section_is_chosen_by_its_name_and_a_setting_by_its_key() -> None:
    chosen = [setting.key for setting in select(["privacy", "rounds"])]
    assert chosen == [key for key in SETTINGS if key.startswith("privacy.")] + ["rounds"]
    assert len(select([])) == len(SETTINGS)


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("adapter.rnk", "did you mean 'adapter.rank'?"),
        ("trainin", "did you mean 'training'?"),
    ],
)
def test_a_name_that_is_none_is_answered_with_the_nearest(name: str, answer: str) -> None:
    result = CliRunner().invoke(app, ["settings", name])
    assert result.exit_code == 1
    assert answer in result.stderr


def test_the_settings_are_written_as_json(tmp_path: Path) -> None:
    file = tmp_path / "settings.json"
    run("training.sample-rate", "fed-svd.period", "--json", str(file))
    rate, period = json.loads(file.read_text(encoding="utf-8"))
    assert {key: rate[key] for key in ("key", "default", "asked", "value", "unit", "range")} == {
        "key": "training.sample-rate",
        "default": "auto",
        "asked": "auto",
        "value": 1.0,
        "unit": "probability",
        "range": "number above 0 and at most 1, or 'auto'",
    }
    assert (period["owners"], period["value"]) == (["fed-svd"], None), "it is no setting of this run"
    result = CliRunner().invoke(app, ["settings", "--json", str(tmp_path)])
    assert (result.exit_code, "cannot be written" in result.stderr) == (1, True)
    (tmp_path / "mine.toml").write_text("rounds = 3\n", encoding="utf-8")
    result = CliRunner().invoke(
        app, ["settings", "-c", str(tmp_path / "mine.toml"), "--json", str(tmp_path / "mine.toml")]
    )
    assert (result.exit_code, "is read by this command and is not overwritten" in result.stderr) == (1, True)
    assert (tmp_path / "mine.toml").read_text(encoding="utf-8") == "rounds = 3\n"


def test_a_text_of_several_lines_stays_a_comment() -> None:
    setting = dataclasses.replace(SETTINGS["min-sites"], meaning="word " * 60)
    value: Scalar = 1
    assert tomllib.loads(lines_of(setting, None, value)) == {"min-sites": 1}


# A path is written as people write it


@pytest.mark.parametrize("key", ["data.name", "data.test", "output", "resume"])
def test_the_folder_of_a_user_whom_nobody_here_knows_is_one_line(key: str) -> None:
    asked = ["run", "--sites", "2", "-c", f'{key}="~nobody-of-that-name/x.csv"', "-c", "recipe='plain'"]
    answer = CliRunner().invoke(app, asked)
    said = [line for line in answer.output.splitlines() if line.startswith("fedveil: ")]
    assert (answer.exit_code, len(said)) == (1, 1), answer.output
    assert said[0].endswith("begins with the folder of a user whom this machine does not know: write the whole path")
