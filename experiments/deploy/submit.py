"""Submit a job to a server with ``flwr run`` and follow it to its end, whatever becomes of the SuperLink meanwhile."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from common.config import Scalar
from common.errors import DataError, RunFailed
from common.paths import run_folder
from experiments.deploy.control import Control, control_of
from experiments.deploy.server_folder import ServerFolder
from server.records import read_json, write_json
from strategies import configure

POLL_SECONDS = 1.0
ASK_SECONDS = 20.0
"""Asking Flower costs a second of a core."""


def submit(
    folder: ServerFolder,
    settings: Mapping[str, Scalar],
    say: Callable[[str], None],
    *,
    sites: int = 1,
    patience: float = 300.0,
    once: bool = False,
) -> Path:
    """Run one job on a server's sites and return the run's folder.

    Args:
        folder: the server's folder, on the server's machine; its ``runs`` must be the SuperLink's.
        settings: overrides of the defaults, flat.
        say: prints one line.
        sites: sites that must be online before the job is submitted.
        patience: seconds to wait for them.
        once: take up the last job where its settings are the same: report it if it ended well, follow it if it
            still runs.

    Raises:
        ConfigError: a setting is wrong; nothing was submitted.
        RunFailed: too few sites, or the run did not end well; the message says why.
    """
    settings = {**settings, "output": str(folder.runs)}
    config = configure(settings).config
    with control_of(folder) as control:
        run = _last_run(folder, settings, control) if once else ""
        if run:
            say(f"going on with run {run}: same settings as before")
        else:
            _wait_for_sites(control, sites, patience, say)
            run = control.submit(settings)
            write_json(_job_file(folder), {"run": run, "settings": dict(settings)})
            say(f"run {run} submitted")
        path = run_folder(config, run)
        _follow(control, run, path, say)
    return path


def _job_file(folder: ServerFolder) -> Path:
    return folder.path / "last-job.json"


def _last_run(folder: ServerFolder, settings: Mapping[str, Scalar], control: Control) -> str:
    """Return the last job's run if it has these settings and ended well or still runs; else an empty string."""
    if not _job_file(folder).is_file():
        return ""
    job = read_json(_job_file(folder))
    if job["settings"] != json.loads(json.dumps(dict(settings))):
        return ""
    run = str(job["run"])
    ended = _result(run_folder(configure(settings).config, run))
    alive = not ended and not control.status(run).startswith(("finished", "unknown"))
    return run if alive or ended.get("status") in ("completed", "stopped") else ""


def _wait_for_sites(control: Control, sites: int, patience: float, say: Callable[[str], None]) -> None:
    deadline, said = time.monotonic() + patience, -1
    while (online := control.online()) < sites:
        if online != said:
            said = online
            say(f"{online} of {sites} sites are online")
        if time.monotonic() > deadline:
            raise RunFailed(f"{online} of {sites} sites are online after {patience:g} s: look at the sites' logs")
        time.sleep(POLL_SECONDS)


def _follow(control: Control, run: str, path: Path, say: Callable[[str], None]) -> None:
    printed, asked = 0, time.monotonic()
    while True:
        ended = _result(path)
        log = path / "run.log"
        lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
        for line in lines[printed:]:
            say(line)
        printed = len(lines)
        if ended.get("status") == "failed":
            raise RunFailed(ended["reason"])
        if ended:
            return
        if time.monotonic() - asked > ASK_SECONDS:
            asked, status = time.monotonic(), control.status(run)
            if status.startswith("finished") and not _result(path):
                raise RunFailed(f"run {run} ended as {status} and left no result: was the SuperLink restarted?")
        time.sleep(POLL_SECONDS)


def _result(path: Path) -> dict[str, Any]:
    try:
        return read_json(path / "result.json")
    except DataError:
        return {}
