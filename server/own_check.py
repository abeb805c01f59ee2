"""The check of its connections and its machine that a server app has made when a run begins.

How a SuperLink was started is hidden from the app that it runs. ``fedveil server start`` therefore names its folder in
the SuperLink's environment, and the app has the installed version look at that folder and ask the port that sites dial
(``deploy.run_check``). That the sites dialled that very port is the operator's word. Where no folder is named, nothing
is known, and the report says so. Sites are not checked: what its own check finds stays there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from fedveil.common.bundle import own_digest
from fedveil.common.errors import DataError
from fedveil.common.log import place_of
from fedveil.common.registered import registered_rows
from fedveil.common.server_file import CheckLine, OwnCheck, Reach, ServerStart
from fedveil.common.strict_json import from_json
from fedveil.privacy.entropy import entropy_is_replaced

FOLDER = "FEDVEIL_SERVER"
"""Environment variable of the SuperLink that names the folder which it was started from."""
PROGRAM = "fedveil.deploy.run_check"
"""Of the installed version: the bundle, which the app runs from, has no part that makes or reads certificates."""
PATIENCE = 120.0
"""Seconds for the check, most of them imports; far more than it takes on a busy machine."""


def began(reach: Reach, check: OwnCheck | None = None, *, fresh_ledgers: bool = False) -> ServerStart:
    """Return what is written down at a start of a run: when, by which code, and what the check found."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    entropy, rows = not entropy_is_replaced(), list(registered_rows())
    return ServerStart(now, own_digest(), reach, check or OwnCheck(), entropy, fresh_ledgers, rows)


def own_check(runs: Path, reach: Reach, command: Sequence[str] = (sys.executable, "-P", "-m", PROGRAM)) -> OwnCheck:
    """Return what the installed version finds; one that cannot run is a check that failed.

    Args:
        runs: where runs are kept.
        reach: how sites are reached; where nothing goes over a network, no port is checked.
        command: of the program, without its arguments.
    """
    named = os.environ.get(FOLDER, "") if reach == "network" else ""
    try:
        done = subprocess.run([*command, str(runs), named], capture_output=True, timeout=PATIENCE, check=True)
        return from_json(OwnCheck, json.loads(done.stdout), "the server's check")
    except (OSError, ValueError, subprocess.SubprocessError, DataError) as error:
        why = f"it could not be done ({place_of(error)}): run 'fedveil doctor' by hand"
        line = CheckLine(False, "the server's own check", why)
        return OwnCheck(named=bool(named), checks=[line])
