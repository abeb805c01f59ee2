"""What processes connect to: each command runs with a guard in every interpreter that it starts.

Python runs ``sitecustomize`` before anything of the product. There the guard listens for look-ups of names and for
connections, lets those to this machine pass, writes any other down and refuses it. What a library's compiled code
connects to by itself is not seen: of gRPC and Ray that is the address that they were given.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from audits.faults import SOUND, Fault
from audits.finding import judged
from audits.tiny_models import TARGETS, save_tiny_model
from audits.tiny_site import tiny_run
from fedveil.common.config.text import to_toml
from fedveil.common.findings import Finding
from fedveil.common.hub import CLOSED

LOG, PLANTED = "FEDVEIL_GUARD_LOG", "FEDVEIL_GUARD_PLANTED"
GUARD = f"""
import json, os, socket, sys, traceback

def look(event, args):
    if event == "import" and args[0] == os.environ.get("{PLANTED}"):
        try:
            socket.create_connection(("hub.example", 443))
        except OSError:
            pass
    if event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = args[0]
    elif event in ("socket.connect", "socket.sendto") and isinstance(args[1], tuple):
        host = args[1][0]
    else:
        return
    host = host.decode() if isinstance(host, bytes) else host or "localhost"
    if host not in ("localhost", "::1", "::", "0.0.0.0") and not host.startswith("127."):
        stack = [f"{{one.filename}}:{{one.lineno}} {{one.name}}" for one in traceback.extract_stack()[:-1]]
        say(host=host, stack=stack[-12:])
        raise OSError(101, f"the guard refuses {{host}}")

def say(**more):
    line = json.dumps({{"pid": os.getpid(), "command": sys.orig_argv[:8], **more}})
    with open(os.environ["{LOG}"], "a") as file:
        file.write(line + "\\n")

sys.addaudithook(look)
say()
"""
"""The interpreter's own start-up hook, and the import of one module at which a planted call asks a hub."""


def planted(module: str) -> AbstractContextManager[object]:
    """Let the first import of a module ask a hub, and swallow what comes of it."""
    return patch.dict(os.environ, {PLANTED: module})


IN_WORKER = Fault("a worker asks a hub", lambda: planted("fedveil.client.app"))
IN_SERVER = Fault("the server asks a hub", lambda: planted("fedveil.server.conduct"))
IN_LIBRARY = Fault("a library's late import asks a hub", lambda: planted("peft.tuners.lora.bnb"))
FAULTS = IN_WORKER, IN_SERVER, IN_LIBRARY
FROM_PYTHON = "import fedveil; fedveil.run(None, sites=2, config='classes.toml', quiet=True)"
FROM_NOTEBOOK = (
    "import nbclient, nbformat; cells = [nbformat.v4.new_code_cell({!r})]; "
    "nbclient.NotebookClient(nbformat.v4.new_notebook(cells=cells), kernel_name='python3').execute()"
)
RUN = "run", "--sites", "2", "-c"
SIMULATED = [["fedveil", *RUN, "classes.toml"], ["fedveil", *RUN, "classes.toml", "--in-process"]]
LONG = [
    *SIMULATED,
    *(
        ["fedveil", *words]
        for words in (("merge", "latest", "model"), ("ask", "latest", "a warm film"), ("evaluate", "latest"))
    ),
    ["fedveil", "plan", *RUN[1:], "classes.toml"],
    ["python", "-c", FROM_PYTHON],
    ["python", "-c", FROM_NOTEBOOK.format(FROM_PYTHON)],
    ["fedveil", *RUN, "texts.toml", "--in-process"],
    ["fedveil", "generate", "latest", "--rows", "4", "--out", "drawn.csv"],
]


def audit_connections(folder: Path, fault: Fault = SOUND, commands: Sequence[Sequence[str]] = LONG) -> Finding:
    """Return whether a command connects to anything but this machine.

    Args:
        folder: empty; tables, runs and the guard go there.
        fault: SOUND or one of FAULTS.
        commands: what runs in the folder, one after another.
    """
    settings = tiny_run(folder) | {"rounds": 1}
    texts = {"model.name": save_tiny_model("llama", folder / "llama"), "adapter.targets": TARGETS["llama"]}
    texts |= {"model.task": "causal-lm", "head.policy": "frozen", "data.labels": "bad,good", "data.prompt": "label"}
    texts |= {"data.completion": "text", "data.template": "question {prompt} answer {completion}"}
    for name, own in (("classes", settings), ("texts", {**settings, **texts})):
        (folder / f"{name}.toml").write_text(to_toml(own), encoding="utf-8")
    with guarded(folder) as seen, fault.plant():
        failed = [words for words in commands if _fails(words, folder)]
    others = [line for line in seen if "host" in line]
    figures: dict[str, int | float | str] = {
        "commands": len(commands),
        "commands that failed": ", ".join(" ".join(words[:2]) for words in failed) or "none",
        "processes under the guard": len({line["pid"] for line in seen}),
        "connections to others": len(others),
        **{f"to {line['host']}": " < ".join(reversed(line["stack"][-3:])) for line in others[-2:]},
    }
    return judged("connections", fault.name, bool(others or failed), figures)


@contextmanager
def guarded(folder: Path) -> Iterator[list[dict[str, Any]]]:
    """Put the guard into every interpreter that is started; yield what it wrote, which is there at the end.

    The environment is that of somebody who is online: what closes hubs and telemetry is the product's own.
    """
    (folder / "sitecustomize.py").write_text(GUARD, encoding="utf-8")
    online = {name: str(1 - int(value)) for name, value in CLOSED.items()}
    seen: list[dict[str, Any]] = []
    with patch.dict(os.environ, {"PYTHONPATH": str(folder), LOG: str(folder / "log"), **online}):
        yield seen
    seen += [json.loads(line) for line in (folder / "log").read_text(encoding="utf-8").splitlines()]


def _fails(words: Sequence[str], folder: Path) -> bool:
    """Return whether a command ends with an error; ``words`` begins with a program beside this Python."""
    command = [str(Path(sys.executable).parent / words[0]), *words[1:]]
    return subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode != 0
