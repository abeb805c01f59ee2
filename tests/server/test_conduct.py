"""The conduct of a run: what its folder says of an end that nobody foresaw, and who else may have written it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from made_run import spent
from made_run import told as stating
from safetensors.torch import load_file

from fedveil.common.errors import ConfigError, DataError, RunFailed
from fedveil.common.messages.round import Refusal, Task, TrainResult
from fedveil.common.messages.state import below_head
from fedveil.common.messages.tensors import l2_norm, subtract
from fedveil.common.messages.wire import decode_reply, encode_reply
from fedveil.common.model.score import Score
from fedveil.common.run_lines import BaselineFile, PrivacyLine, ResultFile, RoundLine, read_file, read_lines
from fedveil.common.server_file import ENGINES
from fedveil.experiments.in_process import InProcessTransport, run_in_process
from fedveil.privacy.figures import epsilon_text
from fedveil.reports import report_of
from fedveil.reports.course import epsilon_by
from fedveil.reports.folder import read_run
from fedveil.server import conduct
from fedveil.server.collect import plain
from fedveil.server.collect.base import Collected
from fedveil.server.collect.shown import ShownOfCohort
from fedveil.server.conduct import Terminal
from fedveil.server.lock import only_writer
from fedveil.server.members import Member
from fedveil.server.observers import Observer, Observers, RoundOutcome, Update
from fedveil.server.records import RunFolder
from fedveil.server.sites import Exchange
from fedveil.server.tracking import Tracking
from fedveil.strategies import ServerState
from fedveil.strategies.job import configure

WORDS = "the patient in bed 7"


class Breaking(InProcessTransport):
    """Whose connection breaks in a round, in a way that nobody foresaw."""

    at = 2
    error: Exception = ValueError(WORDS)

    def exchange(self, tasks: Mapping[int, Task], timeout: float) -> Exchange:
        if next(iter(tasks.values())).round_number == self.at:
            raise self.error
        return super().exchange(tasks, timeout)


def breaking(at: int, error: Exception) -> type[Breaking]:
    return type("Kind", (Breaking,), {"at": at, "error": error})


def open_run(settings: dict[str, Any]) -> dict[str, Any]:
    return {**settings, "privacy.mode": "none", "rounds": 2, "round-retries": 0}


def told(folder: Path) -> list[str]:
    return (folder / "run.log").read_text(encoding="utf-8").splitlines()


def tracked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return what a tracker is asked for from now on."""
    heard: list[str] = []
    for name in ("update", "close"):
        monkeypatch.setattr(Tracking, name, lambda _, name=name: heard.append(name))
    return heard


def folder_of(settings: dict[str, Any], run: str) -> Path:
    return Path(settings["output"]) / f"ffa-lora-{run}"


def test_an_unforeseen_error_ends_the_run_in_its_folder_and_its_words_stay_out_of_the_log(
    toy_settings: dict[str, Any],
) -> None:
    settings = {**open_run(toy_settings), "training.learning-rate": 0.1}
    with pytest.raises(ValueError, match=WORDS):
        run_in_process(settings, 1, "cut", breaking(2, ValueError(WORDS)))
    folder = folder_of(settings, "cut")
    result = read_file(ResultFile, folder)
    assert result.status == "failed"
    assert result.reason == (f"ValueError: {WORDS}. rounds up to 1 are kept; go on from there with resume = 'cut'")
    (line,) = read_lines(RoundLine, folder)
    before = read_file(BaselineFile, folder).accuracy
    assert result.reached is not None
    assert (result.reached.rounds, result.reached.epsilon) == (1, None)
    assert (result.reached.accuracy_before, result.reached.accuracy) == (before, line.accuracy)
    assert before != line.accuracy, "the test cannot tell one round from none"
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    assert report_of(folder).status == "failed"
    assert (folder / "report.md").is_file(), "a run that fails leaves no report"
    log = (folder / "log.jsonl").read_text(encoding="utf-8")
    assert "the run fails: ValueError at test_conduct.py:" in log
    assert WORDS not in log
    assert ShownOfCohort.log_note not in log, "the log of a run without a trusted server is said to be one's"
    # Of a round that nobody scored the adapter that is left is scored once more.
    with pytest.raises(ValueError, match=WORDS):
        run_in_process({**settings, "evaluate-every": 2}, 1, "unscored", breaking(2, ValueError(WORDS)))
    unscored = read_file(ResultFile, folder_of(settings, "unscored")).reached
    assert unscored is not None
    assert (unscored.accuracy_before, unscored.accuracy) == (before, line.accuracy)


def test_an_error_before_the_first_round_is_complete_leaves_its_reason_and_no_adapter(
    toy_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, heard = open_run(toy_settings), tracked(monkeypatch)
    with pytest.raises(ValueError, match=WORDS):
        run_in_process(settings, 1, "cut", breaking(1, ValueError(WORDS)))
    folder = folder_of(settings, "cut")
    assert read_file(ResultFile, folder) == ResultFile("failed", f"ValueError: {WORDS}", None, ENGINES["one process"])
    assert not (folder / "adapter").exists()
    assert (folder / "report.md").is_file()
    assert heard == ["update", "close"], "a tracker is told what is known before round 1, and that the run has ended"


def test_of_two_errors_the_run_ends_by_the_first_and_goes_on_all_the_same(
    toy_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a full disk: neither adapter nor report can be saved, and the reason is not that."""
    settings, heard = open_run(toy_settings), tracked(monkeypatch)

    def full(*_: Any) -> None:
        raise OSError(WORDS)

    def no_room(_: Path) -> None:
        raise DataError("the report cannot be written")

    save, report = RunFolder.save_adapter, conduct.write_reports
    monkeypatch.setattr(RunFolder, "save_adapter", full)
    monkeypatch.setattr(conduct, "write_reports", no_room)
    with pytest.raises(RunFailed, match=r"^round 2: nobody$"):
        run_in_process(settings, 1, "full", breaking(2, RunFailed("round 2: nobody")))
    monkeypatch.setattr(RunFolder, "save_adapter", save)
    monkeypatch.setattr(conduct, "write_reports", report)
    folder = folder_of(settings, "full")
    assert heard[-1] == "close"
    assert "the run has no report: the report cannot be written" in (folder / "log.jsonl").read_text(encoding="utf-8")
    hint = "rounds up to 1 are kept; go on from there with resume = 'full'"
    reason = f"round 2: nobody. {hint}; the adapter could not be saved (OSError)"
    assert read_file(ResultFile, folder) == ResultFile("failed", reason, None, ENGINES["one process"])
    assert run_in_process({**settings, "resume": "full"}, 1) == folder
    assert [line.round_number for line in read_lines(RoundLine, folder)] == [1, 2]
    result = read_file(ResultFile, folder)
    assert (result.status, result.reason, result.reached and result.reached.rounds) == ("completed", "", 2)
    assert "goes on after round 1: accuracy" in (folder / "run.log").read_text(encoding="utf-8")


def test_what_another_server_did_before_it_let_go_of_the_folder_is_read(
    toy_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends the run while the second one waits: that one must not go on from the round that it saw first."""
    settings = open_run(toy_settings)
    with pytest.raises(RunFailed):
        run_in_process(settings, 1, "7", breaking(2, RunFailed("gone")))
    folder = folder_of(settings, "7")
    held: list[dict[str, bytes]] = []

    @contextmanager
    def after_another(path: Path, patience: float) -> Iterator[None]:
        monkeypatch.setattr("fedveil.server.conduct.only_writer", only_writer)
        run_in_process({**settings, "resume": "7"}, 1)
        held.append({str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()})
        with only_writer(path, patience):
            yield

    monkeypatch.setattr("fedveil.server.conduct.only_writer", after_another)
    with pytest.raises(ConfigError, match="is complete"):
        run_in_process({**settings, "resume": "7"}, 1)
    assert held == [{str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}]


class Spent(InProcessTransport):
    """Whose sites have budget for one round."""

    def deliver(self, node: int, task: Task, content: Any) -> Any:
        if task.round_number > 1:
            return encode_reply(Refusal(task.run, task.round_number, f"site-{node}", "budget", "spent"))
        return super().deliver(node, task, content)


def test_a_run_whose_budgets_are_spent_ends_well_with_its_reason_and_what_was_trained(
    toy_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = tracked(monkeypatch)
    folder = run_in_process(open_run(toy_settings), 2, "spent", Spent)
    assert heard == ["update", "update", "close"], "a tracker is told of a round when it is complete"
    result = read_file(ResultFile, folder)
    assert (result.status, result.reason) == ("stopped", "no site has budget left after round 1, 1 needed")
    assert result.reached is not None
    assert result.reached.rounds == 1
    assert [(line.round_number, line.complete) for line in read_lines(RoundLine, folder)] == [(1, True), (2, False)]
    assert told(folder)[-1] == f"run ends early: {result.reason}"
    with pytest.raises(RunFailed):
        run_in_process(open_run(toy_settings), 2, "cut", breaking(2, RunFailed("gone")))
    cut = folder_of(toy_settings, "cut")
    kept, wanted = (load_file(str(run / "adapter" / "adapter_model.safetensors")) for run in (folder, cut))
    assert all(torch.equal(kept[name], wanted[name]) for name in wanted), "another round's adapter is left"
    assert any(tensor.any() for name, tensor in kept.items() if "lora_B" in name), "the adapter is left as it began"


class OneRefuses(InProcessTransport):
    """Whose second site has no part in round 0."""

    def deliver(self, node: int, task: Task, content: Any) -> Any:
        if node == 1 and not task.round_number:
            return encode_reply(Refusal(task.run, 0, "site-1", "policy", "never"))
        return super().deliver(node, task, content)


@pytest.mark.usefixtures("rough_prices")
def test_round_0_is_told_with_its_sites_its_price_and_who_had_no_part(toy_settings: dict[str, Any]) -> None:
    settings = {**toy_settings, "strategy": "fed-sb", "rounds": 1, "privacy.noise-multiplier": 2.0}
    settings |= {"adapter.start": "dp-gradient", "privacy.epsilon": 60.0}
    folder = run_in_process(settings, 2, "paid", OneRefuses)
    first, *later = read_lines(PrivacyLine, folder)
    assert first.round_number == 0
    lines = told(folder)
    assert max(spent(line).epsilon_total for line in later) > 1.01 * spent(first).epsilon_total
    spent_then = epsilon_by(read_run(folder), 0)
    assert f"initialised by dp-gradient: 1 site, ε {epsilon_text(spent_then)}, worst site" in lines
    assert spent_then == pytest.approx(spent(first).epsilon_total, rel=1e-3)
    assert "  site-1 did not take part (policy): never" in lines
    before = read_file(BaselineFile, folder)
    assert any(line.startswith(f"before training: accuracy {100 * before.accuracy:.1f} % (") for line in lines)
    assert before.begun_accuracy is not None
    assert f"after round 0: accuracy {100 * before.begun_accuracy:.1f} %" in lines
    # Of a start that nobody is asked for nothing is told, and one without privacy claims nothing.
    open_start = {**settings, "privacy.mode": "none", "adapter.start": "nonprivate-gradient"}
    folder = run_in_process({k: v for k, v in open_start.items() if k != "privacy.noise-multiplier"}, 2, "open")
    assert "initialised by nonprivate-gradient: 2 sites, no claim" in told(folder)
    asked = {**open_run(toy_settings), "rounds": 1}
    assert not [line for line in told(run_in_process(asked, 1, "plain")) if "round 0" in line or "initialis" in line]


class Heard(SimpleNamespace):
    """A run's folder of which only the lines for people are kept."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None

    def say(self, line: str, round_number: int | None = None) -> None:
        self.lines.append((line, round_number))


def test_what_round_0_made_of_the_model_is_told_beside_what_was_there_before() -> None:
    job, heard, model = (
        configure({"privacy.mode": "none"}),
        Heard(lines=[]),
        SimpleNamespace(statistic_words="found", public_words="told"),
    )
    observer = Terminal(job, cast(Any, heard), cast(Any, model))
    state, before = ServerState(0, {}, ()), Score(accuracy=0.5, loss=1.0)
    observer.started(before, state, {}, Score(accuracy=0.75, loss=0.5))
    told = ["before training: accuracy 50.0 %", "  found", "after round 0: accuracy 75.0 %"]
    assert heard.lines == list(zip(told, (None, 0, None), strict=True))
    heard.lines.clear()
    observer.initialised(RoundOutcome(0, Collected(), None, 1.0))
    assert heard.lines[0] == (f"initialised by {job.origin.name}: no private records used", 0)
    assert heard.lines[1:] == [("told", 0)]
    heard.lines.clear()
    model.statistic_words = ""
    observer.started(before, state, {})
    assert heard.lines == [("before training: accuracy 50.0 %", None)]


class TellsLittle(InProcessTransport):
    """Whose site says that its round has cost next to nothing."""

    def deliver(self, node: int, task: Task, content: Any) -> Any:
        record = super().deliver(node, task, content)
        reply = decode_reply(record, self._layout_of_round(task.round_number), task.run, task.round_number)
        assert isinstance(reply, TrainResult)
        assert reply.spending is not None
        little = stating(reply.spending, epsilon_total=0.01, epsilon_round=0.01)
        return encode_reply(replace(reply, spending=little))


@pytest.mark.usefixtures("rough_prices")
def test_the_line_of_a_round_shows_what_its_own_release_costs_whatever_a_site_tells(
    toy_settings: dict[str, Any],
) -> None:
    settings = {**toy_settings, "rounds": 1, "privacy.noise-multiplier": 2.0, "privacy.epsilon": 60.0}
    folder = run_in_process(settings, 1, "little", TellsLittle)
    (line,) = read_lines(PrivacyLine, folder)
    assert spent(line).epsilon_total == 0.01
    cost = epsilon_by(read_run(folder), 1)
    assert cost is not None
    assert cost > 0.1
    (shown,) = (text for text in told(folder) if text.startswith("round 1/1"))
    assert f"  ε {epsilon_text(cost)} of 60 " in shown


def test_noise_that_a_held_down_site_costs_is_looked_for_once_a_run(
    toy_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[int] = []
    monkeypatch.setattr(plain, "warn_of_noise", lambda _, results: looked.extend(r.round_number for r in results))
    run_in_process({**toy_settings, "rounds": 2}, 1, "looked")
    assert looked == [1]


def test_an_observer_has_the_state_before_a_round_its_average_and_the_state_after(
    toy_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    updates: list[Update] = []

    class Lengths(Observer):
        def finished(self, outcome: RoundOutcome, update: Update, members: Mapping[str, Member]) -> None:
            updates.append(update)

    monkeypatch.setattr(conduct, "Observers", lambda *others: Observers(*others, Lengths()))
    plain_step = {"server.optimizer": "momentum", "server.momentum": 0.0, "server.learning-rate": 0.5}
    run_in_process(open_run({**toy_settings, **plain_step, "schedule": "constant"}), 2, "observed")
    assert [update.after.round_number for update in updates] == [1, 2]
    for update in updates:
        change = below_head(subtract(update.averaged.adapter, update.before.adapter))
        step = below_head(subtract(update.after.adapter, update.before.adapter))
        assert l2_norm(step) == pytest.approx(0.5 * l2_norm(change), rel=1e-4)
        assert l2_norm(change) > 0
    assert updates[1].before is updates[0].after
