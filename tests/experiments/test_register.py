"""Rows of a user's own code: in simulations of this process alone, and nothing that protects records."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

import fedveil
from audits.planted_rows import installed
from audits.tiny_site import clinic
from fedveil.client import process as site_process
from fedveil.client import worker
from fedveil.common import registered
from fedveil.common.adapters import ADAPTERS
from fedveil.common.adapters.lora import LoRA
from fedveil.common.errors import ConfigError
from fedveil.common.messages.round import Refusal
from fedveil.common.starts import STARTS, PaidStart
from fedveil.common.starts.orthonormal import Orthonormal
from fedveil.common.tasks import TASKS, Classification
from fedveil.common.trackers import TRACKERS, Tracker
from fedveil.deploy import start
from fedveil.experiments.api.register import register_named
from fedveil.privacy import MECHANISMS
from fedveil.privacy.accountant import Accountant
from fedveil.server import runner
from fedveil.strategies import STRATEGIES
from fedveil.strategies.average import Average
from fedveil.strategies.fedavg import FedAvgLoRA
from fedveil.strategies.rules import RULES
from fedveil.strategies.rules.none import NoRule
from fedveil.strategies.state import ServerState

pytestmark = [pytest.mark.rough_prices, pytest.mark.one_length, pytest.mark.usefixtures("own_rows")]


@dataclass(frozen=True)
class Halved(FedAvgLoRA):
    """FedAvg-LoRA that is told apart by its name and an option."""

    name: ClassVar[str] = "halved"
    every: int = 2
    """Rounds."""

    def settle(self, state: ServerState) -> ServerState:
        """Return the state as it is."""
        return state


def test_a_registered_strategy_runs_and_the_report_says_that_it_is_no_row(toy_settings: dict[str, Any]) -> None:
    assert fedveil.register(Halved) is Halved
    settings = {k: v for k, v in toy_settings.items() if k not in ("data.name", "output", "strategy", "data.test-size")}
    named = {"sites": 2, "test": 40, "output": toy_settings["output"], "quiet": True}
    run = fedveil.run(toy_settings["data.name"], strategy="halved", settings={**settings, "halved.every": 3}, **named)
    assert run.settings["halved.every"] == 3
    assert "strategy 'halved' is not part of FedVeil" in (run.folder / "report.md").read_text()
    del STRATEGIES["halved"]
    assert len(fedveil.load(run.folder).predict(["a warm film"])) == 1, "a finished model asks for no strategy"
    with pytest.raises(ConfigError, match="'halved' is no row of FedVeil, and none is registered here"):
        fedveil.run(toy_settings["data.name"], strategy="halved", settings={"halved.every": 3}, **named)
    STRATEGIES["halved"] = Halved
    fedveil.register(type("Halved", (Halved,), {"__doc__": "As a cell that is run twice makes it."}))
    assert STRATEGIES["halved"] is not Halved


def transposed(state: ServerState) -> ServerState:
    layer = next(name for name in state.adapter if name != "head")
    return replace(state, adapter={**state.adapter, layer: {n: t.T for n, t in state.adapter[layer].items()}})


@pytest.mark.parametrize(
    ("method", "returned", "words"),
    [
        ("update", lambda *_: None, "strategy 'halved': combine returned NoneType: return a ServerState"),
        ("settle", lambda _, state: transposed(state), r"settle returned \S+ as \(\d+, \d+\), and it was \(\d+, \d+\)"),
        ("settle", lambda _, state: replace(state, adapter={}), r"settle returned \S+ as nothing, and it was"),
    ],
)
def test_what_a_strategy_returns_is_looked_at_before_it_is_kept(
    toy_settings: dict[str, Any], method: str, returned: Any, words: str
) -> None:
    fedveil.register(type("Wrong", (Halved,), {method: returned, "__doc__": "A row."}))
    settings = {k: v for k, v in toy_settings.items() if k not in ("data.name", "output", "strategy", "data.test-size")}
    named = {"sites": 2, "test": 40, "output": toy_settings["output"], "quiet": True}
    with pytest.raises(ConfigError, match=words):
        fedveil.run(toy_settings["data.name"], strategy="halved", settings=settings, **named)


def test_every_axis_takes_a_row_of_its_kind() -> None:
    for base, table in ((LoRA, ADAPTERS), (Orthonormal, STARTS), (NoRule, RULES), (Classification, TASKS)):
        own = fedveil.register(type("Own", (base,), {"name": "own", "__doc__": "A row."}))
        assert table["own"] is own or type(table["own"]) is own
    methods = {name: lambda *_: None for name in ("__init__", "log", "close")}
    assert fedveil.register(type("Seen", (Tracker,), {**methods, "name": "seen"})) is TRACKERS["seen"]
    assert len(registered.registered_rows()) == 5


@pytest.mark.parametrize(
    "name", ["fed-sb", "rolora", "hetlora", "auto", "privacy", "data", "start", "allora", "a.b", "", 7, "Ω"]
)
def test_a_name_of_fedveil_or_of_no_row_is_refused(name: Any) -> None:
    with pytest.raises(ConfigError, match=r"is a name that FedVeil has|needs a name"):
        fedveil.register(type("Own", (Halved,), {"name": name}))
    assert registered.registered_rows() == ()


@pytest.mark.parametrize(("base", "name"), [(LoRA, "ffa-lora"), (LoRA, "dora"), (Classification, "chat")])
def test_a_name_of_another_axis_is_refused_where_it_is_taken(base: type[Any], name: str) -> None:
    with pytest.raises(ConfigError, match="is a name that FedVeil has"):
        fedveil.register(type("Own", (base,), {"name": name}))


def paid() -> type[Any]:
    row = STARTS["dp-gradient"]
    assert issubclass(row, PaidStart)
    return type("Own", (row,), {"name": "own"})


@pytest.mark.parametrize(
    "row",
    [
        paid,
        lambda: type(MECHANISMS["dp-sgd"]),
        lambda: Accountant,
        lambda: MECHANISMS["dp-sgd"],
        lambda: 7,
        lambda: int,
    ],
)
def test_what_protects_records_cannot_be_registered(row: Any) -> None:
    with pytest.raises(ConfigError, match="cannot be registered"):
        fedveil.register(row())
    assert registered.registered_rows() == ()


def test_a_row_that_is_not_whole_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"does not define close, log: help\(fedveil\.common\.trackers"):
        fedveil.register(type("Seen", (Tracker,), {"name": "seen", "__init__": lambda *_: None}))
    with pytest.raises(ConfigError, match=r"does not define adapters, facts: help\(fedveil\.strategies\.base"):
        fedveil.register(type("Bare", (Average,), {"name": "bare"}))


def test_a_row_of_an_installed_package_is_loaded_when_a_simulation_names_it(tmp_path: Path) -> None:
    with installed(tmp_path, "own") as mark:
        register_named({"strategy": "fed-sb"})
        assert (mark.exists(), "own" in STRATEGIES) == (False, False)
        register_named({"strategy": "own"})
        assert (mark.exists(), STRATEGIES["own"].__module__) == (True, "planted_own")
    assert registered.registered_rows() == ("strategy 'own'",)
    with installed(tmp_path / "other", "fedavg-lora"), pytest.raises(ConfigError, match="is a name that FedVeil has"):
        register_named({"strategy": "fedavg-lora"})


def test_sites_and_servers_do_not_start_beside_a_registered_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each refuses before it opens a file: none of those that are named is there."""
    fedveil.register(Halved)
    for module in (worker, runner, start):
        monkeypatch.setattr(module, "require_system_entropy", lambda: None)
    missing = str(tmp_path / "missing")
    site = ["--port", "1", "--secret", missing, "--node", "{}", "--authority", missing, "--key", missing]
    server = ["--address", "127.0.0.1:1", "--authority", missing, "--secret", missing]

    def starts() -> Iterator[Any]:
        for main, words in ((worker.main, site), (runner.main, server)):
            monkeypatch.setattr(sys, "argv", ["program", *words])
            yield main
        yield lambda: start.start_server(None, print)  # type: ignore[arg-type]

    for main in starts():
        with pytest.raises(ConfigError, match="strategy 'halved' was registered in this process"):
            main()


def test_a_deployed_site_refuses_every_task_beside_a_registered_row(
    toy_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = clinic(toy_settings, tmp_path)

    def refused() -> bool:
        reply = site.ask(site.task())
        return isinstance(reply, Refusal) and "was registered in this process" in reply.reason

    assert not refused()
    fedveil.register(Halved)
    assert refused()
    monkeypatch.setattr(site_process, "require_installed_rows", lambda: None)
    assert not refused(), "a site that does not look is found"
