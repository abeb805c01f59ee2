"""A sweep from file to table on a tiny world: killed in the middle and gone on with; what changed is run again."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from audits.tiny_models import TARGETS, save_tiny_model, write_reviews
from fedveil.cli.main import app
from fedveil.common.config.run import method_of
from fedveil.common.config.text import to_toml
from fedveil.common.data.partition import public_size_of_part
from fedveil.common.errors import ConfigError, DataError, ModelError, RunFailed
from fedveil.common.run_lines import PrivacyLine, ResultFile, RoundLine, read_file, read_lines
from fedveil.experiments.site_count import recorded_sites
from fedveil.experiments.sweep import conduct, one_run
from fedveil.experiments.sweep.conduct import Finished, run_sweep
from fedveil.experiments.sweep.file import read_sweep
from fedveil.experiments.sweep.processes import Failure
from fedveil.experiments.sweep.rows import Row, columns, line_of, read_rows, write_rows
from fedveil.experiments.sweep.summary import markdown_of
from fedveil.server.lock import only_writer

pytestmark = [pytest.mark.slow, pytest.mark.rough_prices]

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "experiments" / "sweeps" / "tiny.toml"
PATIENCE = 240.0


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a folder with the model and the records that the tiny sweep names; tests of this file run in it."""
    folder, before = tmp_path_factory.mktemp("world"), Path.cwd()
    save_tiny_model("bert", folder / "tiny-bert")
    write_reviews(folder / "reviews.csv", 240)
    os.chdir(folder)
    yield folder
    os.chdir(before)


@dataclass(frozen=True)
class Swept:
    """The shipped tiny sweep, killed after some rows and gone on with."""

    killed: list[Row]
    told: str
    rows: list[Row]
    results: Path
    runs: Path


def each_here(
    function: Callable[[Any], Any], works: list[Any], jobs: int, threads: int, log: Callable[[Any], Path]
) -> Iterator[tuple[Any, Any]]:
    """Do in this process what a sweep has done in processes of their own, which load their libraries anew."""
    for work in works:
        try:
            yield work, function(work)
        except ModelError as error:
            log(work).parent.mkdir(parents=True, exist_ok=True)
            log(work).write_text(str(error), encoding="utf-8")
            yield work, Failure(str(error))


@pytest.fixture(scope="module")
def swept(world: Path) -> Swept:
    results, runs = world / "results", world / "runs" / "sweeps" / "tiny"

    def sweep() -> Result:
        return CliRunner().invoke(app, ["sweep", str(TINY), "--results", str(results)])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conduct, "each_in_a_process", each_here)
        first = get_context("fork").Process(target=sweep)  # of this process, which has loaded the libraries
        first.start()
        deadline = time.monotonic() + PATIENCE
        while len(read_rows(results / "tiny.jsonl")) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        first.kill()
        first.join()
        killed = read_rows(results / "tiny.jsonl")
        answer = sweep()
    assert answer.exit_code == 0, answer.output
    return Swept(killed, answer.output, read_rows(results / "tiny.jsonl"), results, runs)


def run_of(swept: Swept, row: Row) -> Path:
    (cell,) = (c for c in read_sweep(TINY).cells if (c.variant, c.arm, c.site, c.epsilon, c.seed) == row.key)
    method = method_of(str(row.settings["strategy"]), str(row.settings["adapter.name"]))
    return swept.runs / cell.name / f"{method}-{cell.name}"


@pytest.mark.slow
def test_a_sweep_that_was_killed_goes_on_where_it_stopped(swept: Swept) -> None:
    assert 2 <= len(swept.killed) < len(swept.rows)
    assert [row.key for row in swept.rows] == [
        (cell.variant, cell.arm, cell.site, cell.epsilon, cell.seed) for cell in read_sweep(TINY).cells
    ]
    assert swept.rows[: len(swept.killed)] == swept.killed, "a finished run was run again"
    assert f"{len(swept.killed)} of {len(swept.rows)} runs are there already" in swept.told
    assert {row.status for row in swept.rows} == {"completed"}


def test_every_run_has_one_line_of_progress(swept: Swept) -> None:
    lines = [line for line in swept.told.splitlines() if re.match(rf"\d+/{len(swept.rows)} ", line)]
    assert [line.split("/")[0] for line in lines] == [
        str(number) for number in range(len(swept.killed) + 1, len(swept.rows) + 1)
    ]
    assert all("accuracy" in line for line in lines)


def test_a_row_has_the_figures_of_its_run(swept: Swept) -> None:
    for row in swept.rows:
        run = run_of(swept, row)
        lines, reached = read_lines(RoundLine, run), read_file(ResultFile, run).reached
        assert reached is not None
        assert (row.accuracy_before, row.accuracy, row.epsilon) == (
            reached.accuracy_before,
            reached.accuracy,
            reached.epsilon,
        )
        assert (row.loss, row.rounds, row.test_records) == (lines[-1].loss, 2, 40)
        assert row.settings["seed"] == row.settings["data.seed"] == row.seed
        assert not {"output"} & set(row.settings)
        assert row.versions["torch"]
        assert row.code == one_run.code_version()
        assert re.fullmatch(rf"{re.escape(one_run.processor())}, (1 core|\d+ cores)", row.machine)
        if row.arm == "federated":
            assert row.bytes_up == sum(line.bytes_up for line in lines) > 0
            assert row.sent == max(line.bytes_up / len(line.participants) for line in lines if line.round_number) / 4
        assert (row.delta, row.epsilon is None) == ((None, True) if row.epsilon_asked is None else (1e-3, False))
        assert row.epsilon is None or row.epsilon <= 8.0


def test_baselines_train_on_the_parts_that_they_name_and_are_judged_on_the_same_records(swept: Swept) -> None:
    told = {}
    for row in swept.rows:
        if row.variant == "ffa-lora" and row.epsilon_asked:
            sizes = {line.site: line.public_size for line in read_lines(PrivacyLine, run_of(swept, row))}
            told[row.arm, row.site, row.seed] = sizes
    for seed in (1, 2):
        federated = told["federated", None, seed]
        assert set(federated) == {"site-0", "site-1"}
        assert len(set(federated.values())) == 2, "the parts are of one size: this would not tell them apart"
        for site in (0, 1):
            assert told["local-only", site, seed] == {f"site-{site}": federated[f"site-{site}"]}
        assert told["pooled", None, seed] == {"site-0": public_size_of_part(200)}
        # The same start on the same test part, whoever trains.
        assert len({row.accuracy_before for row in swept.rows if row.variant == "ffa-lora" and row.seed == seed}) == 1
    assert all((row.bytes_up is None) == (row.arm != "federated") for row in swept.rows)
    assert {row.arm: recorded_sites(run_of(swept, row)) for row in swept.rows} == {
        "federated": 2,
        "local-only": None,
        "pooled": 1,
    }


def test_the_csv_is_the_same_table_with_a_column_for_every_setting_and_version(swept: Swept) -> None:
    with (swept.results / "tiny.csv").open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == columns(swept.rows)
    assert {"variant", "arm", "seed", "accuracy", "epsilon", "seconds", "code", "test_records"} <= set(table[0])
    assert {"settings.adapter.rank", "settings.privacy.epsilon", "versions.torch", "versions.python"} <= set(table[0])
    for line, row in zip(table, swept.rows, strict=True):
        assert (float(line["accuracy"]), line["code"], int(line["seed"])) == (row.accuracy, row.code, row.seed)
        assert line["epsilon"] == ("" if row.epsilon is None else str(row.epsilon))
        assert float(line["settings.privacy.epsilon"]) == row.settings["privacy.epsilon"]


def test_the_summary_is_written_and_printed(swept: Swept) -> None:
    text = markdown_of(swept.rows)
    assert (swept.results / "tiny.md").read_text(encoding="utf-8") == text
    assert text.partition("<details>")[0] in swept.told


def test_a_sweep_that_is_complete_runs_nothing(swept: Swept) -> None:
    before = (swept.results / "tiny.jsonl").read_bytes()
    again = run_sweep(read_sweep(TINY), swept.runs, swept.results, lambda _: None)
    assert (again.rows, again.failed) == (swept.rows, [])
    assert (swept.results / "tiny.jsonl").read_bytes() == before


# Small sweeps of a run or two, in this process.


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a sweep's runs be run in this process."""
    monkeypatch.setattr(conduct, "each_in_a_process", each_here)


class Sweeping:
    """Sweeps of one variant in a folder, with what was said."""

    def __init__(self, folder: Path, world: Path) -> None:
        self.folder, self.said = folder, list[str]()
        self.settings: dict[str, Any] = {
            "strategy": "ffa-lora",
            "rounds": 1,
            "model.name": str(world / "tiny-bert"),
            "model.max-length": 24,
            "data.name": str(world / "reviews.csv"),
            "data.test-size": 40,
            "adapter.rank": 3,
            "adapter.targets": TARGETS["bert"],
            "head.start": "random",
            "training.local-steps": 1,
            "device": "cpu",
            "precision": "float32",
        }
        self.axes = 'sites = 2\nseeds = [1]\nepsilons = ["none"]\n'

    def __call__(self, **options: Any) -> Finished:
        (self.folder / "base.toml").write_text(to_toml(self.settings), encoding="utf-8")
        file = self.folder / "one.toml"
        file.write_text(f'base = "base.toml"\n{self.axes}', encoding="utf-8")
        self.said.clear()
        return run_sweep(read_sweep(file), self.folder / "runs", self.folder, self.said.append, **options)

    @property
    def table(self) -> Path:
        return self.folder / "one.jsonl"


@pytest.fixture
def sweeping(tmp_path: Path, world: Path) -> Sweeping:
    return Sweeping(tmp_path, world)


@pytest.mark.usefixtures("here")
def test_a_row_has_what_its_run_took_and_the_ranks_that_it_chose(sweeping: Sweeping) -> None:
    sweeping.settings |= {"strategy": "increlora", "rounds": 3, "training.learning-rate": 0.3}
    (row,) = sweeping().rows
    (folder,) = (sweeping.folder / "runs" / "base-eps-none-seed-1").glob("increlora-*")
    lines = read_lines(RoundLine, folder)
    assert row.costs is not None
    assert row.costs.round_seconds == sorted(line.seconds or 0.0 for line in lines)[1]
    assert row.costs.memory is not None
    assert row.costs.memory > 50_000_000
    stock = json.loads((folder / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    chosen = {name.replace("\\", ""): rank for name, rank in stock["rank_pattern"].items()}
    assert row.costs.ranks == (chosen or None)


@pytest.mark.usefixtures("here")
def test_a_changed_configuration_is_run_again_and_its_old_row_leaves_the_table(sweeping: Sweeping) -> None:
    (first,) = sweeping().rows
    sweeping.settings["rounds"] = 2
    (second,) = sweeping().rows
    assert (first.rounds, second.rounds) == (1, 2)
    assert any("a result with rounds 1, not 2 is not taken for this one's" in line for line in sweeping.said)
    assert read_rows(sweeping.folder / "one.set-aside.jsonl") == [first]
    assert len(list((sweeping.folder / "runs").glob("base-eps-none-seed-1.set-aside-*"))) == 1
    assert read_rows(sweeping.table) == [second]


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"code": "f" * 64}, "code version 'ffffffffffff', not '"),
        ({"versions": {"torch": "0.1"}}, "version of torch '0.1', not '"),
        ({"sites": 3}, "sites 3, not 2"),
        ({"through": "flower"}, "through 'flower', not 'one process'"),
    ],
)
def test_a_row_of_other_code_versions_or_sites_is_not_taken_for_this_ones(
    change: dict[str, Any], said: str, sweeping: Sweeping
) -> None:
    (row,) = sweeping().rows
    had = replace(row, started="2020-01-01T00:00:00+00:00", **change)
    for path in (sweeping.table, sweeping.folder / "runs" / "base-eps-none-seed-1" / one_run.ROW):
        path.write_text(line_of(had), encoding="utf-8")
    (again,) = sweeping().rows
    assert any(said in line for line in sweeping.said), sweeping.said
    assert again.started != had.started
    assert (again.code, again.versions, again.sites, again.through) == (row.code, row.versions, row.sites, row.through)


@pytest.mark.usefixtures("here")
def test_a_row_of_another_machine_is_taken_for_this_ones(sweeping: Sweeping) -> None:
    (row,) = sweeping().rows
    had = replace(row, machine="abacus, 3 cores")
    for path in (sweeping.table, sweeping.folder / "runs" / "base-eps-none-seed-1" / one_run.ROW):
        path.write_text(line_of(had), encoding="utf-8")
    assert sweeping().rows == [had]


@pytest.mark.usefixtures("here")
def test_rows_of_other_code_stay_where_that_is_asked_for_and_keep_its_version(sweeping: Sweeping) -> None:
    (row,) = sweeping().rows
    had = replace(row, code="f" * 64)
    write_rows(sweeping.table, [had])
    (sweeping.folder / "runs" / "base-eps-none-seed-1" / one_run.ROW).unlink()
    assert sweeping(any_code=True).rows == [had]
    sweeping.settings["rounds"] = 2
    assert sweeping(any_code=True).rows[0].code == row.code, "another configuration was kept as well"


@pytest.mark.usefixtures("here")
def test_a_run_that_ended_before_the_table_was_written_counts_by_its_folder(sweeping: Sweeping) -> None:
    rows = sweeping().rows
    for path in (sweeping.table, sweeping.table.with_suffix(".csv")):
        path.unlink()
    assert sweeping().rows == rows
    assert read_rows(sweeping.table) == rows


@pytest.mark.usefixtures("here")
def test_a_table_without_the_runs_folders_is_enough(sweeping: Sweeping) -> None:
    rows = sweeping().rows
    (sweeping.folder / "runs").rename(sweeping.folder / "gone")
    assert sweeping().rows == rows


@pytest.mark.usefixtures("here")
def test_a_failed_run_is_named_with_its_log_and_the_rest_goes_on(sweeping: Sweeping, tmp_path: Path) -> None:
    sweeping.axes += "[variants.good]\n[variants.lost]\nsettings = { model.name = 'nowhere' }\n"
    sweeping.axes += "[variants.last]\nsettings = { rounds = 2 }\n"
    (tmp_path / "base.toml").write_text(to_toml(sweeping.settings), encoding="utf-8")
    (tmp_path / "one.toml").write_text(f'base = "base.toml"\n{sweeping.axes}', encoding="utf-8")
    places = ["--output", str(tmp_path / "runs"), "--results", str(tmp_path)]
    answer = CliRunner().invoke(app, ["sweep", str(tmp_path / "one.toml"), *places])
    assert answer.exit_code == 1, answer.output
    assert [row.variant for row in read_rows(tmp_path / "one.jsonl")] == ["good", "last"]
    log = tmp_path / "runs" / "lost-eps-none-seed-1" / "log.txt"
    (line,) = (line for line in answer.output.splitlines() if line.startswith("2/3 lost, ε none, seed 1: FAILED"))
    assert line.endswith(f"log: {log}")
    assert "1 of 3 runs failed:" in answer.output
    assert "nowhere" in log.read_text(encoding="utf-8")


@pytest.mark.usefixtures("here")
def test_only_the_runs_that_are_called_so_are_started_and_other_rows_stay(sweeping: Sweeping) -> None:
    sweeping.axes = sweeping.axes.replace("seeds = [1]", "seeds = [1, 2]")
    assert [row.seed for row in sweeping(only="*-seed-2").rows] == [2]
    assert [row.seed for row in sweeping(only="*-seed-1").rows] == [1, 2]
    with pytest.raises(ConfigError, match="no run is called so; the first is 'base-eps-none-seed-1'"):
        sweeping(only="*-seed-3")


@pytest.mark.parametrize("changed", ["server/rounds.py", "experiments/fitted_head.py", "experiments/sweep/arms.py"])
def test_the_code_version_is_of_all_that_a_row_comes_from(tmp_path: Path, changed: str) -> None:
    root = one_run.PROJECT
    for path in (root / "pyproject.toml", root / "common" / "bundle.toml", *root.glob("[ceps]*/**/*.py")):
        copy = tmp_path / path.relative_to(root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    before = one_run.code_version(tmp_path)
    assert before == one_run.code_version(tmp_path)
    with (tmp_path / changed).open("a", encoding="utf-8") as file:
        file.write("# changed\n")
    assert one_run.code_version(tmp_path) != before


@pytest.mark.usefixtures("here")
def test_no_row_is_of_code_that_changed_meanwhile(sweeping: Sweeping, monkeypatch: pytest.MonkeyPatch) -> None:
    told = iter(["0" * 64, "f" * 64])
    monkeypatch.setattr(one_run, "code_version", lambda: next(told))
    monkeypatch.setattr(conduct, "code_version", lambda: "0" * 64)
    with pytest.raises(RunFailed, match="the code has changed since the sweep began"):
        sweeping()
    assert read_rows(sweeping.table) == []
    assert not list((sweeping.folder / "runs").rglob(one_run.ROW))


@pytest.mark.usefixtures("here")
def test_through_flower_go_the_runs_of_all_sites(sweeping: Sweeping, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedveil.experiments.in_process import run_in_process

    asked = []

    def simulate(settings: dict[str, Any], sites: int, watch: object) -> Path:
        asked.append(sites)
        return run_in_process(settings, sites, "7")

    monkeypatch.setattr("fedveil.experiments.simulate.simulate", simulate)
    sweeping.axes += 'baselines = ["local-only", "pooled"]\n'
    rows = sweeping(flower=True).rows
    assert asked == [2, 1]
    assert [(row.arm, row.through) for row in rows] == [
        ("federated", "flower"),
        ("local-only", "one process"),
        ("local-only", "one process"),
        ("pooled", "flower"),
    ]
    assert [row.processor_seconds is None for row in rows] == [row.through == "flower" for row in rows]


def test_more_runs_at_a_time_than_cores_are_refused(sweeping: Sweeping, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDVEIL_CORES", "1")
    for jobs in (0, 2):
        with pytest.raises(ConfigError, match=f"--jobs is {jobs}, and this machine has 1 cores"):
            sweeping(jobs=jobs)


def test_a_sweep_that_is_under_way_is_left_alone(sweeping: Sweeping) -> None:
    (sweeping.folder / "runs").mkdir()
    with only_writer(sweeping.folder / "runs"), pytest.raises(RunFailed, match="under way"):
        sweeping()
    assert not sweeping.table.exists()


def test_a_run_that_a_killed_sweep_still_writes_is_left_alone(
    sweeping: Sweeping, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conduct, "LAST_SECONDS", 0.0)
    run = sweeping.folder / "runs" / "base-eps-none-seed-1" / "ffa-lora-base-eps-none-seed-1"
    run.mkdir(parents=True)
    with only_writer(run), pytest.raises(RunFailed, match="under way"):
        sweeping()
    assert [path.name for path in (sweeping.folder / "runs").iterdir()] == ["base-eps-none-seed-1"]


def test_a_folder_with_another_runs_row_is_named(sweeping: Sweeping, swept: Swept) -> None:
    folder = sweeping.folder / "runs" / "base-eps-none-seed-1"
    folder.mkdir(parents=True)
    (folder / one_run.ROW).write_text(line_of(swept.rows[0]), encoding="utf-8")
    with pytest.raises(DataError, match="is of another run than its folder's name says"):
        sweeping()


def test_a_table_that_was_damaged_is_named_by_its_line(sweeping: Sweeping, swept: Swept) -> None:
    good = line_of(swept.rows[0])
    for bad in ("{", json.dumps({**json.loads(good), "acuracy": 1.0})):
        sweeping.table.write_text(f"{good}{bad}\n", encoding="utf-8")
        with pytest.raises(DataError, match=r"line 2 of .*one\.jsonl"):
            sweeping()


@pytest.mark.parametrize(
    ("told", "name"),
    [
        ("processor\t: 0\nmodel name\t: AMD EPYC\nflags\t: fpu\nprocessor\t: 1\nmodel name\t: AMD EPYC\n", "AMD EPYC"),
        ("model name : Intel(R) Xeon(R) CPU @ 2.20GHz \n", "Intel(R) Xeon(R) CPU @ 2.20GHz"),
        ("processor\t: 0\nBogoMIPS\t: 50.00\n", "aarch64"),
        ("model name\t:\nflags\t: fpu\n", "aarch64"),
        (None, "aarch64"),
    ],
)
def test_a_processor_has_its_models_name_where_the_system_tells_it(
    told: str | None, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    if told is not None:
        (tmp_path / "cpuinfo").write_text(told, encoding="utf-8")
    assert one_run.processor(tmp_path / "cpuinfo") == name


def test_a_commit_is_told_with_whether_the_tree_has_changes(tmp_path: Path) -> None:
    assert one_run.commit_of(tmp_path) == ""
    author = ["-c", "user.name=n", "-c", "user.email=n@example.org"]
    (tmp_path / "file").write_text("1", encoding="utf-8")
    for words in (["init", "-q"], ["add", "file"], [*author, "commit", "-qm", "first"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    clean = one_run.commit_of(tmp_path)
    assert len(clean) == 40
    (tmp_path / "file").write_text("2", encoding="utf-8")
    assert one_run.commit_of(tmp_path) == f"{clean}+"
