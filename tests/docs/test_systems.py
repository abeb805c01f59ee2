"""The page of published systems: every system that it lists can be run as it says, and no row is left out."""

from __future__ import annotations

import re
import tomllib
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import ClassVar

import pytest
from safetensors.torch import load_file

from audits.tiny_models import write_reviews
from docs.make.differences import DIFFERENCES
from docs.make.pages import systems_page
from docs.make.systems import AXES, CONFIGS, SYSTEMS, System, named_rows, system_table, unnamed_rows
from fedveil.common.config.text import flatten, parse_settings
from fedveil.common.errors import ConfigError
from fedveil.common.run_lines import RoundLine, read_lines
from fedveil.experiments.evaluate import evaluate_run
from fedveil.experiments.in_process import run_in_process
from fedveil.experiments.sweep.file import read_sweep
from fedveil.experiments.sweep.rows import read_rows, results_file
from fedveil.server.checkpoint import saved_state
from fedveil.strategies import STRATEGIES
from fedveil.strategies.ffa_lora import FFALoRA
from fedveil.strategies.job import configure
from fedveil.strategies.requirements import REFUSED_STRATEGIES

pytestmark = [pytest.mark.rough_prices, pytest.mark.one_length, pytest.mark.peft]

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.name)
def test_a_system_is_a_run_a_command_or_refused_with_its_reason(system: System) -> None:
    assert bool(system.settings) != bool(system.instead)
    if not system.settings:
        return
    strategy = str(system.settings["strategy"])
    if strategy in REFUSED_STRATEGIES:
        with pytest.raises(ConfigError, match="cannot be run"):
            configure(system.settings)
        assert f"refused: {REFUSED_STRATEGIES[strategy]}" in system_table()
        return
    job = configure(system.settings)
    for key in AXES:
        if key in system.settings:
            assert job.settings()[key] == system.settings[key]


def test_every_row_is_some_systems_or_listed_and_every_refused_strategy_is_a_system() -> None:
    page = systems_page()
    for key, rows in AXES.items():
        for name in rows:
            assert ((key, name) in named_rows()) != ((key, name) in set(unnamed_rows()))
            assert (key, name) in named_rows() or f'`{key} = "{name}"`' in page
    assert set(REFUSED_STRATEGIES) <= {str(system.settings.get("strategy")) for system in SYSTEMS}


def test_every_system_has_its_paper_and_what_differs() -> None:
    assert {system.name for system in SYSTEMS} <= set(DIFFERENCES)


def test_a_row_that_comes_later_is_on_the_page_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    class Later(FFALoRA):
        """Sites train what nobody has written down yet."""

        name: ClassVar[str] = "later"

    monkeypatch.setitem(STRATEGIES, "later", Later)
    page = systems_page()
    assert '| `strategy = "later"` |' in page


# What stands in the column "run it with", as a person types it: it runs. ----------------------------------------------

RUN = [system for system in SYSTEMS if system.settings and system.settings["strategy"] not in REFUSED_STRATEGIES]
OWN = ("strategy", "server.optimizer", "training.optimizer", "training.learning-rate", "training.local-steps")
"""Settings of the toy run that a system's own recipe decides."""
PLACES = ("model.name", "data.name", "data.test-size", "data.partition", "adapter.targets", "privacy.delta", "rounds")
"""Where a system runs at all: the toy's, for it has other records than the plain job."""


table = cache(system_table)


def printed(system: System, page: str) -> list[str]:
    """Return what the page tells to write: lines of a configuration, or where one lies."""
    row = next(line for line in page.splitlines() if line.startswith(f"| {system.name} |"))
    told = re.findall(r"`([^`]+)`", row.split(" | ")[1])
    return [told[0].split(" -c ")[1]] if told[0].startswith("fedveil run") else told


@pytest.mark.parametrize("system", RUN, ids=lambda system: system.name)
def test_a_system_runs_two_rounds_by_what_its_row_says(system: System, request: pytest.FixtureRequest) -> None:
    words = printed(system, table())
    assert len(words) == (1 if system.file else len(system.settings)) <= 2
    text = (ROOT / words[0]).read_text(encoding="utf-8") if system.file else "\n".join(words)
    settings = flatten(tomllib.loads(text))
    assert settings == system.settings, "the page, the code and the file say different things"
    generative = settings.get("model.task") == "causal-lm"
    toy = request.getfixturevalue("toy_generation" if generative else "toy_settings")
    own = {key: value for key, value in toy.items() if key not in OWN}
    widths = ("adapter.rank", "adapter.alpha") if "adapter.rank" in settings else ()  # of the plain job's model
    kept = {key: value for key, value in settings.items() if key not in (*PLACES, *widths)}
    scale = {"adapter.alpha": float(own["adapter.rank"])}  # 1, as in the plain job
    if "start.data" in kept:
        kept["start.data"] = str(write_reviews(Path(str(toy["output"])).parent / "public.csv", 40, seed=1))
    folder = run_in_process({**own, **scale, **kept, "data.test-size": 20}, 2)
    lines = [line for line in read_lines(RoundLine, folder) if line.round_number]
    assert [line.round_number for line in lines] == [1, 2]
    scored = evaluate_run(folder)
    assert scored.loss == pytest.approx(lines[-1].loss, rel=1e-5), "the saved adapter does not score like the run"
    assert scored.accuracy == lines[-1].accuracy
    assert saved_state(folder).round_number == 2
    if "adapter.site-ranks" in system.settings:
        whole = run_in_process({**own, **scale, "strategy": "ffa-lora", "data.test-size": 20}, 2, "whole")
        sent, most = (read_lines(RoundLine, run)[-1].bytes_up for run in (folder, whole))
        assert sent < most, "the sites of the shipped row all have the run's rank"
    tensors = load_file(next((folder / "adapter").glob("adapter_model.safetensors")))
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())


LEFT_OUT = {
    "systems": ("AlignGuard", "LoRAPrune", "LoRAM", "Full fine-tuning"),
    "systems-asdiv": (
        "HetLoRA, padded states and weights by norm",
        "LoRA-GA from",
        "LoRAPrune",
        "LoRAM",
        "Full fine-tuning",
    ),
}
"""Systems that a sweep has not, by the beginning of their names; the head of its file says why."""


@pytest.mark.parametrize("sweep", LEFT_OUT)
def test_the_sweeps_of_systems_run_each_as_its_row_says(sweep: str) -> None:
    jobs = [cell.job(Path()).settings() for cell in read_sweep(ROOT / "experiments" / "sweeps" / f"{sweep}.toml").cells]
    for system in RUN:
        if system.name.startswith(LEFT_OUT[sweep]):
            continue
        # Two sites have two ranks, and a language model a rate of its own.
        kept = {k: v for k, v in system.settings.items() if k not in PLACES and k != "adapter.site-ranks"}
        assert any(kept.items() <= job.items() for job in jobs), f"no variant is {system.name}"
        if "adapter.site-ranks" in system.settings:
            assert any(len(str(job["adapter.site-ranks"]).split(",")) > 1 for job in jobs), "all sites have one rank"


def test_every_file_of_a_system_is_a_systems_and_says_its_command() -> None:
    folder = ROOT / CONFIGS
    assert {path.stem for path in folder.glob("*")} == {system.file for system in SYSTEMS if system.file}
    for path in folder.glob("*.toml"):
        first = path.read_text(encoding="utf-8").splitlines()[0]
        assert first.startswith("# ")
        assert f"fedveil run -c {CONFIGS}/{path.name}" in first


def test_a_file_says_that_its_system_was_not_measured_or_where_if_and_only_if_no_row_has_its_settings() -> None:
    results = ROOT / "experiments" / "results"
    rows = [row for name in ("systems", "systems-asdiv") for row in read_rows(results_file(results, name))]
    for system in (system for system in SYSTEMS if system.file):
        text = (ROOT / CONFIGS / f"{system.file}.toml").read_text(encoding="utf-8")
        settings = parse_settings([str(ROOT / CONFIGS / f"{system.file}.toml")])
        measured = any(settings.items() <= row.settings.items() for row in rows)
        elsewhere = "experiments/log/2026-11-29-pruned-bases.md" in text
        assert measured != (elsewhere or "No accuracy has been measured" in text), system.file


def test_a_row_of_another_setting_than_its_file_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    name = next(system for system in SYSTEMS if system.file == "salt")
    planted = replace(name, settings={**name.settings, "adapter.start": "minor-of-weights"})
    monkeypatch.setattr("docs.make.systems.SYSTEMS", (planted,))
    assert parse_settings([str(ROOT / printed(planted, system_table())[0])]) != planted.settings
