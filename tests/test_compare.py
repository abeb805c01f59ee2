"""A comparison runs every cell once, in both modes, and its table holds what the runs' files say."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from made_run import MadeRun
from typer.testing import CliRunner

from cli.main import app
from common.config.text import to_toml
from common.errors import ConfigError, RunFailed
from common.run_lines import Reached, RoundLine, read_lines
from experiments import compare as comparison
from experiments.compare import DEFAULT, Outcome, compare, table
from experiments.site_count import record_sites
from server.lock import is_written, only_writer
from strategies import STRATEGIES
from strategies.job import configure


class InThisProcess:
    """Stands for a pool of processes, each of which loads its libraries anew."""

    def __init__(self, jobs: int, context: Any, begin: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        begin(*arguments)

    def __enter__(self) -> InThisProcess:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[None]:
        future = Future[None]()
        future.set_result(function(*arguments))
        return future


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a comparison's runs be run in this process."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(comparison, "_stopped", None, raising=False)
    monkeypatch.setattr(comparison, "ProcessPoolExecutor", InThisProcess)


def test_the_shipped_comparison_is_of_strategies_each_once() -> None:
    from common.config.text import parse_settings

    named = [configure(parse_settings([str(path)])).strategy.name for path in DEFAULT]
    assert len(set(named)) == len(named) == 4
    assert set(named) <= set(STRATEGIES)


@pytest.mark.usefixtures("here")
def test_a_comparison_runs_both_modes_and_goes_on_where_it_stopped(
    toy_settings: dict[str, Any], tmp_path: Path
) -> None:
    job = tmp_path / "job.toml"
    job.write_text(to_toml({k: v for k, v in toy_settings.items() if k != "output"} | {"rounds": 1}), encoding="utf-8")
    arguments = ["compare", str(job), "--seeds", "1,2", "--sites", "2", "--output", str(tmp_path / "out")]
    first = CliRunner().invoke(app, arguments)
    assert first.exit_code == 0, first.output
    outcomes = json.loads((tmp_path / "out" / "compare.json").read_text(encoding="utf-8"))
    assert [(o["mode"], o["seed"]) for o in outcomes] == [(m, s) for m in ("dp-sgd", "none") for s in (1, 2)]
    for outcome in outcomes:
        mode = outcome["mode"]
        folder = tmp_path / "out" / f"ffa-lora-job-{mode}-{outcome['seed']}"
        line = read_lines(RoundLine, folder)[0]
        assert (outcome["accuracy"], outcome["bytes_up"]) == (line.accuracy, line.bytes_up)
        assert (outcome["epsilon"] is not None) == (mode == "dp-sgd")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("rounds.jsonl")}
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 0, again.output
    assert {path: path.stat().st_mtime_ns for path in before} == before, "a finished run was run again"


def test_a_comparison_that_divides_by_label_what_has_none_starts_nothing(
    toy_generation: dict[str, Any], tmp_path: Path
) -> None:
    job = tmp_path / "job.toml"
    job.write_text(to_toml({**toy_generation, "data.partition": "dirichlet"}), encoding="utf-8")
    with pytest.raises(ConfigError, match="'dirichlet', but the records have no label"):
        compare([job], [1], 2, {}, tmp_path / "out", lambda *_: None)
    assert not (tmp_path / "out").exists(), "a run was started"


def test_a_kept_result_of_other_settings_stops_the_comparison_before_anything_runs(
    toy_settings: dict[str, Any], tmp_path: Path
) -> None:
    job, output = tmp_path / "job.toml", tmp_path / "out"
    job.write_text(to_toml({k: v for k, v in toy_settings.items() if k != "output"}), encoding="utf-8")
    kept = output / "ffa-lora-job-dp-sgd-1"
    private = {**toy_settings, "privacy.mode": "dp-sgd", "seed": 1, "output": "/before/it/was/moved"}
    run = MadeRun(kept, private).start()
    run.end(reached=Reached(accuracy_before=0.5, accuracy=0.7, epsilon=7.9, rounds=2))
    record_sites(kept, 2)
    for arguments, differs in (
        (["-c", "privacy.epsilon=1.0 rounds=4"], "privacy.epsilon = 8.0, not 1.0"),
        (["--sites", "9"], "--sites = 2, not 9"),
    ):
        asked = ["compare", str(job), "--seeds", "1", "--sites", "2", "--output", str(output), *arguments]
        answer = CliRunner().invoke(app, asked)
        assert (answer.exit_code, answer.output.count("\n")) == (1, 1), answer.output
        assert differs in answer.output
        assert kept.name in answer.output
        assert list(output.iterdir()) == [kept]


def test_a_run_that_failed_is_run_again_and_its_folder_is_kept_aside(
    toy_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # two runs at once
    job, output = tmp_path / "job.toml", tmp_path / "out"
    job.write_text(to_toml({k: v for k, v in toy_settings.items() if k != "output"}), encoding="utf-8")
    cut = output / "ffa-lora-job-dp-sgd-1"
    MadeRun(cut).start().end("failed", "the disk was full")
    with only_writer(cut), pytest.raises(RunFailed, match="under way"):
        compare([job], range(1, 9), 2, {"rounds": 1}, output, lambda *_: None)
    begun = [folder for folder in output.iterdir() if folder != cut]
    assert not any(map(is_written, begun)), "a run went on after the comparison had ended"
    assert len(begun) < 15, "a comparison that had failed began the rest of its runs"
    request.getfixturevalue("here")
    outcomes = compare([job], [1], 2, {"rounds": 1}, output, lambda *_: None)
    assert [outcome.mode for outcome in outcomes] == ["dp-sgd", "none"]
    (aside,) = output.glob(f"{cut.name}.cut-short-*")
    assert "the disk was full" in (aside / "result.json").read_text(encoding="utf-8")


def test_a_job_that_was_handed_out_before_the_comparison_failed_does_not_begin(
    toy_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = multiprocessing.Event()
    stopped.set()
    monkeypatch.setattr(comparison, "_stopped", stopped, raising=False)
    comparison._run({**toy_settings, "output": str(tmp_path / "out")}, 2, "job-none-1")
    assert not (tmp_path / "out").exists()


def test_the_table_shows_means_each_seed_and_the_worst_epsilon() -> None:
    cells = [
        ("job", "dp-sgd", 1, 0.5, 0.70, 7.5, 2000, 1000, 9.0, "plain"),
        ("job", "dp-sgd", 2, 0.5, 0.80, 7.9, 2000, 1000, 11.0, "plain"),
    ]
    text = table([*(Outcome(*cell) for cell in cells), Outcome("job", "none", 1, 0.5, 0.9, None, 1, 1, 1.0, "open")])
    assert "| job | plain | dp-sgd | **75.0** ± 7.1 (70.0, 80.0) | 50.0 | 7.900 | 2 | 1 | 10 |" in text
    assert "| job | open | none | **90.0** (90.0) | 50.0 | no claim |" in text


def test_configurations_that_are_filled_in_otherwise_are_refused_unless_they_name_it(tmp_path: Path) -> None:
    files = [tmp_path / "open.toml", tmp_path / "named.toml"]
    files[0].write_text("seed = 1\n", encoding="utf-8")
    files[1].write_text('strategy = "fedavg-lora"\n', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"'open' gets the recipe 'metric' and 'named' gets 'plain', so they differ"):
        compare(files, [1], 2, {"privacy.epsilon": 8.0}, tmp_path / "out", lambda *_: None)
    assert not (tmp_path / "out").exists()


def test_two_configurations_of_one_name_are_refused_before_anything_runs(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "job.toml").write_text("rounds = 1\n", encoding="utf-8")
    files = [tmp_path / "a" / "job.toml", tmp_path / "b" / "job.toml"]
    with pytest.raises(ConfigError, match="different names"):
        compare(files, [1], 2, {}, tmp_path / "out", lambda *_: None)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words", ["plan --sites 0", "plan --sites -3", "run --sites 0", "run --sites -3", "run --workers -1"]
)
def test_numbers_of_sites_that_there_cannot_be_are_refused_before_anything_is_computed(words: str) -> None:
    """A recipe that goes by the number of sites took the root of a negative one."""
    done = CliRunner().invoke(app, words.split())
    assert (done.exit_code, done.exception.__class__) == (2, SystemExit)
    assert "is not in the range" in " ".join(done.output.replace("│", " ").split())
