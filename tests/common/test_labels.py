"""Labels with commas: one text stands for one list of them, in settings, over the wire and in policies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_forms import fedveil

from fedveil.client.policy_file import load_policy
from fedveil.client.site import check_job
from fedveil.common.config.text import parse_settings, to_toml
from fedveil.common.data.sources import known_labels
from fedveil.common.errors import ConfigError, PolicyRefusal
from fedveil.common.labels import labels_of, labels_text
from fedveil.common.run_lines import RoundLine, read_lines
from fedveil.experiments.in_process import run_in_process
from fedveil.strategies.job import configure

ODD = ("people, names", "Orte & Länder 🌍", 'so "called"', "[a]")
WRITTEN = '"people, names",Orte & Länder 🌍,"so ""called""",[a]'


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1).map(str.strip).filter(bool)))
def test_every_list_of_labels_has_a_text_of_its_own(labels: list[str]) -> None:
    assert labels_of(labels_text(labels)) == tuple(labels)


def test_a_text_without_quotes_reads_as_ever_and_one_with_open_quotes_is_refused() -> None:
    assert labels_of(" bad , good,it's") == ("bad", "good", "it's")
    assert labels_of("  ") == ()
    for wrong in ('good,"bad', '"a"b,c', 'good,"bad,worse'):
        with pytest.raises(ConfigError, match="put one that holds a comma into double quotes"):
            labels_of(wrong)


def test_a_list_in_a_file_or_a_command_is_that_text(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text(f"[data]\nlabels = {list(ODD)!r}\n", encoding="utf-8")
    listed = parse_settings([str(tmp_path / "job.toml")])
    assert listed == {"data.labels": WRITTEN}
    assert parse_settings([f"seed=3 data.labels={list(ODD)!r} rounds=2"]) == {**listed, "seed": 3, "rounds": 2}
    assert parse_settings([f"data.labels='{WRITTEN}'"]) == listed
    job = configure(listed)
    assert known_labels(job.config.data) == ODD
    (tmp_path / "again.toml").write_text(to_toml(job.settings()), encoding="utf-8")
    assert configure(parse_settings([str(tmp_path / "again.toml")])) == job
    for wrong in ("data.labels=[1, 2]", 'data.text=["a", "b"]'):
        with pytest.raises(ConfigError, match="must be text"):
            parse_settings([wrong])


def made_site(folder: Path, labels: str, *names: str) -> Path:
    data = folder / "own.csv"
    rows = "".join('"{}",{}\n'.format(f"text {i}", labels_text([name])) for i, name in enumerate(names * 4))
    data.write_text(f"text,label\n{rows}", encoding="utf-8")
    size = ("--public-size", 4 * len(names), "--delta", 1e-3)
    words = ("--server", "localhost", "--data", data, *size, "--labels", labels)
    code, said = fedveil("site", "init", folder / "clinic", *words)
    assert code == 0, said
    return folder / "clinic"


def test_a_table_with_such_labels_has_a_way_into_a_site(tmp_path: Path) -> None:
    site = made_site(tmp_path, WRITTEN, *ODD)
    code, said = fedveil("site", "check", site)
    assert (code, "16 of 16 rows fit" in said) == (0, True), said
    assert 'labels: "people, names" 4, Orte & Länder 🌍 4, "so ""called""" 4, [a] 4' in said
    code, said = fedveil("site", "pin", site, "--max-length", 64)
    assert (code, load_policy(site / "policy.toml").labels) == (0, WRITTEN), "labels that stay were written anew"


@pytest.mark.parametrize("asked", ['a,"b,c"', "a,b,c", '"a,b,c"', 'c,"a,b"', '"a,b",c,d'])
def test_a_job_whose_labels_merely_spell_like_the_policys_is_refused(asked: str, tmp_path: Path) -> None:
    site = made_site(tmp_path, '"a,b",c', "a,b", "c")
    node: dict[str, Any] = {"site": "clinic", "data": str(tmp_path / "own.csv"), "policy": str(site / "policy.toml")}
    own = {"data.name": "test.csv", "model.max-length": 128, "privacy.epsilon": 1.0, "privacy.delta": 1e-4}
    check_job(node, configure({**own, "data.labels": ' "a,b" ,c'.replace('" ,', '",')}), simulated=False)
    with pytest.raises((PolicyRefusal, ConfigError)):
        check_job(node, configure({**own, "data.labels": asked}), simulated=False)


def test_a_run_with_such_labels_is_scored_by_them(toy_settings: dict[str, Any]) -> None:
    data = Path(toy_settings["data.name"])
    text = data.read_text(encoding="utf-8").replace(",good,", ',"good, fine",')
    data.write_text(text, encoding="utf-8")
    folder = run_in_process({**toy_settings, "rounds": 1, "data.labels": 'bad,"good, fine"'}, 2)
    (line,) = read_lines(RoundLine, folder)
    assert [score.label for score in line.labels] == ["bad", "good, fine"]
    assert line.refusals == []
