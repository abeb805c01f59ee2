"""A server's runner: a process of the installed package that runs what is submitted to a SuperLink.

It hashes the bundle that came with a run in memory and refuses any but the installed version's: the run ends as failed
before a line of it is imported, and its log says why. Of the one that is left the installed ``server.app`` is run, with
the run's settings; nothing of a bundle is unpacked. Each run is a process of its own, forked from this one, so that
several go on side by side, and that one which dies or is stopped takes nothing with it. The supervisor
(``deploy.pair``) restarts the runner whenever it ends; its runs end with it,
and it reports their ends.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from contextlib import closing, suppress
from multiprocessing.context import ForkProcess
from pathlib import Path
from queue import Queue
from types import FrameType

import httpx
from flwr.app import Context
from flwr.common.config import get_fused_config_from_fab
from flwr.common.constant import SubStatus
from flwr.common.serde import context_from_proto, context_to_proto, run_from_proto
from flwr.proto.runtime_pb2 import PullTaskInputRequest, PushTaskOutputRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.logger import flush_logs, mirror_output_to_queue, start_log_uploader, stop_log_uploader
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid

from fedveil.common.bundle import bundle_digest, own_digest
from fedveil.common.errors import FedVeilError, RunFailed
from fedveil.common.log import about, place_of, set_up
from fedveil.common.parent import die_with_parent
from fedveil.common.registered import require_installed_rows
from fedveil.common.runtime import NODE_TOO, HeldTask, NotOurNode, Runtime, TaskLost
from fedveil.privacy.entropy import require_system_entropy

log = logging.getLogger("fedveil.server")
POLL_SECONDS = 0.5
"""Between two questions for a run."""
ENDING_SECONDS = 3.5
"""That a run which is stopped has for its reports; the supervisor waits a little longer."""
FORK = multiprocessing.get_context("fork")
SHOWN_DIGITS = 12


def check_bundle(bundle: bytes) -> None:
    """Raise RunFailed unless a bundle is the installed version's own, ProtocolError if it is invalid."""
    if bundle_digest(bundle, own_alone=True) != own_digest():
        raise RunFailed(
            f"the app that was submitted is not this server's, whose bundle is {own_digest()[:SHOWN_DIGITS]}: nothing "
            "of it was run; submit with the version that is installed here"
        )


def serve(runtime: Runtime) -> int:
    """Start a process for every run until the SuperLink takes this one for a stranger; return the exit code."""
    runs: dict[ForkProcess, str] = {}
    while True:
        for process in [process for process in runs if not process.is_alive()]:
            token = runs.pop(process)
            if process.exitcode:
                _report_death(runtime, token, process.exitcode)
        try:
            token = runtime.acquire()
        except NotOurNode as error:
            log.error("the runner leaves: %s", error)
            return NODE_TOO
        if not token:
            time.sleep(POLL_SECONDS)
            continue
        process = FORK.Process(target=run_task, args=(runtime, token), daemon=True)  # a daemon: it ends with this one
        process.start()
        runs[process] = token


def _report_death(runtime: Runtime, token: str, code: int) -> None:
    """Tell the SuperLink that a run's process has died, which it would notice within a minute."""
    why = f"the run's process at the server ended with {code}"
    log.error("%s", why)
    with suppress(httpx.HTTPError, TaskLost), runtime.hold(token, lambda: None) as task:
        _tell_end(task, why)


def run_task(runtime: Runtime, token: str) -> None:
    """Run one task, in a process of its own."""
    die_with_parent()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end)
    try:
        with runtime.hold(token, _stopped) as task:
            _run_held(runtime, token, task)
    except TaskLost:
        log.warning("the SuperLink wants no more of a run")


def _end(_: int, __: FrameType | None) -> None:
    """Leave, through whatever closes the run's folder; what takes too long is cut off."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # a second one would cut the first one's way off
    ending = threading.Timer(ENDING_SECONDS, os._exit, [1])
    ending.daemon = True
    ending.start()
    sys.exit()


def _stopped() -> None:
    log.warning("the SuperLink has ended this run")
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)


def _run_held(runtime: Runtime, token: str, task: HeldTask) -> None:
    given = task.client.PullTaskInput(PullTaskInputRequest())
    run, context = run_from_proto(given.run), context_from_proto(given.context)
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = given.task_id, run.run_id, context.node_id
    lines: Queue[str | None] = Queue()
    mirror_output_to_queue(lines)
    upload = start_log_uploader(lines, node_id=0, run_id=run.run_id, client=task.client)
    why = "the run's process at the server was told to end"
    try:
        check_bundle(given.fab.content)
        context.run_config = get_fused_config_from_fab(given.fab.content, run)
        _run_app(runtime, token, run, context)
        why = ""
    except Exception as error:
        why = str(error) if isinstance(error, FedVeilError) else place_of(error)
        log.error("the run ends as failed: %s", why, extra=about(str(run.run_id)))
    finally:
        flush_logs(lines)
        stop_log_uploader(lines, upload)
        with suppress(httpx.HTTPError):  # of a run that was stopped nobody wants to hear
            _tell_end(task, why, context)


def _run_app(runtime: Runtime, token: str, run: Run, context: Context) -> None:
    from fedveil.server.app import app  # torch, and seconds: the task is held by now

    with closing(HttpGrid(runtime.address, False, runtime.authority, token=token)) as grid:
        grid.set_run(run)
        app(grid=grid, context=context)


def _tell_end(task: HeldTask, why: str, context: Context | None = None) -> None:
    if task.beat.is_running:
        task.beat.stop()  # a finished task has no more signs of life to give
    task.client.PushTaskOutput(
        PushTaskOutputRequest(
            context=context_to_proto(context) if context else None,
            sub_status=SubStatus.FAILED if why else SubStatus.COMPLETED,
            details=why,
        )
    )


def main() -> int:
    """Run from the supervisor."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", required=True, help="HOST:PORT of the SuperLink's Control and Runtime API")
    parser.add_argument("--authority", type=Path, required=True, help="the certificate authority's certificate")
    parser.add_argument("--secret", type=Path, required=True, help="file with the secret that it was started with")
    words = parser.parse_args()
    require_system_entropy()
    require_installed_rows()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # its runs are ended first
    set_up()
    logging.getLogger("fedveil").propagate = False  # libraries put handlers of their own on the root
    log.info("the runner is ready; it runs apps of the bundle %s, by the installed code", own_digest()[:SHOWN_DIGITS])
    secret, authority = words.secret.read_bytes(), words.authority.read_bytes()
    with closing(Runtime(words.address, secret, TaskType.SERVER_APP, authority)) as runtime:
        return serve(runtime)


if __name__ == "__main__":
    sys.exit(main())
