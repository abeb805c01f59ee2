"""One worker of ``client.cores``: a program of its own, and the socket by which batches go to it."""

from __future__ import annotations

import math
import os
import pickle
import socket
import struct
import subprocess
import sys
from multiprocessing.connection import Connection
from multiprocessing.reduction import send_handle
from typing import Any

from fedveil.common.threads import THREADS, environment

STARTING = 120.0
"""Seconds that a worker has to start, and at least for any other answer."""
LOST = object()
"""In place of an answer that did not come."""


class WorkerProgram:
    """One worker, and the socket to it."""

    def __init__(self) -> None:
        own, its = socket.socketpair()
        with its:
            command = [sys.executable, "-P", "-m", "fedveil.client.core", str(its.fileno()), str(os.getpid())]
            own_environment = {**environment(), THREADS: "1"}
            # In a session of its own: an interrupt at the terminal is the parent's to answer.
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                pass_fds=[its.fileno()],
                env=own_environment,
                start_new_session=True,
            )
        self.link = Connection(own.detach())
        self.allow(STARTING)

    def allow(self, seconds: float) -> None:
        """Let it be lost where it takes or sends nothing for this time, which follows from made-up records alone."""
        with socket.socket(fileno=os.dup(self.link.fileno())) as own:
            for direction in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                own.setsockopt(socket.SOL_SOCKET, direction, struct.pack("ll", math.ceil(seconds), 0))

    def say(self, what: str, content: Any = None, memory: int | None = None) -> bool:
        """Send it something to do, and the descriptor of memory; return whether it took that."""
        try:
            self.link.send_bytes(pickle.dumps((what, content), protocol=5))
            if memory is not None:
                send_handle(self.link, memory, self.process.pid)
        except OSError:
            return False
        return True

    def answer(self) -> Any:
        """Return what it answers, or ``LOST``."""
        try:
            return pickle.loads(self.link.recv_bytes())  # noqa: S301 (this process alone has started the other end)
        except (EOFError, OSError, pickle.UnpicklingError):
            return LOST

    def end(self) -> None:
        """End it, whatever it does."""
        self.process.kill()
        self.process.wait()
        self.link.close()
