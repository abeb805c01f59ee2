"""A table of one's own: what a command line says of it, what is guessed, and that real sites guess nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from fedveil.cli.table_options import Given, with_table
from fedveil.common.config.sections import DataConfig
from fedveil.common.data.sources import load_dataset
from fedveil.common.errors import DataError
from fedveil.common.labels import labels_of
from fedveil.experiments.own_table import held_out, hints, with_guesses
from fedveil.strategies.job import configure

QUESTIONS = [f"who wrote book number {i}" for i in range(60)]


def table(folder: Path, **columns: list[Any]) -> str:
    path = folder / "own.csv"
    rows = zip(*columns.values(), strict=True)
    path.write_text("\n".join(",".join(map(str, row)) for row in [tuple(columns), *rows]), encoding="utf-8")
    return str(path)


def guessed(name: str, **settings: Any) -> tuple[dict[str, Any], list[str]]:
    given = {"data.name": name, "data.test-size": 9, **{f"data.{key}": value for key, value in settings.items()}}
    found, said = with_guesses(given)
    return {key: value for key, value in found.items() if key not in given}, said


def test_a_column_is_guessed_where_one_choice_is_sure_and_the_guess_is_said(tmp_path: Path) -> None:
    own = table(tmp_path, id=list(range(60)), question=QUESTIONS, kind=["HUM", "LOC"] * 30)
    found, (line,) = guessed(own)
    assert found == {"data.text": "question", "data.label": "kind"}
    for word in ("'question'", "'kind'", "Guessed", "--text and --label"):
        assert word in line


def test_a_column_that_differs_from_the_usual_name_in_case_is_taken(tmp_path: Path) -> None:
    own = table(tmp_path, Text=QUESTIONS, Label=["a", "b"] * 30, other=["a", "b"] * 30)
    assert guessed(own)[0] == {"data.text": "Text", "data.label": "Label"}


@pytest.mark.parametrize("more", [{"lang": ["de", "en"] * 30, "more": QUESTIONS}, {}], ids=["two", "none"])
def test_nothing_is_guessed_where_several_columns_or_none_would_do(more: dict[str, Any], tmp_path: Path) -> None:
    columns = {"question": QUESTIONS, "kind": ["HUM", "LOC"] * 30, **more} if more else {"id": list(range(60))}
    assert guessed(table(tmp_path, **columns)) == ({}, [])


def test_what_is_written_out_is_not_guessed(tmp_path: Path) -> None:
    own = table(tmp_path, question=QUESTIONS, kind=["HUM", "LOC"] * 30, lang=["de", "en"] * 30)
    assert guessed(own, text="kind") == ({"data.label": "lang"}, guessed(own, text="kind")[1])
    assert guessed(own, label="lang")[0] == {"data.text": "question"}
    assert guessed(own, text="question", label="kind") == ({}, [])
    assert guessed(table(tmp_path, text=QUESTIONS, label=["a", "b"] * 30)) == ({}, [])


def test_the_test_set_is_a_tenth_unless_a_size_or_a_file_is_named(tmp_path: Path) -> None:
    own = table(tmp_path, text=QUESTIONS * 20, label=["a", "b"] * 600)
    assert with_guesses({"data.name": own})[0]["data.test-size"] == 120
    assert with_guesses({"data.name": own, "data.test-size": 50})[0]["data.test-size"] == 50
    assert "data.test-size" not in with_guesses({"data.name": own, "data.test": "public.csv"})[0]
    assert (held_out(2), held_out(150), held_out(10**6)) == (1, 50, 1000)


@pytest.mark.parametrize("name", ["rotten-tomatoes", "hub:sst2", "absent.csv", "job.toml"])
def test_a_name_that_is_no_table_here_is_left_alone(name: str) -> None:
    assert with_guesses({"data.name": name}) == ({"data.name": name}, [])


def given(*words: str) -> Given:
    found: list[Given] = []
    app = typer.Typer()

    @app.command()
    @with_table
    def command(given: Given, sites: int = 4) -> None:
        found.append(given)

    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return found[0]


def test_the_table_and_its_options_are_settings_and_win_over_others(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text("rounds = 3\n[data]\nname = 'other.csv'\n", encoding="utf-8")
    words = ["own.csv", "--text", "question", "--label", "kind", "--epsilon", "3", "-c", str(tmp_path / "job.toml")]
    own = {"data.name": "own.csv", "data.text": "question", "data.label": "kind", "privacy.epsilon": 3.0}
    assert given(*words, "--sites", "2").settings == {"rounds": 3, **own}
    assert given().settings == {}


@pytest.mark.parametrize(
    ("labels", "wanted"),
    [
        (["bad,good"], ("bad", "good")),
        (['"people, names",places'], ("people, names", "places")),
        (["people, names", 'so "called"', "[x]"], ("people, names", 'so "called"', "[x]")),
    ],
)
def test_labels_are_one_list_or_an_option_for_each(labels: list[str], wanted: tuple[str, ...]) -> None:
    words = [word for label in labels for word in ("--labels", label)]
    assert labels_of(str(given(*words).settings["data.labels"])) == wanted


@pytest.mark.parametrize(("labels", "coded"), [(["DESC", "ENTY"], True), (["1", "5"], True), (["bad", "good"], False)])
def test_labels_that_are_codes_point_to_phrases(labels: list[str], coded: bool, tmp_path: Path) -> None:
    own = {"data.name": table(tmp_path, text=QUESTIONS, label=labels * 30), "data.test-size": 9, "recipe": "head-only"}
    said = hints(configure(own).config)
    assert ["head.phrases" in line for line in said] == [True] * coded
    assert hints(configure({**own, "head.phrases": "a|b;c"}).config) == []


def test_a_conll_file_is_read_by_the_one_task_that_can_which_is_said(tmp_path: Path) -> None:
    (tmp_path / "own.conll").write_text("".join(f"Ada{n} B-PER\nwent O\n\n" for n in range(20)))
    name = str(tmp_path / "own.conll")
    assert guessed(name) == (
        {"model.task": "token-classification"},
        ["own.conll has a label for each word, so model.task is 'token-classification'"],
    )
    assert with_guesses({"data.name": name, "model.task": "causal-lm", "data.test-size": 9})[1] == []
    own = {"data.name": name, "model.task": "token-classification", "data.test-size": 9, "recipe": "head-only"}
    assert hints(configure(own).config) == [], "words have tags, and no phrase"
    with pytest.raises(DataError, match=r"words are read with model\.task = 'token-classification'"):
        load_dataset(DataConfig(name=name), "classification")


def test_nothing_that_runs_at_real_sites_guesses() -> None:
    root = Path(__file__).resolve().parents[2]
    rooms = ("client", "common", "deploy", "server", "strategies")
    users = [path for room in rooms for path in (root / room).rglob("*.py") if "own_table" in path.read_text()]
    assert users == []
    assert "with_guesses" not in (root / "cli" / "server.py").read_text()
