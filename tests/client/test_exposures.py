"""A round without privacy is on record before a record is used, and no private run on these records hides it."""

from __future__ import annotations

import csv
import io
import json
import math
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made_run import MadeRun
from report_forms import fedveil

from audits.tiny_models import write_reviews
from audits.tiny_site import OneSite, clinic, pins
from fedveil.client.ledger.ledger import Ledger
from fedveil.client.ledger.record_hashes import record_hashes
from fedveil.client.ledger.rows import Charge, Receipt
from fedveil.client.policy import Policy
from fedveil.common.config.text import to_toml
from fedveil.common.errors import ConfigError, PolicyRefusal
from fedveil.common.messages.blocks import layout_of
from fedveil.common.messages.round import Refusal, Spending
from fedveil.common.messages.wire import decode_reply, encode_reply
from fedveil.common.run_lines import ResultFile, RoundLine, read_file, read_lines
from fedveil.common.tasks.examples import Dataset
from fedveil.common.tasks.text import TextExample
from fedveil.experiments.in_process import run_in_process, simulated_nodes
from fedveil.privacy.accounting import Release, gaussian_release
from fedveil.privacy.events import EVENTS, Event, SampledGaussian
from fedveil.privacy.figures import epsilon_text
from fedveil.reports import federation_epsilon, report_of, write_reports
from fedveil.server.admission import Admission
from fedveil.strategies.job import configure

pytestmark = pytest.mark.rough_prices

OPEN = {"privacy.mode": "none"}
WHISPER = gaussian_release(noise_multiplier=20.0, sample_rate=0.01, count=1)


@pytest.fixture
def site(toy_settings: dict[str, Any], tmp_path: Path) -> OneSite:
    one = clinic(toy_settings, tmp_path)
    one.rule(allow_no_privacy=True)
    return one


def exposures(site: OneSite) -> list[tuple[str, int, int]]:
    """Return run, round and steps of every exposure."""
    with Ledger(site.ledger) as ledger:
        return [(row.run, row.round_number, row.steps) for row in ledger.exposures()]


def openly(site: OneSite) -> OneSite:
    """Return the site asked by a run without privacy; ledger, policy and memory are the same."""
    return replace(site, settings={**site.settings, **OPEN})


def check_that_an_open_round_is_on_record(site: OneSite) -> None:
    openly(site).train(1, "open")
    got = site.refuse(1, "private")
    assert got.kind == "policy", got
    assert "after-no-privacy" in got.reason
    assert "without privacy" in got.reason


def test_a_private_run_after_one_without_privacy_is_refused(site: OneSite) -> None:
    check_that_an_open_round_is_on_record(site)
    assert exposures(site) == [("open", 1, 2)]
    assert site.charges() == []


def test_an_open_round_that_leaves_no_trace_is_found_out(site: OneSite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedveil.client.budget.note_exposure", lambda *_: None)
    with pytest.raises(AssertionError, match="took part"):
        check_that_an_open_round_is_on_record(site)


def spent_after(site: OneSite, run: str = "private") -> Spending:
    """Return what a private round tells once the steward has allowed it."""
    site.rule(allow_no_privacy=True, after_no_privacy=True)
    spending = site.train(1, run).spending
    assert spending is not None
    return spending


def check_that_a_later_private_run_says_infinite(site: OneSite) -> None:
    openly(site).train(1, "open")
    told = spent_after(site)
    assert (told.epsilon_total, told.epsilon_remaining) == (math.inf, 0.0), "a finite ε for records that are out"


def test_a_steward_may_allow_it_and_the_total_is_infinite(site: OneSite) -> None:
    check_that_a_later_private_run_says_infinite(site)
    assert site.charges() == [("private", 1, "training")], "noise and budget hold as before"
    with Ledger(site.ledger) as ledger:
        assert ledger.epsilon("clinic", 1e-3) == math.inf


def test_a_ledger_that_does_not_look_for_exposures_is_found_out(site: OneSite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ledger, "exposed", lambda *_: False)
    with pytest.raises(AssertionError, match="finite"):
        check_that_a_later_private_run_says_infinite(site)


def test_the_budget_still_holds_after_an_exposure(site: OneSite) -> None:
    openly(site).train(1, "open")
    site.settings["privacy.epsilon"] = 0.7
    site.rule(allow_no_privacy=True, after_no_privacy=True)
    got = [site.ask(site.task(1, f"p{number}")) for number in range(3)]
    assert isinstance(got[-1], Refusal)
    assert got[-1].kind == "budget"


def check_that_rounds_are_counted(site: OneSite) -> None:
    site.rule(allow_no_privacy=True, max_rounds=1)
    one = openly(site)
    one.train(1)
    one.train(1)  # the very same task: answered with the reply that was kept
    for number in (1, 1, 2):
        one.memory.clear()
        got = one.ask(one.task(number))
        assert isinstance(got, Refusal), "a round was trained again, beyond what the policy has"
        assert (got.kind, "max-rounds = 1" in got.reason) == ("policy", True)
    assert len(exposures(site)) == 1


def test_rounds_without_privacy_are_counted_and_repeated_tasks_are_free(site: OneSite) -> None:
    check_that_rounds_are_counted(site)


def test_a_count_by_the_servers_round_number_is_found_out(site: OneSite, monkeypatch: pytest.MonkeyPatch) -> None:
    def by_its_number(one: Any, job: Any, task: Any) -> None:
        one.policy.check_round(task.round_number, task.round_number * job.config.training.local_steps)

    monkeypatch.setattr("fedveil.client.budget.note_exposure", by_its_number)
    with pytest.raises(AssertionError, match="trained again"):
        check_that_rounds_are_counted(site)


def test_steps_without_privacy_are_counted(site: OneSite) -> None:
    site.rule(allow_no_privacy=True, max_steps=3)
    openly(site).train(1)
    got = openly(site).refuse(2)
    assert "max-steps = 3" in got.reason
    assert "4 steps" in got.reason


def test_a_start_from_a_raw_gradient_is_an_exposure_and_no_round(site: OneSite) -> None:
    site.rule(allow_no_privacy=True, max_rounds=1)
    site.settings |= {"strategy": "fed-sb", "adapter.start": "nonprivate-gradient", **OPEN}
    start = replace(site.task(0), state={}, basis={}, basis_fingerprint="")
    assert not isinstance(site.ask(start), Refusal)
    assert exposures(site) == [("1", 0, 0)]
    with Ledger(site.ledger) as ledger:
        assert ledger.trained("clinic", "1") == (0, 0)


def test_it_is_on_disk_before_a_record_is_used(site: OneSite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedveil.privacy.no_privacy.ExposingPlan.batches", lambda *_: 1 / 0)
    one = openly(site)
    assert isinstance(one.ask(one.task(1)), Refusal)
    assert len(exposures(site)) == 1, "a round that failed may have looked at records all the same"


def test_a_ledger_that_cannot_be_written_stops_a_run_without_privacy_too(site: OneSite) -> None:
    site.ledger.write_text("not a ledger")
    one = openly(site)
    got = one.ask(one.task(1))
    assert isinstance(got, Refusal)
    assert got.kind == "failed"


# The same records under another name, at the ledger itself.


def texts(*numbers: int) -> Dataset:
    return Dataset("any", tuple(TextExample(text=f"record {n}", label=n % 2) for n in numbers), ("no", "yes"))


def charge_for(path: Path, dataset: str, data: Dataset, **terms: Any) -> Receipt:
    with Ledger(path) as ledger:
        held = {"run": "1", "round_number": 1, "delta": 1e-5, "max_epsilon": 8.0, **terms}
        charge = Charge(
            dataset, releases=(WHISPER,), **{k: held.pop(k) for k in ("run", "round_number", "delta", "max_epsilon")}
        )
        return ledger.charge(charge, records=record_hashes(data, ledger.key), **held)


def expose(path: Path, dataset: str, data: Dataset, **terms: Any) -> None:
    with Ledger(path) as ledger:
        ledger.expose(
            dataset,
            **{"run": "open", "round_number": 1, "steps": 2, **terms},
            records=record_hashes(data, ledger.key),
        )


@pytest.mark.parametrize("second", [range(10, 30), range(11, 31), range(19, 60)], ids=["half", "fewer", "one"])
def test_records_that_are_out_are_known_under_another_name(tmp_path: Path, second: range) -> None:
    path = tmp_path / "ledger.sqlite"
    expose(path, "ward", texts(*range(20)))
    with pytest.raises(PolicyRefusal, match=r"'clinic'"):
        charge_for(path, "clinic", texts(*second))
    with Ledger(path) as ledger:
        assert ledger.entries() == []
    assert not charge_for(path, "third", texts(*range(100, 120))).exposed
    assert charge_for(path, "fourth", texts(19, *range(200, 240)), after_exposure=True).exposed


def test_records_that_were_charged_before_and_are_out_later_are_infinite_from_then_on(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    charge_for(path, "ward", texts(*range(20)))
    expose(path, "other", texts(3, *range(100, 120)))
    with Ledger(path) as ledger:
        assert ledger.epsilon("ward", 1e-5) == math.inf
        assert ledger.epsilon_alone("ward", 1e-5) == ledger.epsilon_of_person("ward", 3, 1e-5) == math.inf
        assert ledger.epsilon("nobody's", 1e-5) == 0.0
    with pytest.raises(PolicyRefusal, match="without privacy"):
        charge_for(path, "ward", texts(*range(20)))


@pytest.mark.parametrize("terms", [{"run": ""}, {"steps": -1}, {"round_number": -1}])
def test_an_impossible_exposure_is_refused(tmp_path: Path, terms: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        expose(tmp_path / "ledger.sqlite", "ward", texts(1), **terms)


def test_exposures_and_failures_can_neither_be_changed_nor_removed(tmp_path: Path) -> None:
    expose(tmp_path / "ledger.sqlite", "ward", texts(1))
    connection = sqlite3.connect(tmp_path / "ledger.sqlite")
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.fail("ward", run="r", round_number=1, reason="no memory")
    kept = ("exposures", "failures")
    for statement in [
        f"{verb} {t}{rest}" for t in kept for verb, rest in (("UPDATE", " SET run = 'x'"), ("DELETE FROM", ""))
    ]:
        with pytest.raises(sqlite3.IntegrityError, match="only ever added"):
            connection.execute(statement)
    connection.close()


# What others are told.


def test_an_infinite_total_arrives_and_counts_at_the_server(site: OneSite) -> None:
    openly(site).train(1, "open")
    site.rule(allow_no_privacy=True, after_no_privacy=True)
    result = site.train(1, "private")
    got = decode_reply(encode_reply(result), layout_of(result.contribution), "private", 1)
    assert got == replace(result, contribution=got.contribution)  # type: ignore[union-attr]
    job = configure(site.settings)
    state = job.start(site.model().start)
    admission = Admission(job, {})
    assert admission.judge({1: result}, state, [1]) == {}
    admission.enrol({1: result})
    assert result.spending is not None
    for told in ({"epsilon_total": 1.0}, {"epsilon_round": 99.0}):
        lie = replace(result, spending=replace(result.spending, **told))
        assert admission.judge({1: lie}, state, [1]), f"{told} counted"


def exposed_run(folder: Path) -> MadeRun:
    """A finished run of two sites, of which one's records were released without privacy before."""
    made = MadeRun(folder / "run", {"rounds": 2}).start().round(1, 0.71).round(2, 0.74).end()
    lines = made.lines("privacy.jsonl")
    (made.folder / "privacy.jsonl").unlink()
    for line in lines:
        out = {"epsilon_total": "inf", "epsilon_remaining": 0.0} if line["site"] == "north" else {}
        made.append("privacy.jsonl", {**line, **out})
    return made


def test_every_form_of_the_report_says_infinite_and_why(tmp_path: Path) -> None:
    folder = exposed_run(tmp_path).folder
    assert federation_epsilon(folder) == math.inf
    data = report_of(folder)
    assert (data.headline.epsilon, data.headline.worst_site) == (math.inf, "north")
    assert [site.agreement for site in data.sites] == ["exposed", "agrees"]
    assert data.sites[1].epsilon_total is not None
    assert math.isfinite(data.sites[1].epsilon_total), "one site's exposure is not another's"
    write_reports(folder)
    for form in ("md", "html", "json"):
        text = (folder / f"report.{form}").read_text(encoding="utf-8")
        assert "released without privacy before" in text, f"report.{form} does not say why"
        assert "north: no " in text or "north: no \\u03b5" in text, f"report.{form} does not say whose"
        assert "differentially private in" not in text, f"report.{form} claims a figure all the same"
        assert ("∞" in text) or '"epsilon":"inf"' in text
    assert "NaN" not in text
    said = fedveil("report", folder)[1]
    assert "∞" in said


def test_a_whole_run_with_one_exposed_site_says_so_to_the_end(toy_settings: dict[str, Any], tmp_path: Path) -> None:
    settings = {**toy_settings, "rounds": 1, "privacy.noise-multiplier": 2.0, "data.labels": "bad,good"}
    rules = {**pins(settings), "allow-no-privacy": True, "after-no-privacy": True, "public-size": 100}
    (tmp_path / "policy.toml").write_text(to_toml(rules), encoding="utf-8")
    nodes = simulated_nodes(2, tmp_path)
    nodes[0] |= {"policy": str(tmp_path / "policy.toml"), "data": str(write_reviews(tmp_path / "own.csv", 100, 1))}
    run_in_process({**settings, **OPEN}, nodes, "open")
    folder = run_in_process(settings, nodes, "private")
    assert "ε ∞ of 8" in (folder / "run.log").read_text(encoding="utf-8")
    assert "released without privacy before" in (folder / "run.log").read_text(encoding="utf-8")
    assert json.loads((folder / "result.json").read_text(encoding="utf-8"))["epsilon"] == "inf", "no JSON holds ∞"
    reached = read_file(ResultFile, folder).reached
    assert reached is not None
    assert reached.epsilon == math.inf
    line = read_lines(RoundLine, folder)[0]
    assert line.participants == ["site-0"], "the site without a policy allows nothing after a run without privacy"


def test_a_simulation_without_privacy_goes_on_as_ever(toy_settings: dict[str, Any]) -> None:
    for run in ("1", "2"):
        folder = run_in_process({**toy_settings, "rounds": 1, **OPEN}, 2, run)
        line = read_lines(RoundLine, folder)[0]
        assert line.participants == ["site-0", "site-1"]


# The steward's commands.


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A ledger with a budget, a charge and an exposure of one data set, and a run's name that is a formula."""
    path = tmp_path / "ledger.sqlite"
    with Ledger(path) as ledger:
        ledger.set_budget("clinic", 3.0, 1e-5)
    charge_for(path, "clinic", texts(1), run='=HYPERLINK("http://x","y")')
    expose(path, "clinic", texts(1), run="@sum", round_number=3)
    return path


def test_the_steward_sees_an_exposure_among_the_events(mixed: Path) -> None:
    shown = fedveil("ledger", "show", mixed)[1]
    assert shown.startswith("clinic: ε ∞ of 3 at δ 1e-05")
    assert shown.splitlines()[0].endswith(", for one record")
    assert "run @sum round 3  released without privacy: 2 steps" in shown
    assert "after-no-privacy = true" in shown
    code, words = fedveil("ledger", "remaining", mixed, "--dataset", "clinic")
    assert (code, "ε 0.0000 of 3" in words, "∞ is spent" in words, "after-no-privacy" in words) == (0, True, True, True)
    code, words = fedveil("ledger", "budget", mixed, "--dataset", "clinic", "--epsilon", 5)
    assert (code, "after-no-privacy" in words) == (0, True)


def test_the_steward_sees_what_records_have_spent_under_other_names(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    for dataset, numbers in (("clinic", (1, 2)), ("ward", (2, 3)), ("lab", (4,))):
        charge_for(path, dataset, texts(*numbers))
    with Ledger(path) as ledger:
        one, two = (ledger.epsilon(name, 1e-5) for name in ("ward", "clinic"))
    assert one < two
    lines = fedveil("ledger", "show", path)[1].splitlines()
    said = {line.partition(":")[0]: line for line in lines if not line.startswith(" ")}
    assert f"its records' largest, under any name: {epsilon_text(two, decimals=4)}" in said["ward"]
    assert said["ward"].startswith(f"ward: ε {epsilon_text(one, decimals=4)} ")
    assert "largest" not in said["lab"]


def test_a_ledger_of_exposures_alone_is_shown(tmp_path: Path) -> None:
    expose(tmp_path / "ledger.sqlite", "ward", texts(1))
    code, shown = fedveil("ledger", "show", tmp_path / "ledger.sqlite")
    assert (code, shown.splitlines()[0]) == (0, "ward: ε ∞")


def test_exports_hold_the_exposures(mixed: Path) -> None:
    content = json.loads(fedveil("ledger", "export", mixed)[1])
    assert [(row["run"], row["round_number"], row["steps"]) for row in content["exposures"]] == [("@sum", 3, 2)]
    rows = list(csv.DictReader(io.StringIO(fedveil("ledger", "export", mixed, "--format", "csv")[1])))
    assert [row["purpose"] for row in rows] == ["training", "without privacy"]
    assert (rows[1]["count"], rows[1]["noise_multiplier"]) == ("2", "")


def test_a_figure_called_as_a_column_overwrites_none_of_a_charge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = type("Tree", (SampledGaussian,), {"name": "tree", "figures": (*SampledGaussian.figures, "count")})
    monkeypatch.setitem(EVENTS, "tree", kind())
    event = Event("tree", {"noise_multiplier": 2.0, "sample_rate": 0.1, "clip_norm": 1.0, "count": 7.0})
    path = tmp_path / "ledger.sqlite"
    with Ledger(path) as ledger:
        ledger.charge(Charge("ward", "r", 1, (Release(event, 3),), 1e-5, 8.0))
    (row,) = csv.DictReader(io.StringIO(fedveil("ledger", "export", path, "--format", "csv")[1]))
    assert (row["count"], row["event_count"]) == ("3", "7.0")


def test_a_round_that_was_answered_by_noise_is_shown_and_exported(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    charge_for(path, "ward", texts(1))
    with Ledger(path) as ledger:
        ledger.fail("ward", run="late", round_number=3, reason="=no time")
    (line,) = [line for line in fedveil("ledger", "show", path)[1].splitlines() if "run late" in line]
    assert "round 3  failed after its charge and was answered by noise alone, outside the claim: =no time" in line
    (row,) = json.loads(fedveil("ledger", "export", path)[1])["failures"]
    assert (row["dataset"], row["run"], row["round_number"], row["reason"]) == ("ward", "late", 3, "=no time")
    rows = list(csv.DictReader(io.StringIO(fedveil("ledger", "export", path, "--format", "csv")[1])))
    assert (rows[-1]["purpose"], rows[-1]["count"], rows[-1]["noise_multiplier"]) == ("noise alone", "", "")


def check_that_no_cell_is_a_formula(path: Path) -> None:
    for row in csv.DictReader(io.StringIO(fedveil("ledger", "export", path, "--format", "csv")[1])):
        assert not [cell for cell in row.values() if cell.startswith(("=", "+", "-", "@", "\t", "\r"))]


def test_no_cell_of_an_export_is_a_formula(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_that_no_cell_is_a_formula(mixed)
    monkeypatch.setattr("fedveil.cli.ledger_words.shown_as_text", lambda value: value)
    with pytest.raises(AssertionError):
        check_that_no_cell_is_a_formula(mixed)


@pytest.mark.parametrize("resume", ["~", "~root", "~nosuch", "/home/~root/..", ".", "~/runs/.."])
def test_a_runs_name_asks_nothing_about_the_sites_users_or_folders(site: OneSite, resume: str) -> None:
    site.settings["resume"] = resume
    got = site.refuse(1)
    assert (got.kind, got.run) == ("failed", "1"), got
    last = resume.rpartition("/")[2].removesuffix(".") if resume == "." else resume.rpartition("/")[2]
    assert got.reason.startswith(f"the run's name is {last!r}, "), "the answer follows from the site's machine"


@pytest.mark.parametrize("name", ['=HYPERLINK("http://x")', "..", "", "a b", "ward\u202e", "x" * 65, "-1"])
def test_a_run_cannot_be_called_what_a_spreadsheet_or_a_path_would_read(site: OneSite, name: str) -> None:
    site.settings["resume"] = f"runs/ffa-lora-{name}" if name != ".." else "runs/.."
    got = site.refuse(1)
    assert got.kind == "failed", got
    assert "run's name" in got.reason


def test_the_policy_key_is_false_unless_said(tmp_path: Path) -> None:
    assert Policy().after_no_privacy is False
