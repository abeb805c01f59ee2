"""Run a Flower process and its worker as one: a signal stops both, and a worker that ends is started again.

A site's are its SuperNode and ``client.worker``, a server's its SuperLink and ``server.runner``. Run as ``python -P -m
fedveil.deploy.pair NODE WORKER``, both commands as JSON lists. It stays while they run, so it imports the standard
library alone. If Flower's process ends, so does the pair, which its unit or container starts again. The SuperNode,
which remembers what the site must know of a run, survives a worker.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from types import FrameType

from fedveil.common.parent import die_with_parent
from fedveil.common.threads import environment

ANEW, NODE_TOO = 75, 76
"""Exit codes of a worker, as in ``common.runtime``: start it again; end Flower's process as well."""
POLL_SECONDS = 0.2
SHORT_LIFE, MOST_SHORT_LIVES = 10.0, 5
"""Seconds and number of successive short lives after which a worker is given up."""
AGAIN_SECONDS = 1.0
SUPERLINK = "fedveil.deploy.superlink"
PATIENCE = 4.0
"""Seconds that both get to end by themselves."""
SITE_ENDS = (
    "the SuperNode ended with {}, so this site ends: its lines above say why; a key that the server takes for online, "
    "as after a kill, is let in again a minute later"
)
SERVER_ENDS = "the SuperLink ended with {}, so this server ends: its lines above say why"


def run_pair(node: list[str], worker: list[str], say: Callable[[str], None]) -> int:
    """Run both until Flower's process ends or a signal comes; return the exit code.

    Args:
        node: the SuperNode's or SuperLink's command.
        worker: the worker's.
        say: prints one line.
    """
    stopped: list[int] = []

    def stop(number: int, _: FrameType | None) -> None:
        stopped.append(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    running = {"node": _start(node), "worker": _start(worker)}
    began, short_lives = time.monotonic(), 0
    try:
        while not stopped:
            time.sleep(POLL_SECONDS)
            ended = running["node"].poll()
            if ended is not None:
                say((SERVER_ENDS if SUPERLINK in node else SITE_ENDS).format(ended))
                return ended or 1
            ended = running["worker"].poll()
            if ended is None:
                continue
            if ended == NODE_TOO:
                return 1
            short_lives = short_lives + 1 if ended != ANEW and time.monotonic() - began < SHORT_LIFE else 0
            if short_lives == MOST_SHORT_LIVES:
                say(f"the worker ended with {ended} again and again: its lines above say why")
                return 1
            if ended != ANEW:
                say(f"the worker ended with {ended} and is started again")
                time.sleep(AGAIN_SECONDS)
            began, running["worker"] = time.monotonic(), _start(worker)
        return 0
    finally:
        _end(list(running.values()))


def _start(command: list[str]) -> subprocess.Popen[bytes]:
    # A group of its own, so that Ctrl-C reaches it once, from here; and it ends if this process is killed.
    return subprocess.Popen(command, env=environment(), process_group=0, preexec_fn=die_with_parent)


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    """End both; the worker first, which would otherwise look for Flower's process."""
    deadline = time.monotonic() + PATIENCE
    for process in reversed(processes):
        process.terminate()
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def main() -> int:
    """Run from ``fedveil site start`` and ``fedveil server start``."""
    node, worker = (json.loads(text) for text in sys.argv[1:3])
    return run_pair(node, worker, lambda line: print(line, flush=True))


if __name__ == "__main__":
    sys.exit(main())
