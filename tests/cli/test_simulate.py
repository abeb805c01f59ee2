"""``fedveil run``: how many sites it plays, and how it ends."""

from __future__ import annotations

import re
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import typer
from made_run import MadeRun
from typer.testing import CliRunner

import fedveil.cli
from audits.tiny_models import write_questions
from audits.tiny_site import OneSite
from fedveil.cli.errors import for_people
from fedveil.cli.main import app
from fedveil.common.config.text import to_toml
from fedveil.common.errors import ConfigError, DataError, RunFailed
from fedveil.common.run_lines import ProgressFile, ResultFile
from fedveil.common.strict_json import to_json
from fedveil.experiments import simulate as simulation
from fedveil.experiments.in_process import InProcessTransport, run_in_process
from fedveil.experiments.site_count import record_sites, recorded_sites, sites_of
from fedveil.server.checkpoint import NAME
from fedveil.server.lock import only_writer
from fedveil.server.records import write_json
from fedveil.strategies.job import configure

pytestmark = pytest.mark.rough_prices

FOLLOW = simulation._follow


def refused(*_: Any) -> str:
    raise RunFailed("flwr run did not start: no")


@pytest.fixture
def no_flower(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Start nothing: every run is accepted, and has failed already. Return the numbers of sites that were asked for."""
    asked: list[int] = []

    @contextmanager
    def nothing(home: Path, workers: int) -> Iterator[None]:
        yield

    def submit(link: None, settings: dict[str, Any], sites: int, workers: int) -> str:
        asked.append(sites)
        return "7"

    def follow(link: None, run: str, folder: Path, *others: Any, old: Any) -> None:
        raise RunFailed("it was cut off")

    for name, fake in (("_superlink", nothing), ("_submit", submit), ("_follow", follow)):
        monkeypatch.setattr(simulation, name, fake)
    return asked


def cut_off(settings: dict[str, Any], sites: int) -> Path:
    """Return the folder of a run that its server left after round 1."""

    class Breaks(InProcessTransport):
        def exchange(self, tasks: Any, timeout: float) -> Any:
            if next(iter(tasks.values())).round_number == 2:
                raise OSError("the server is gone")
            return super().exchange(tasks, timeout)

    with pytest.raises(OSError, match="is gone"):
        run_in_process(settings, sites, "1", Breaks)
    folder = Path(settings["output"]) / "ffa-lora-1"
    assert (folder / NAME).is_file()
    return folder


def test_a_resumed_run_has_the_sites_that_it_began_with(toy_settings: dict[str, Any], no_flower: list[int]) -> None:
    folder = cut_off(toy_settings, 3)
    record_sites(folder, 3)
    resume = ["run", "-c", f'resume="{folder}"']
    assert "3 sites" in CliRunner().invoke(app, resume).output
    other = CliRunner().invoke(app, [*resume, "--sites", "4"])
    assert other.exit_code == 1
    assert "began with 3 sites, not 4" in other.output.splitlines()[-1]
    CliRunner().invoke(app, [*resume, "--sites", "3"])
    assert no_flower == [3, 3], "a run was started with other partitions"


@pytest.mark.parametrize("name", ["old[/b]/reviews.csv", "[red]reviews.csv"])
def test_names_of_a_run_are_text_and_no_markup(
    name: str, toy_settings: dict[str, Any], no_flower: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def follow(link: None, run: str, folder: Path, watch: Any, *_: Any, **__: Any) -> None:
        state = ProgressFile(f"reads {name}", round_number=1, rounds=2, answered=[name], asked=2)
        watch(simulation.Progress([f"line of {name}"], state))
        raise RunFailed(f"no {name}")

    monkeypatch.setattr(simulation, "_follow", follow)
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(toy_settings["data.name"], tmp_path / name)
    (tmp_path / "run.toml").write_text(to_toml({**toy_settings, "data.name": name}), encoding="utf-8")
    done = CliRunner().invoke(app, ["run", "-c", "run.toml", "--sites", "2"])
    assert isinstance(done.exception, SystemExit), done.exception
    for said in (f"and {name}: 2 sites", f"line of {name}", f"fedveil: no {name}"):
        assert said in done.output
    for path in Path(fedveil.cli.__file__).parent.glob("*.py"):
        made = path.read_text(encoding="utf-8").split("Console(")[1:]
        assert all("markup=False" in after[: after.index(")")] for after in made), path


def test_a_run_writes_down_how_many_sites_it_has(toy_settings: dict[str, Any], no_flower: list[int]) -> None:
    with pytest.raises(RunFailed):
        simulation.simulate(toy_settings, 3, lambda progress: None)
    assert recorded_sites(Path(toy_settings["output"]) / "ffa-lora-7") == 3


def test_a_simulation_that_divides_by_label_what_has_none_starts_nothing(
    toy_generation: dict[str, Any], no_flower: list[int]
) -> None:
    settings = {**toy_generation, "data.partition": "dirichlet"}
    with pytest.raises(ConfigError, match="'dirichlet', but the records have no label: set it to 'iid'") as refusal:
        simulation.simulate(settings, 3, lambda progress: None)
    assert "\n" not in str(refusal.value)
    assert no_flower == [], "the run was started"


def test_sites_with_data_of_their_own_divide_nothing_and_are_not_refused(
    toy_generation: dict[str, Any], tmp_path: Path
) -> None:
    settings = {**toy_generation, "data.partition": "dirichlet", "privacy.noise-multiplier": 2.0}
    own = {"data": str(write_questions(tmp_path / "own.csv", 40)), "ledger": str(tmp_path / "clinic.sqlite")}
    site = OneSite(settings, {"site": "clinic", "public-size": 50, **own})
    site.rule()
    site.train()


def test_a_run_of_unknown_sites_is_not_resumed_on_a_guess(toy_settings: dict[str, Any], tmp_path: Path) -> None:
    config = configure({**toy_settings, "resume": str(tmp_path)}).config
    with pytest.raises(ConfigError, match="does not say how many sites it began with: give as many as then"):
        sites_of(config, None)
    assert sites_of(config, 3) == 3
    assert sites_of(configure(toy_settings).config, None) == 4


def test_a_file_that_goes_away_while_it_is_looked_at_does_not_end_the_following(tmp_path: Path) -> None:
    assert simulation._last_written(tmp_path) == 0.0
    (tmp_path / "rounds.jsonl").write_text("")
    (tmp_path / ".progress.json.7.tmp").symlink_to(tmp_path / "gone")  # listed, and not there
    assert simulation._last_written(tmp_path) == (tmp_path / "rounds.jsonl").stat().st_mtime


def test_a_failed_run_is_followed_until_its_report_is_written(tmp_path: Path) -> None:
    class Alive:
        process = type("Process", (), {"poll": staticmethod(lambda: None)})

    MadeRun(tmp_path).start().end("failed", "nobody answered")
    held = threading.Event()

    def server() -> None:
        with only_writer(tmp_path):
            held.set()
            time.sleep(0.5)
            (tmp_path / "report.md").write_text("what it has cost")

    writing = threading.Thread(target=server)
    writing.start()
    held.wait()
    with pytest.raises(RunFailed, match="nobody answered"):
        simulation._follow(cast(Any, Alive), "7", tmp_path, lambda progress: None, 0, old=None)
    assert (tmp_path / "report.md").is_file(), "the SuperLink is ended while the server writes"
    writing.join()


@pytest.mark.parametrize("place", ["/proc/x", "a file"])
def test_an_output_that_cannot_be_written_is_said_before_flower_starts(
    place: str, toy_settings: dict[str, Any], no_flower: list[int], tmp_path: Path
) -> None:
    (tmp_path / "a file").touch()
    output = tmp_path / place
    with pytest.raises(ConfigError, match=r"output: .* cannot be written \(.*\): name another folder"):
        simulation.simulate({**toy_settings, "output": str(output)}, 2, print)
    assert not no_flower


def test_more_sites_asked_for_than_there_are_is_said_before_flower_starts(
    toy_settings: dict[str, Any], no_flower: list[int]
) -> None:
    with pytest.raises(ConfigError, match="min-sites is 3, and 2 sites would be there"):
        simulation.simulate({**toy_settings, "min-sites": 3}, 2, print)
    assert not no_flower


def test_more_sites_than_records_are_refused_before_flower_starts(
    toy_settings: dict[str, Any], no_flower: list[int]
) -> None:
    with pytest.raises(DataError, match=r"training records, too few for 5000 sites"):
        simulation.simulate(toy_settings, 5000, print)
    assert not no_flower


@pytest.mark.parametrize("taken", [False, True])
def test_the_end_before_a_resumed_run_stays_and_is_not_taken_for_its_own(
    taken: bool, toy_settings: dict[str, Any], no_flower: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = cut_off(toy_settings, 3)
    record_sites(folder, 3)
    write_json(folder / "result.json", to_json(ResultFile("failed", "the first end", None)))
    old = (folder / "result.json").read_bytes()
    if not taken:
        monkeypatch.setattr(simulation, "_submit", refused)
    else:
        monkeypatch.setattr(simulation, "_follow", FOLLOW)
        monkeypatch.setattr(simulation, "whole_lines", lambda path: [])
        ends = iter(["failed", "failed"])

        def watch(progress: Any) -> None:
            if next(ends, None) is None:
                write_json(folder / "result.json", to_json(ResultFile("failed", "the second end", None)))

        process = type("Process", (), {"poll": staticmethod(lambda: None)})
        link = SimpleNamespace(process=process)
        monkeypatch.setattr(simulation, "_superlink", lambda home, workers: nullcontext(link))
    with pytest.raises(RunFailed, match="the second end" if taken else "flwr run did not start"):
        simulation.simulate({**toy_settings, "resume": str(folder)}, 3, watch if taken else print)
    assert taken or (folder / "result.json").read_bytes() == old


def test_an_error_of_the_machine_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(typer.Exit) as ended:
        for_people((tmp_path / "gone").read_bytes)()
    assert ended.value.exit_code == 1
    assert capsys.readouterr().err == f"fedveil: {tmp_path / 'gone'}: No such file or directory\n"


def test_the_version_names_the_code_that_sites_must_agree_on() -> None:
    done = CliRunner().invoke(app, ["--version"])
    assert done.exit_code == 0
    assert re.fullmatch(r"fedveil \d+\.\d+\.\d+, bundle [0-9a-f]{64}\n", done.output), done.output


def test_a_test_part_that_is_the_records_themselves_is_refused(
    toy_settings: dict[str, Any], no_flower: list[int], tmp_path: Path
) -> None:
    link = tmp_path / "test.csv"
    link.symlink_to(toy_settings["data.name"])
    for test in (toy_settings["data.name"], str(link)):
        with pytest.raises(ConfigError, match=r"data\.test is data\.name itself"):
            simulation.simulate({**toy_settings, "data.test": test}, 2, print)
    assert not no_flower
