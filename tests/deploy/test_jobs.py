"""Jobs of a deployed server: submitted once, followed, resumed and given up."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from deployed import SILENT, FakeControl, end
from typer.testing import CliRunner

from fedveil.cli.main import app
from fedveil.common.config.run import RunConfig
from fedveil.common.config.text import toml_value
from fedveil.common.errors import ConfigError, DataError, RunFailed
from fedveil.common.paths import run_folder
from fedveil.common.run_lines import ConfigFile, read_json
from fedveil.common.strict_json import to_json
from fedveil.deploy import control as control_api
from fedveil.deploy import submit as submission
from fedveil.deploy.server_folder import make_server
from fedveil.experiments.planner.ahead import warnings_ahead
from fedveil.server.checkpoint import NAME as CHECKPOINT
from fedveil.server.lock import only_writer
from fedveil.server.records import write_json
from fedveil.strategies.job import Job, configure

pytestmark = pytest.mark.usefixtures("programs_may_start")


def test_a_finished_job_is_reported_and_other_settings_make_a_new_run(
    tmp_path: Path, fake_control: Callable[..., FakeControl]
) -> None:
    server, said = make_server(tmp_path / "server", ["127.0.0.1"]), list[str]()
    control = fake_control("completed", "completed")
    first = submission.submit(server, {"rounds": 3}, said.append, once=True)
    assert submission.submit(server, {"rounds": 3}, said.append, once=True) == first
    assert len(control.submitted) == 1, "a finished job was run again"
    assert "has ended: nothing to do" in said[-1]
    assert submission.submit(server, {"rounds": 4}, said.append, once=True) != first
    assert control.submitted[-1]["output"] == str(server.runs)


def test_a_failed_job_is_submitted_anew(tmp_path: Path, fake_control: Callable[..., FakeControl]) -> None:
    server, said = make_server(tmp_path / "server", ["127.0.0.1"]), list[str]()
    control = fake_control("failed", "completed")
    with pytest.raises(RunFailed, match="nobody answered"):
        submission.submit(server, {"rounds": 3}, said.append, once=True)
    path = submission.submit(server, {"rounds": 3}, said.append, once=True)
    assert len(control.submitted) == 2
    assert submission._ended_well(path)


def test_a_resumed_job_waits_for_a_result_of_its_own(
    tmp_path: Path, fake_control: Callable[..., FakeControl], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, control, path = (
        make_server(tmp_path / "server", ["127.0.0.1"]),
        fake_control(),
        tmp_path / "server/runs/x-7",
    )
    path.mkdir(parents=True)
    (path / CHECKPOINT).touch()
    write_json(path / "config.json", to_json(ConfigFile("7", "", {}, {})))
    end(path, "failed")
    monkeypatch.setattr(submission, "with_resumed", lambda settings, patience: dict(settings))

    def submit(settings: dict[str, Any]) -> str:
        threading.Timer(0.5, end, (path,)).start()
        return "8"

    monkeypatch.setattr(control, "submit", submit)
    assert submission.submit(server, {"resume": "7"}, print) == path
    assert submission._ended_well(path)


def test_a_result_counts_also_where_the_clock_of_its_file_system_is_behind(
    tmp_path: Path, fake_control: Callable[..., FakeControl], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel dates files by its last tick, which lies before the submission where a run ends at once."""
    server, control = make_server(tmp_path / "server", ["127.0.0.1"]), fake_control("completed")

    def submit(settings: dict[str, Any]) -> str:
        run = FakeControl.submit(control, settings)
        os.utime(run_folder(configure(settings).config, run) / "result.json", (1, 1))
        return run

    monkeypatch.setattr(control, "submit", submit)
    monkeypatch.setattr(submission, "ASK_SECONDS", 0.0)
    assert submission._ended_well(submission.submit(server, {"rounds": 3}, print))


def test_a_job_that_still_runs_is_followed_and_not_submitted_twice(
    tmp_path: Path, fake_control: Callable[..., FakeControl]
) -> None:
    server, said = make_server(tmp_path / "server", ["127.0.0.1"]), list[str]()
    control = fake_control("failed", statuses=("running",))
    with pytest.raises(RunFailed):
        submission.submit(server, {}, said.append, once=True)
    folder = Path(read_json(server.path / "last-job.json")["folder"])
    (folder / "result.json").unlink()
    threading.Timer(0.5, end, (folder,)).start()
    assert submission.submit(server, {}, said.append, once=True) == folder
    assert len(control.submitted) == 1
    assert "is under way" in said[-1]


@pytest.mark.parametrize(
    "content", [b"{}", b"[]", b"[" * 100_000, b'{"run": 7, "folder": "x", "settings": {}}', b"\xff"]
)
def test_a_damaged_note_of_the_last_job_is_one_line(
    content: bytes, tmp_path: Path, fake_control: Callable[..., FakeControl]
) -> None:
    server, control = make_server(tmp_path / "server", ["127.0.0.1"]), fake_control()
    (server.path / "last-job.json").write_bytes(content)
    for command in (lambda: submission.stop_job(server), lambda: submission.submit(server, {}, print, once=True)):
        with pytest.raises(DataError, match=r"last-job\.json") as caught:
            command()
        assert "\n" not in str(caught.value)
    assert control.submitted == []


def test_a_resumed_job_that_still_runs_is_followed_too(
    tmp_path: Path, fake_control: Callable[..., FakeControl]
) -> None:
    server, said = make_server(tmp_path / "server", ["127.0.0.1"]), list[str]()
    control, path = fake_control(), server.runs / "fedavg-lora-7"
    path.mkdir(parents=True)
    (path / CHECKPOINT).touch()
    write_json(path / "config.json", to_json(ConfigFile("7", "", {"rounds": 9, "recipe": "plain"}, {})))
    settings = {"rounds": 9, "recipe": "plain", "output": str(server.runs), "resume": str(path)}
    write_json(server.path / "last-job.json", {"run": "8", "folder": str(path), "settings": settings})
    with only_writer(path):
        threading.Timer(2.0, end, (path,)).start()
        assert submission.submit(server, {"resume": "7"}, said.append, once=True) == path
    assert control.submitted == []
    assert "run 8 with these settings is under way" in said


def test_a_job_is_resumed_only_once_its_server_has_ended(
    tmp_path: Path, fake_control: Callable[..., FakeControl], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, said = make_server(tmp_path / "server", ["127.0.0.1"]), list[str]()
    control, path = fake_control(), server.runs / "fedavg-lora-7"
    path.mkdir(parents=True)
    (path / CHECKPOINT).touch()
    write_json(path / "config.json", to_json(ConfigFile("7", "", {}, {})))
    monkeypatch.setattr(submission, "DYING_SECONDS", 0.2)
    with only_writer(path), pytest.raises(RunFailed, match="is under way"):
        submission.submit(server, {"resume": "7"}, said.append)
    assert "is still written: waiting up to 0.2 s" in said[-1]
    with pytest.raises(DataError, match="damaged"):
        submission.submit(server, {"resume": "7"}, said.append)
    assert control.submitted == []


def test_a_run_that_flower_ended_is_followed_while_its_server_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submission, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(submission, "ASK_SECONDS", 0.0)
    ended = FakeControl([], 1000 * ["finished:failed"])
    with only_writer(tmp_path):
        threading.Timer(0.5, end, (tmp_path,)).start()
        submission._follow(ended, "7", tmp_path, print, old=None)  # type: ignore[arg-type]
    (tmp_path / "result.json").unlink()
    with pytest.raises(RunFailed, match="ended as finished:failed and left no result"):
        submission._follow(ended, "7", tmp_path, print, old=None)  # type: ignore[arg-type]


def test_a_silent_server_is_no_reason_to_submit_a_job_again(
    tmp_path: Path, fake_control: Callable[..., FakeControl]
) -> None:
    server, said = make_server(tmp_path / "server", ["127.0.0.1"]), list[str]()
    control = fake_control("failed", statuses=(SILENT,))
    with pytest.raises(RunFailed):
        submission.submit(server, {}, said.append, once=True)
    folder = Path(read_json(server.path / "last-job.json")["folder"])
    (folder / "result.json").unlink()
    with pytest.raises(RunFailed, match="no answer"):
        submission.submit(server, {}, said.append, once=True)
    with only_writer(folder):
        threading.Timer(0.5, end, (folder,)).start()
        assert submission.submit(server, {}, said.append, once=True) == folder, "whoever writes the folder is alive"
    assert len(control.submitted) == 1


def test_a_job_is_given_up_once_neither_the_server_nor_the_run_shows_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submission, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(submission, "ASK_SECONDS", 0.0)
    monkeypatch.setattr(submission, "SILENCE_SECONDS", 0.1)
    silent = FakeControl([], ["running", *1000 * [SILENT]])
    with only_writer(tmp_path):
        threading.Timer(0.5, end, (tmp_path,)).start()
        submission._follow(silent, "7", tmp_path, print, old=None)  # type: ignore[arg-type]
    (tmp_path / "result.json").unlink()
    with pytest.raises(RunFailed, match=r"run 7 is given up after .*no answer"):
        submission._follow(silent, "7", tmp_path, print, old=None)  # type: ignore[arg-type]
    assert silent.statuses, "the test ended for another reason"


def test_too_few_sites_is_an_error_that_counts_them(tmp_path: Path, fake_control: Callable[..., FakeControl]) -> None:
    server = make_server(tmp_path / "server", ["127.0.0.1"])
    control = fake_control("completed")
    for name, node in (("clinic", 17), ("ward", 19)):
        (server.nodes / f"{name}.id").write_text(f"{node}\n", encoding="utf-8")
    said: list[str] = []
    with pytest.raises(RunFailed, match="3 sites wanted, 2 online, not ward after 0 s: look at the logs of those"):
        submission.submit(server, {}, said.append, sites=3, patience=0.0)
    assert said[1:] == ["3 sites wanted, 2 online, not ward: waiting up to 0 s"]
    assert said[0].startswith("Settings left open follow recipe 'metric': ")
    assert control.submitted == []


def test_sites_are_waited_for_with_longer_and_longer_pauses_and_not_beyond_what_was_said(
    tmp_path: Path, fake_control: Callable[..., FakeControl], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each look costs a second of a core, and a job that waits for a clinic waits for minutes."""
    server, control, clock = make_server(tmp_path / "server", ["127.0.0.1"]), fake_control("completed"), [0.0]
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        clock[0] += seconds

    monkeypatch.setattr(submission, "time", SimpleNamespace(monotonic=lambda: clock[0], sleep=sleep))
    with pytest.raises(RunFailed, match="3 sites wanted"):
        submission._wait_for_sites(control, server, RunConfig(), 3, 60.0, print)  # type: ignore[arg-type]
    assert pauses[:6] == [1.0, 2.0, 4.0, 8.0, 16.0, 20.0]
    assert sum(pauses) == 60.0
    with pytest.raises(ConfigError, match="--patience is nan"):
        submission._wait_for_sites(control, server, RunConfig(), 3, float("nan"), print)  # type: ignore[arg-type]
    for words in ("--sites 0", "--patience -1"):
        done = CliRunner().invoke(app, ["server", "submit", str(server.path), *words.split()])
        assert done.exit_code == 2


def test_who_stops_following_a_job_is_told_that_it_goes_on_and_stop_ends_it(
    tmp_path: Path, fake_control: Callable[..., FakeControl], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C ends the command alone: the SuperLink goes on with the run, and the sites' budgets are spent."""
    server = make_server(tmp_path / "server", ["127.0.0.1"])
    words = [str(server.path)]
    control = fake_control("completed", statuses=("running", "finished:stopped"))
    none = CliRunner().invoke(app, ["stop", *words])
    assert (none.exit_code, none.output.count("\n")) == (1, 1)
    assert "no job was submitted from" in none.output

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(submission, "_follow", interrupted)
    left = CliRunner().invoke(app, ["server", "submit", *words])
    assert left.exit_code == 130
    assert f"run 101 goes on at the server, and its sites go on paying: 'fedveil stop {words[0]}'" in left.output
    stopped = CliRunner().invoke(app, ["stop", *words])
    assert stopped.output == "run 101 is stopped, and what sites have paid stays paid\n"
    assert control.stopped == ["101"]
    again = CliRunner().invoke(app, ["stop", *words])
    assert "run 101 has ended before" in again.output
    assert control.stopped == ["101"]


def test_flowers_answers_are_read_whatever_its_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flwr = tmp_path / "flwr"
    monkeypatch.setattr(control_api, "program", lambda name: str(flwr))

    def says(text: str) -> None:
        flwr.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\n")
        flwr.chmod(0o755)

    control = control_api.Control(tmp_path, "127.0.0.1:8000")
    says('{"success": false, "error-message": "[code: 23] Public key already in use."}')
    assert control.register(tmp_path / "node.pub") == ""
    says('{"success": false, "error-message": "[code: 1] Access denied."}')
    with pytest.raises(RunFailed, match=r"the server did not register the key: .*Access denied"):
        control.register(tmp_path / "node.pub")
    says('{"success": true, "node-id": 7}')
    control.revoke("7")
    says('{"success": false, "error-message": "Using x [code: 24] Node ID not found for account."}')
    control.revoke("7")
    says('{"success": false, "error-message": "[code: 1] Access denied."}')
    with pytest.raises(RunFailed, match=r"the server did not revoke the site: .*Access denied"):
        control.revoke("7")
    says('{"success": true, "runs": [{"run-id": "7", "status": "finished:failed"}]}')
    assert control.status("7") == "finished:failed"
    says('{"success": true, "runs": [{"status": "finished:failed", "status-details": "not this server\'s app"}]}')
    assert control.status("7") == "finished:failed (not this server's app)"
    says('{"success": true, "runs": [{"status": "running", "status-details": "N/A"}]}')
    assert control.status("7") == "running"
    says(
        """{"success": true, "nodes": [{"node-id": "7", "status": "online"}, {"node-id": "9", "status": "offline"}]}"""
    )
    assert control.online() == {7}
    says('{"success": true, "run-id": "7"}')
    control.stop("7")
    says('{"success": false, "error-message": "[code: 16] Run ID not found."}')
    assert control.status("7") == "unknown"
    says('{"success": false, "error-message": "Using x\\nConnection to the SuperLink is unavailable. Check it."}')
    with pytest.raises(
        RunFailed, match=r"list the sites: nothing answers at 127\.0\.0\.1:8000, .*'fedveil server start'"
    ):
        control.online()
    says("Connection refused")
    for ask in (control.online, lambda: control.status("7")):
        with pytest.raises(RunFailed, match="Connection refused"):
            ask()
    monkeypatch.setattr(control_api, "ANSWER_SECONDS", 0.2)
    flwr.write_text("#!/bin/sh\nexec sleep 20\n")
    with pytest.raises(RunFailed, match=r"no answer in 0\.2 s"):
        control.online()


def test_a_job_for_sites_with_records_of_their_own_says_what_only_its_author_knows(
    tmp_path: Path, fake_control: Callable[..., FakeControl]
) -> None:
    server, control = make_server(tmp_path / "server", ["127.0.0.1"]), fake_control("completed")
    own = {"data.name": str(tmp_path / "test.csv"), "data.test": str(tmp_path / "test.csv")}
    with pytest.raises(ConfigError, match=r"must also say data\.labels=.*, privacy\.epsilon=") as caught:
        submission.submit(server, own, print)
    assert "\n" not in str(caught.value)
    assert not control.submitted, "a job that fails at every site was submitted"
    whole = {**own, "data.labels": "bad,good", "privacy.epsilon": 3.0, "data.records": 100}
    submission.submit(server, whole, print)
    named = {key: value for key, value in whole.items() if key != "data.records"}
    with pytest.raises(ConfigError, match=r"must also say data\.records="):
        submission.submit(server, named, print)
    fake_control("completed")
    submission.submit(server, {**named, "recipe": "plain"}, print)


def test_a_job_names_registered_sites_or_groups_of_them_and_waits_for_those_alone(
    tmp_path: Path, fake_control: Callable[..., FakeControl]
) -> None:
    server, said = make_server(tmp_path / "server", ["127.0.0.1"]), list[str]()
    control = fake_control("completed", "completed")
    for name, node in (("clinic", 17), ("ward", 19), ("lab", 18)):
        (server.nodes / f"{name}.id").write_text(f"{node}\n", encoding="utf-8")
    groups = server.path / "groups.toml"
    for content, named, words in (
        (
            "",
            "wrad",
            "named-sites names 'wrad' (did you mean 'ward'?), which is not registered; registered are: clinic",
        ),
        ('stroke = ["clinic", "gone"]', "stroke", "named-sites names 'gone', which is not registered"),
        ('stroke = ["clinic"]', "strok", "(did you mean 'stroke'?), which is not registered"),
        ('ward = ["clinic"]', "ward", "'ward' is no group: write a name that no site has"),
        ("stroke = []", "stroke", "'stroke' is no group"),
        ('stroke = "clinic"', "stroke", "'stroke' is no group"),
        ('stroke = ["clinic"]', "stroke, stroke", "named-sites must be names, each once"),
    ):
        groups.write_text(content, encoding="utf-8")
        with pytest.raises(ConfigError, match=re.escape(words)) as caught:
            submission.submit(server, {"named-sites": named}, said.append)
        assert "\n" not in str(caught.value)
    assert control.submitted == [], "something was sent before the names were known"
    groups.write_text('stroke = ["clinic", "ward"]', encoding="utf-8")
    with pytest.raises(RunFailed, match="2 sites wanted, 1 online, not ward"):
        submission.submit(server, {"named-sites": "stroke, clinic"}, said.append, sites=2, patience=0.0)
    with pytest.raises(ConfigError, match="--sites is 3, and named-sites names 2"):
        submission.submit(server, {"named-sites": "stroke"}, said.append, sites=3)
    submission.submit(server, {"named-sites": "stroke"}, said.append, once=True)
    assert control.submitted[-1]["named-sites"] == "clinic, ward"
    (server.nodes / "ward.id").unlink()  # shut out since: who follows the same job again is not refused
    groups.unlink()
    submission.submit(server, {"named-sites": "clinic, ward"}, said.append, once=True)
    assert len(control.submitted) == 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"privacy.noise-multiplier": 0.4}, "the budget ends after round"),
        ({"training.sample-rate": 0.001}, "a site's expected batch is below one record"),
        ({"privacy.mode": "none"}, "claim: "),
        ({}, ""),
    ],
)
def test_what_a_plan_warns_of_is_said_before_a_job_is_sent(
    settings: dict[str, Any], words: str, tmp_path: Path, fake_control: Callable[..., FakeControl]
) -> None:
    server, said = make_server(tmp_path / "server", ["127.0.0.1"]), list[str]()
    control, steps = fake_control("completed"), list[str]()
    own = {**settings, "data.records": 1000, "recipe": "plain", "rounds": 3}

    def ahead(job: Job) -> list[str]:
        assert control.submitted == [], "the job was sent before its plan was asked"
        return warnings_ahead(job, 2, job.config.data.records)

    submission.submit(server, own, said.append, ahead=ahead, step=steps.append)
    warned = [line for line in said if line.startswith("WARNING: ")]
    assert [words in line for line in warned] == ([True] if words else [])
    assert steps[0] == "asking the plan"
    assert steps.index("asking the plan") < steps.index("sending the job")


def test_a_job_that_its_plan_refuses_is_not_sent(tmp_path: Path, fake_control: Callable[..., FakeControl]) -> None:
    server, control = make_server(tmp_path / "server", ["127.0.0.1"]), fake_control("completed")
    missing = str(tmp_path / "none.csv")
    real = {"data.name": missing, "data.labels": "bad,good", "privacy.epsilon": 3.0}
    for settings, words in (
        ({"privacy.delta": 0.01, "data.records": 1000}, "with 1 site of 1,000 records each, as data.records says"),
        ({**real, "data.test": missing, "data.records": 1000}, "none.csv"),
        ({"model.name": str(tmp_path / "no-model"), "data.records": 1000}, "there is no such folder"),
    ):
        given = [f"{key}={toml_value(value)}" for key, value in settings.items()]
        done = CliRunner().invoke(app, ["server", "submit", str(server.path), "-c", " ".join(given)])
        assert done.exit_code == 1
        assert words in " ".join(done.output.split()), done.output
    assert control.submitted == []
