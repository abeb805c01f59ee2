"""The plan of faults: what each process is to do wrong, and what it says it has done, as files in one folder.

The suite writes ``plan.json``; the apps that it has Flower start find the folder by an environment
variable, do what the plan says, and keep everything that they are sent and that they answer.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VARIABLE = "FEDVEIL_FAULTS"
SERVER = "server"
"""The server's name in a plan; sites have their own."""
POLL_SECONDS = 0.1
LONGEST_HOLD = 1800.0
"""Seconds after which a held process goes on: it outlives no suite."""


@dataclass(frozen=True)
class FaultPlan:
    """The folder."""

    folder: Path

    def write(self, faults: Mapping[str, Mapping[int, str]]) -> None:
        """Say what goes wrong from now on: by name and round, the fault. Whoever was held goes on."""
        number = self._read()["number"] + 1 if self._file.exists() else 0
        by_name = {who: {str(n): fault for n, fault in by.items()} for who, by in faults.items()}
        partial = self.folder / "plan.json.new"
        partial.write_text(json.dumps({"number": number, "faults": by_name}))
        partial.replace(self._file)

    def fault(self, who: str, round_number: int) -> str:
        """Return what this process does wrong in a round; empty: nothing."""
        return str(self._read()["faults"].get(who, {}).get(str(round_number), ""))

    def hold(self, who: str, round_number: int) -> None:
        """Say that this process has come to its fault, and wait until the suite lets it go on."""
        number, free = self._read()["number"], self._mark(who, round_number, "free")
        self._mark(who, round_number, "held").touch()
        deadline = time.monotonic() + LONGEST_HOLD
        while not free.exists() and self._read()["number"] == number and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)

    def held(self, who: str, round_number: int) -> bool:
        """Whether a process has come to its fault of this round."""
        return self._mark(who, round_number, "held").exists()

    def free(self, who: str, round_number: int) -> None:
        """Let a held process go on."""
        self._mark(who, round_number, "free").touch()

    @property
    def _file(self) -> Path:
        return self.folder / "plan.json"

    def _read(self) -> dict[str, Any]:
        plan: dict[str, Any] = json.loads(self._file.read_text())
        return plan

    def _mark(self, who: str, round_number: int, what: str) -> Path:
        return self.folder / f"{self._read()['number']}-{who}-{round_number}-{what}.mark"

    def keep(self, site: str, run: str, round_number: int, task: bytes, reply: bytes) -> None:
        """Keep what a site was sent and what it answers, before any lie."""
        place = self.folder / "kept" / site / run / str(round_number)
        place.mkdir(parents=True, exist_ok=True)
        count = len(list(place.glob("*.task")))
        (place / f"{count}.reply").write_bytes(reply)
        (place / f"{count}.task").write_bytes(task)

    def kept(self, site: str, run: str, round_number: int, what: str) -> list[bytes]:
        """Return all tasks (``what`` is "task") or replies ("reply") of a site's round, in order."""
        place = self.folder / "kept" / site / run / str(round_number)
        return [path.read_bytes() for path in sorted(place.glob(f"*.{what}"), key=lambda path: int(path.stem))]

    def runs(self, site: str) -> list[str]:
        """Return the runs that a site has answered in."""
        return sorted(path.name for path in (self.folder / "kept" / site).glob("*"))


def open_plan() -> FaultPlan:
    """Return the plan of the suite that started this process."""
    return FaultPlan(Path(os.environ[VARIABLE]))
