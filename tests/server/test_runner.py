"""A server runs its own code: the runner against the Runtime API of the pinned Flower's SuperLink, and how runs end."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from bundles import own_bundle
from flwr.cli.build import build_fab_from_files
from flwr.proto.runtime_pb2 import PullTaskInputRequest
from flwr.supercore.constant import TaskType
from superlink_api import SECRET, SuperLinkApi, superlink_api

from fedveil.common.bundle import PROJECT, bundle_digest, files_of, own_digest
from fedveil.common.errors import FedVeilError, ProtocolError, RunFailed
from fedveil.common.paths import run_folder
from fedveil.common.ports import free_ports
from fedveil.common.run_lines import ProgressFile, read_file
from fedveil.common.runtime import NODE_TOO, NotOurNode, Runtime, TaskLost
from fedveil.deploy.commands import environment, runner_command
from fedveil.deploy.pair import ANEW
from fedveil.deploy.server_folder import ServerFolder, make_server
from fedveil.server import runner
from fedveil.strategies.job import configure

PATIENCE = 300.0
FLWR_SERVERAPP = Path(sys.executable).parent / "flwr-serverapp"
MARK = """
import pathlib
from flwr.serverapp import ServerApp
pathlib.Path({mark!r}).write_text("the bundle's code ran")
app = ServerApp()
@app.main()
def main(grid, context):
    pass
"""


def foreign_bundle(mark: Path) -> bytes:
    """Return this version's bundle with another ``server/app.py``, which leaves a mark as soon as it is imported."""
    return own_bundle(server__app=MARK.format(mark=str(mark)))


@pytest.fixture
def folder(tmp_path: Path) -> ServerFolder:
    fleet, control = free_ports(2)
    return make_server(tmp_path / "server", ["127.0.0.1"], fleet_port=fleet, control_port=control)


@pytest.fixture
def api(folder: ServerFolder) -> Iterator[SuperLinkApi]:
    with superlink_api(folder) as served:
        yield served


@contextmanager
def running(api: SuperLinkApi, tmp_path: Path, secret: bytes = SECRET) -> Iterator[subprocess.Popen[bytes]]:
    """Run the command that ``fedveil server start`` runs beside its SuperLink."""
    file = tmp_path / "secret"
    file.write_bytes(secret)
    env = environment(tmp_path / "home") | {"PYTHONPATH": str(PROJECT), "HF_HUB_OFFLINE": "1"}
    with (tmp_path / "runner.log").open("ab") as log:
        process = subprocess.Popen(
            runner_command(api.folder, file), env=env, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True
        )
    try:
        yield process
    finally:
        process.terminate()
        process.wait(PATIENCE)


def children(process: subprocess.Popen[bytes]) -> set[int]:
    return {int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()}


def gone(pid: int) -> bool:
    deadline = time.monotonic() + PATIENCE
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    return not Path(f"/proc/{pid}").exists()


def test_a_stranger_s_app_is_refused_by_its_hash_and_the_own_one_runs_by_the_installed_code(
    api: SuperLinkApi, tmp_path: Path
) -> None:
    mark = tmp_path / "mark"
    strange, wrong = api.give(foreign_bundle(mark), {}), api.give(own_bundle(), {"rounds": -1})
    with running(api, tmp_path):
        refused, failed = api.end(strange), api.end(wrong)
    assert refused.status.sub_status == failed.status.sub_status == "failed"
    reason = f"not this server's, whose bundle is {own_digest()[:12]}: nothing of it was run"
    assert reason in refused.status.details
    assert reason in api.log(strange), "whoever submitted it does not see why in the run's log"
    assert reason in (tmp_path / "runner.log").read_text()
    assert not mark.exists()
    assert "rounds" in failed.status.details, "the installed app did not read the run's settings"
    assert "-1" in failed.status.details
    assert not (tmp_path / "home").exists(), "something of a bundle was unpacked"


def test_flower_s_own_way_runs_the_code_that_was_submitted_which_the_mark_shows(
    folder: ServerFolder, tmp_path: Path
) -> None:
    """The planted fault: the way before there was a runner, which asked for no secret either."""
    mark = tmp_path / "mark"
    with superlink_api(folder, secret=None) as api:
        task = api.give(foreign_bundle(mark), {})
        with closing(runtime_of(api, b"any")) as runtime:
            token = runtime.acquire()
        words = ["--root-certificates", str(folder.path / "ca.crt"), "--token", token]
        subprocess.run(
            [str(FLWR_SERVERAPP), *words, "--runtime-api-address", folder.control],
            env=environment(tmp_path / "home"),
            capture_output=True,
            timeout=PATIENCE,
            check=False,
        )
        assert api.end(task).status.sub_status == "completed"
    assert mark.exists(), "the submitted code did not run: the test above would pass whatever the runner does"


def runtime_of(api: SuperLinkApi, secret: bytes) -> Runtime:
    authority = (api.folder.path / "ca.crt").read_bytes()
    return Runtime(api.folder.control, secret, TaskType.SERVER_APP, authority)


def test_without_the_server_s_secret_nobody_gets_a_run_and_the_runner_leaves(api: SuperLinkApi, tmp_path: Path) -> None:
    task = api.give(own_bundle(), {})
    with closing(runtime_of(api, b"guessed")) as runtime, pytest.raises(NotOurNode):
        runtime.acquire()
    with running(api, tmp_path, secret=b"guessed") as process:
        assert process.wait(PATIENCE) == NODE_TOO != ANEW
    assert api.task(task).status.status == "pending"
    with closing(runtime_of(api, SECRET)) as runtime, pytest.raises(TaskLost), runtime.hold("guessed", int) as held:
        held.client.PullTaskInput(PullTaskInputRequest())


def test_a_superlink_of_another_authority_is_asked_for_nothing(api: SuperLinkApi, tmp_path: Path) -> None:
    task = api.give(own_bundle(), {})
    other = make_server(tmp_path / "other", ["127.0.0.1"])
    authority = (other.path / "ca.crt").read_bytes()
    with closing(Runtime(api.folder.control, SECRET, TaskType.SERVER_APP, authority)) as runtime:
        assert runtime.acquire() == ""
    assert api.task(task).status.status == "pending"


def test_runs_go_on_side_by_side_and_each_end_is_told_whoever_makes_it(
    api: SuperLinkApi, tmp_path: Path, toy_settings: dict[str, Any]
) -> None:
    """Killed, stopped, and lost with the runner: the SuperLink is told at once, the others go on."""
    settings = toy_settings | {"output": str(tmp_path / "runs"), "rounds": 1, "round-timeout": 500.0}
    with running(api, tmp_path) as process:
        tasks, pids = list[int](), list[int]()
        for _ in range(3):
            before = children(process)
            tasks.append(api.give(own_bundle(), settings))
            api.wait(tasks[-1], lambda task: task.status.status == "running")
            pids.extend(children(process) - before)
        for task in tasks:
            api.wait(task, lambda found: _waits(run_folder(configure(settings).config, str(found.run_id))))
        os.kill(pids[0], signal.SIGKILL)
        assert api.end(tasks[0]).status.details == "the run's process at the server ended with -9"
        assert [api.task(task).status.status for task in tasks[1:]] == ["running"] * 2
        assert api.state.finish_task(tasks[1], "stopped", "")
        assert gone(pids[1]), "a run that was stopped goes on"
        assert api.task(tasks[2]).status.status == "running"
        process.kill()
        process.wait(PATIENCE)
        assert gone(pids[2]), "a run outlives its runner"
        assert api.end(tasks[2]).status.details == "the run's process at the server was told to end"
    with running(api, tmp_path):
        task = api.give(own_bundle(), settings | {"rounds": -1})
        assert "rounds" in api.end(task).status.details, "a runner that comes back takes no run"


def _waits(path: Path) -> bool:
    return (path / ProgressFile.NAME).exists() and read_file(ProgressFile, path).phase == "waiting for sites"


@pytest.mark.parametrize(
    ("bundle", "error"),
    [(lambda: own_bundle(server__app=""), RunFailed), (lambda: b"no zip", ProtocolError), (bytes, ProtocolError)],
)
def test_only_the_own_bundle_passes(bundle: Callable[[], bytes], error: type[FedVeilError]) -> None:
    runner.check_bundle(own_bundle())
    with pytest.raises(error):
        runner.check_bundle(bundle())


def test_settings_of_another_s_making_beside_the_own_files_are_refused() -> None:
    files = files_of(PROJECT)
    settings = files["pyproject.toml"].replace(
        b'serverapp = "fedveil.server.app:app"', b'serverapp = "fedveil.reports.page:app"'
    )
    other = build_fab_from_files(files | {"pyproject.toml": settings})[0]
    assert bundle_digest(other) != own_digest()
    with zipfile.ZipFile(io.BytesIO(other)) as archive:
        assert "server/app.py" in archive.namelist()
    with pytest.raises(RunFailed, match="nothing of it was run"):
        runner.check_bundle(other)
