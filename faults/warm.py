"""Flower's programs, forked from one process that has the libraries loaded.

Torch and the libraries around it take seconds of a core to import, and Flower starts a process for
every message: cold starts would be nearly all that the suite does. Here each of Flower's programs is
a process all the same, with its own memory, network namespace and death; only its libraries are
loaded already. The project's own modules are not: they come from the bundle that Flower delivers.

In place of a program stands a small one (``SHIM``) that has it forked and waits for its end; when
that one is killed, so is the program.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

PROGRAMS = {
    "fedveil.deploy.superlink": "fedveil.deploy.superlink:main",
    "flower-supernode": "flwr.supernode.cli:flower_supernode",
    "flower-superexec": "flwr.supercore.cli:flower_superexec",
    "flwr-serverapp": "flwr.superlink.cli:flwr_serverapp",
    "flwr-clientapp": "flwr.supernode.cli:flwr_clientapp",
    "flwr": "flwr.cli.app:app",
    "stuttering-node": "faults.stuttering_node:main",
}
PROJECT = str(Path(__file__).resolve().parent.parent)
OWN = ("fedveil", "faults")
POLL_SECONDS = 0.05
SHIM = """#!{python} -SI
import json, os, socket, sys
link = socket.socket(socket.AF_UNIX)
link.connect({address!r})
wanted = {{"program": {program!r}, "words": sys.argv[1:], "cwd": os.getcwd(), "env": dict(os.environ)}}
text = json.dumps(wanted | {{"pid": os.getpid()}}).encode()
socket.send_fds(link, [len(text).to_bytes(4, "big")], [1, 2])
link.sendall(text)
answer = link.recv(1)
sys.exit(answer[0] if answer else 1)
"""


class WarmPrograms:
    """Starts the process that forks; ``folder`` then holds one program for each of Flower's."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder = folder
        folder.mkdir()
        address = str(folder / "socket")
        for name, entry in PROGRAMS.items():
            shim = folder / name
            shim.write_text(SHIM.format(python=sys.executable, address=address, program=entry), encoding="utf-8")
            shim.chmod(0o755)
        with (folder / "warm.log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "faults.warm", address],
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def ready(self) -> bool:
        """Whether programs can be started."""
        return (self.folder / "socket").exists()

    def end(self) -> None:
        """End the process and whatever it has forked."""
        self._process.terminate()
        self._process.wait()


def _load() -> None:
    """Import what every program needs, and forget this project's own modules again."""
    for module in (
        "fedveil.client.app",
        "fedveil.server.app",
        "transformers.models.bert",
        *(e.partition(":")[0] for e in _flowers()),
    ):
        importlib.import_module(module)
    for name in list(sys.modules):
        if name.partition(".")[0] in OWN:
            del sys.modules[name]


def _flowers() -> list[str]:
    return [entry for entry in PROGRAMS.values() if entry.startswith("flwr.")]


def serve(address: str) -> None:
    """Fork programs until terminated; one thread, because a fork copies no other."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(address + ".new")
    listening.listen(64)
    os.replace(address + ".new", address)
    children: dict[socket.socket, int] = {}
    try:
        while True:
            for ready in select.select([listening, *children], [], [], POLL_SECONDS)[0]:
                if ready is listening:
                    link, _ = listening.accept()
                    children[link] = _fork(link, [listening, *children])
                else:  # the program's stand-in is gone
                    _kill(children[ready])
            for link, pid in list(children.items()):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    with suppress(OSError):
                        link.sendall(bytes([os.waitstatus_to_exitcode(status) % 256]))
                    link.close()
                    del children[link]
    finally:
        for pid in children.values():
            _kill(pid)


def _kill(pid: int) -> None:
    """Kill a program, and what it started if it leads a group."""
    with suppress(ProcessLookupError):
        if os.getpgid(pid) == pid:
            os.killpg(pid, signal.SIGKILL)
        else:
            os.kill(pid, signal.SIGKILL)


def _fork(link: socket.socket, others: list[socket.socket]) -> int:
    size, fds, *_ = socket.recv_fds(link, 4, 2)
    text = b""
    while len(text) < int.from_bytes(size, "big"):
        text += link.recv(65536)
    wanted = json.loads(text)
    pid = os.fork()
    if pid:
        for fd in fds:
            os.close(fd)
        return pid
    code = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _join_group(int(wanted["pid"]))
        for one in (link, *others):
            one.close()
        for fd, own in zip(fds, (1, 2), strict=True):
            os.dup2(fd, own)
            os.close(fd)
        code = _become(wanted)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _join_group(stand_in: int) -> None:
    """Be in one group with whoever started this program, if that was one of these programs; else lead a new one."""
    same = os.getsid(stand_in) == os.getsid(0)
    os.setpgid(0, os.getpgid(stand_in) if same else 0)


def _become(wanted: Mapping[str, Any]) -> int:
    """Run a program's entry point as that program, in the place where it was started."""
    _enter_network(int(wanted["pid"]))
    os.environ.clear()
    os.environ.update(wanted["env"])
    os.chdir(wanted["cwd"])
    random.seed()
    module, _, name = str(wanted["program"]).partition(":")
    sys.argv = [name.replace("_", "-"), *wanted["words"]]
    # Last: this project's modules must come from the bundle wherever there is one.
    sys.path[:] = [*(place for place in sys.path if place not in ("", PROJECT)), PROJECT]
    try:
        code = getattr(importlib.import_module(module), name)()
    except SystemExit as end:
        code = end.code
    return code if isinstance(code, int) else int(code is not None)


def _enter_network(pid: int) -> None:
    place = f"/proc/{pid}/ns/net"
    if os.stat(place).st_ino == os.stat("/proc/self/ns/net").st_ino:
        return
    namespace = os.open(place, os.O_RDONLY)
    if ctypes.CDLL(None, use_errno=True).setns(namespace, 0):
        raise OSError(ctypes.get_errno(), "cannot enter the network namespace")


if __name__ == "__main__":
    _load()
    serve(sys.argv[1])
