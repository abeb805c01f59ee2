"""A steward scores models on own held-out rows: on new rows alone, while no task runs, and nothing of it leaves."""

from __future__ import annotations

import csv
import json
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from digits import digits, save_vit, write_folder
from flwr.common.serde import recorddict_to_proto
from image_worlds import toy_digits
from typer.testing import CliRunner

from audits.tiny_models import write_questions
from audits.tiny_site import OneSite, clinic
from fedveil.cli.main import app
from fedveil.client import turns, worker
from fedveil.client.kept_states import kept_states, read_about, states_folder
from fedveil.client.ledger.ledger import Ledger
from fedveil.client.site import forget_readings
from fedveil.common.config.flat import Scalar
from fedveil.common.data.sources import load_dataset
from fedveil.common.errors import BudgetExhausted, ConfigError, DataError, FedVeilError, PolicyRefusal, RunFailed
from fedveil.common.messages.round import TrainResult
from fedveil.common.messages.wire import encode_reply
from fedveil.common.model import federated
from fedveil.deploy.commands import node_config
from fedveil.deploy.site_folder import SiteFolder, make_site, node_settings
from fedveil.deploy.withdraw import withdraw_site
from fedveil.experiments import evaluate, site_alone, site_evaluate, site_rows
from fedveil.experiments.in_process import run_in_process
from fedveil.experiments.site_evaluate import evaluate_site
from fedveil.experiments.site_scores import score_model
from fedveil.strategies.job import configure

pytestmark = [pytest.mark.rough_prices, pytest.mark.usefixtures("programs_may_start")]
SPLITS = ["test", "train", "", "train"]
RULE = 'held-out-column="split=test"'


def with_column(path: Path, target: Path) -> Path:
    """Write a copy of a table with the columns ``split`` and ``ward``."""
    rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    with target.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "split", "ward"])
        writer.writeheader()
        writer.writerows({**row, "split": SPLITS[i % 4], "ward": "ab"[i // 4 % 2]} for i, row in enumerate(rows))
    return target


@pytest.fixture
def place(toy_settings: dict[str, Any], tmp_path: Path) -> tuple[SiteFolder, OneSite]:
    """A site's folder, and the site as a server asks it: a quarter of its 40 rows is held out, two states are kept."""
    site = clinic(toy_settings, tmp_path)
    data = with_column(Path(str(site.node["data"])), tmp_path / "own.csv")
    node: dict[str, Scalar] = {"data": str(data), "public-size": 50, "held-out-column": "split=test", "keep-states": 2}
    policy = Path(str(site.node["policy"])).read_text(encoding="utf-8")
    folder = make_site(tmp_path / "clinic", "clinic", "127.0.0.1", policy=policy, node=node_config(node))
    site.node = node_settings(folder)
    return folder, site


def test_states_that_were_kept_and_their_base_are_scored_with_intervals_and_by_slice(
    place: tuple[SiteFolder, OneSite], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, site = place
    for round_number in (1, 2, 3):
        site.train(round_number)
    states = states_folder(site.node)
    assert states == folder.path / "ledger" / "states"
    assert (states.stat().st_mode & 0o777, {f.stat().st_mode & 0o777 for f in states.iterdir()}) == (0o700, {0o600})
    assert [read_about(path).round_number for path in kept_states(states)] == [2, 3], "more is kept than was asked for"
    before = site.charges()
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a score asks somebody"))
    scores, path = evaluate_site(folder, column="ward")
    assert (scores.held_out, scores.charged, site.charges()) == (10, 0, before)
    assert [model.model for model in scores.models] == [
        "base of run 1",
        "run 1, as sent in round 2",
        "run 1, as sent in round 3",
    ]
    for model in scores.models:
        whole, *slices = model.groups
        assert [group.name for group in slices] == ["a", "b"]
        assert whole.records == sum(group.records for group in slices) == 10
        assert whole.accuracy is not None
        assert whole.accuracy.low < whole.accuracy.value < whole.accuracy.high or whole.accuracy.value in {0, 1}
    assert json.loads(path.read_text(encoding="utf-8")) == json.loads(json.dumps(asdict(scores)))
    assert (path.parent, path.stat().st_mode & 0o777) == (folder.path / "ledger" / "scores", 0o600)
    job, model = configure(site.settings), site.model()
    held = load_dataset(job.config.data, job.config.model.task, str(site.node["data"])).examples[::4]
    model.write(model.start)
    alike = model.score(model.prepare(held))
    accuracy, loss = scores.models[0].groups[0].accuracy, scores.models[0].groups[0].loss
    assert accuracy is not None
    assert accuracy.value == alike.accuracy
    assert loss == pytest.approx(alike.loss, rel=1e-4)


def test_rows_that_the_ledger_was_charged_for_are_counted_and_in_no_score(
    place: tuple[SiteFolder, OneSite], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, site = place
    site.train()
    more = 'held-out-column="ward=a"'
    scores, _ = evaluate_site(folder, more=more)
    assert (scores.held_out, scores.charged) == (20, 15)
    assert all(model.groups[0].records == 5 for model in scores.models)
    with pytest.raises(DataError, match="was charged for all 20 held-out rows"):
        evaluate_site(folder, more='held-out-column="split=train"')
    monkeypatch.setattr(Ledger, "known", lambda *_: frozenset())
    forgetful, _ = evaluate_site(folder, more=more)
    assert forgetful.charged != scores.charged, "a score of rows that were trained on is not found"


def takes_a_task(site: OneSite) -> bool:
    """Return whether the worker asks its node for a task now."""
    asked: list[bool] = []
    node = SimpleNamespace(acquire=lambda: asked.append(True) or "")
    assert worker._answered(node, site.node, None) is False  # type: ignore[arg-type]
    return bool(asked)


def test_no_task_is_taken_while_models_are_scored_and_none_is_scored_while_a_task_runs(
    place: tuple[SiteFolder, OneSite], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, site = place
    site.train()
    assert takes_a_task(site)
    meanwhile: list[bool] = []
    monkeypatch.setattr(
        site_rows, "score_model", lambda *a, **k: meanwhile.append(takes_a_task(site)) or score_model(*a, **k)
    )
    evaluate_site(folder)
    assert meanwhile == [False, False]
    monkeypatch.setattr(turns, "PATIENCE", 0.0)
    with turns.task_turn(site.ledger), pytest.raises(RunFailed, match="answering a task"):
        evaluate_site(folder)

    @contextmanager
    def free(_: Path) -> Iterator[bool]:
        yield True

    monkeypatch.setattr(worker, "task_turn", free)
    meanwhile.clear()
    evaluate_site(folder)
    assert meanwhile == [True, True], "a worker that does not wait is not found"


def test_a_handed_over_run_is_scored_once_its_base_is_known_and_no_other_is_opened(
    place: tuple[SiteFolder, OneSite], toy_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = place
    run = run_in_process({**toy_settings, "data.labels": "bad,good", "output": str(tmp_path / "runs")}, 2, "7")
    done = CliRunner().invoke(app, ["site", "evaluate", str(folder.path), "--run", str(run), "--slice", "ward"])
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert lines[0] == "clinic: 10 held-out rows (rows with 'test' in column 'split'); % of right records"
    assert [line.partition(":")[0] for line in lines[1::3]][:2] == ["base of run 7", f"final model of {run.name}"]
    about = run / "adapter" / "fedveil.json"
    honest = json.loads(about.read_text(encoding="utf-8"))
    monkeypatch.setattr(evaluate, "load_base_model", lambda *_: pytest.fail("another base model was opened"))
    for name in ("base_fingerprint", "base_files"):
        about.write_text(json.dumps({**honest, name: "ab" * 32}), encoding="utf-8")
        with pytest.raises(FedVeilError, match="the site's policy has models"):
            evaluate_site(folder, [run])
    monkeypatch.setattr(site_evaluate, "check_base", lambda *_: None)
    monkeypatch.setattr(federated, "load_base_model", evaluate.load_base_model)
    federated.model_of.cache_clear()
    about.write_text(json.dumps({**honest, "base_fingerprint": "ab" * 32}), encoding="utf-8")
    with pytest.raises(pytest.fail.Exception, match="was opened"):
        evaluate_site(folder, [run])
    about.write_text(json.dumps({**honest, "label_names": ["good", "bad"]}), encoding="utf-8")
    with pytest.raises(ConfigError, match="has the labels good, bad, and this site's policy pins others"):
        evaluate_site(folder, [run])


def test_what_a_site_sends_has_no_byte_more(toy_settings: dict[str, Any], tmp_path: Path) -> None:
    """Of a site that holds rows out, keeps states and has scored, and of one that has the other rows alone."""
    sizes = []
    for number, more in enumerate(({}, {"held-out-column": "split=test", "keep-states": 2})):
        home = tmp_path / str(number)
        home.mkdir()
        site = clinic(toy_settings, home)
        site.node |= {"data": str(with_column(Path(str(site.node["data"])), home / "own.csv")), **more}
        forget_readings()
        results = [site.train(1), site.train(2)]
        sizes.append([_wire(result) for result in results])
    assert sizes[0] == sizes[1]


def _wire(result: TrainResult) -> int:
    """Return how many bytes a reply has as Flower sends it."""
    return recorddict_to_proto(encode_reply(result)).ByteSize()


def test_without_a_rule_a_model_or_after_a_withdrawal_nothing_is_scored(place: tuple[SiteFolder, OneSite]) -> None:
    folder, _ = place
    with pytest.raises(ConfigError, match="there is no model to score: set keep-states"):
        evaluate_site(folder)
    plain = SiteFolder(
        folder.path, "clinic", folder.server, node=folder.node.replace('held-out-column="split=test"', "")
    )
    with pytest.raises(ConfigError, match="no rule holds rows out"):
        evaluate_site(plain)
    with pytest.raises(DataError, match=r"has no column 'wing' \(--slice\)"):
        evaluate_site(folder, column="wing")
    withdraw_site(folder, "asked for", print)
    with pytest.raises(PolicyRefusal, match="was withdrawn"):
        evaluate_site(folder)


def test_a_model_of_this_site_alone_is_paid_from_the_same_budget_and_refused_where_that_is_spent(
    place: tuple[SiteFolder, OneSite], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, site = place
    for round_number in (1, 2, 3, 4):
        site.train(round_number)
    scores, _ = evaluate_site(folder, alone=True)
    assert scores.models[-1].model == "this site alone, as in run 1"
    assert scores.models[-1].groups[0].records == 10
    with Ledger(site.ledger) as ledger:
        of_run, alone = ([e for e in ledger.entries() if (e.run == "1") == own] for own in (True, False))
        assert [(e.event, e.count, e.unit) for e in alone] == [(e.event, e.count, e.unit) for e in of_run]
        assert {e.dataset for e in alone} == {e.dataset for e in of_run}
        spent = ledger.epsilon("clinic", ledger.terms("clinic").delta)
        assert {e.run for e in alone} == {"alone-1"}
    before = site.charges()
    evaluate_site(folder, alone=True)
    assert site.charges() == before, "what is trained and paid for is paid for again"
    shutil.rmtree(folder.path / "ledger" / "alone")
    policy = folder.path / "policy.toml"
    text = policy.read_text(encoding="utf-8")
    policy.write_text(re.sub(r"(?m)^epsilon = .*$", f"epsilon = {1.14 * spent}", text), encoding="utf-8")
    with pytest.raises(BudgetExhausted):
        evaluate_site(folder, alone=True)
    assert site.charges() == before
    monkeypatch.setattr(site_alone, "check_budget", lambda *_, **__: None)
    with pytest.raises(FedVeilError):
        evaluate_site(folder, alone=True)
    assert site.charges() != before, "a part of a run that cannot be paid for is charged, and not found"


@pytest.fixture(scope="session")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    return lambda kind="dinov2": save_vit(tmp_path_factory.mktemp(f"tiny-{kind}"), kind)


@pytest.mark.parametrize("task", ["causal-lm", "image-classification"])
def test_completions_and_images_are_scored_as_a_server_scores_them(
    task: str, toy_generation: dict[str, Any], vit: Callable[..., str], tmp_path: Path
) -> None:
    texts = task == "causal-lm"
    site = clinic(toy_generation if texts else toy_digits(vit, tmp_path), tmp_path)
    site.settings |= {"data.labels": "" if texts else "0,1"}
    if texts:
        data = write_questions(tmp_path / "own.csv", 40, seed=3)
        held = write_questions(tmp_path / "held.csv", 12, seed=4)
    else:
        data = write_folder(tmp_path / "own", digits(count=40, start=240))
        held = write_folder(tmp_path / "held", digits(count=12, start=300))
    site.node["data"] = str(data)
    site.rule()
    policy = Path(str(site.node["policy"])).read_text(encoding="utf-8")
    node: dict[str, Scalar] = {"data": str(data), "public-size": 50, "held-out-file": str(held), "keep-states": 1}
    folder = make_site(tmp_path / "clinic", "clinic", "127.0.0.1", policy=policy, node=node_config(node))
    site.node = node_settings(folder)
    site.train()
    scores, _ = evaluate_site(folder)
    config, model = configure(site.settings).config, site.model()
    model.write(model.start)
    alike = model.score(model.prepare(load_dataset(config.data, task, str(held)).examples))
    for scored in scores.models:  # the state that was sent is the start
        (whole,) = scored.groups
        assert (whole.records, scores.charged) == (12, 0)
        assert whole.accuracy is not None
        assert (whole.accuracy.value, whole.loss) == pytest.approx((alike.accuracy, alike.loss), rel=1e-4)


def test_a_paid_initialisation_of_a_model_trained_alone_is_in_the_same_budget(
    toy_settings: dict[str, Any], tmp_path: Path
) -> None:
    own = {
        "strategy": "fed-sb",
        "adapter.start": "dp-gradient",
        "start.sample-rate": 0.5,
        "start.noise-multiplier": 3.0,
    }
    site = clinic({**toy_settings, **own}, tmp_path)
    data = with_column(Path(str(site.node["data"])), tmp_path / "own.csv")
    policy = Path(str(site.node["policy"])).read_text(encoding="utf-8")
    node: dict[str, Scalar] = {"data": str(data), "public-size": 50, "held-out-column": "split=test", "keep-states": 1}
    folder = make_site(tmp_path / "clinic", "clinic", "127.0.0.1", policy=policy, node=node_config(node))
    site.node = node_settings(folder)
    first = site.ask(replace(site.task(0), state={}, basis={}, basis_fingerprint=""))
    assert isinstance(first, TrainResult), first
    for round_number in (1, 2, 3, 4):
        site.train(round_number)
    scores, _ = evaluate_site(folder, alone=True)
    assert scores.models[-1].model == "this site alone, as in run 1"
    with Ledger(site.ledger) as ledger:
        of_run, alone = ([e for e in ledger.entries() if (e.run == "1") == run] for run in (True, False))
        assert [(e.round_number, e.purpose, e.event, e.count) for e in alone] == [
            (e.round_number, e.purpose, e.event, e.count) for e in of_run
        ]
        assert of_run[0].round_number == 0
