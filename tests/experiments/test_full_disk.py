"""A full disk is one sentence with the folder, and before a charge where that can be known."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedveil.client.ledger.ledger import Ledger
from fedveil.common.errors import RunFailed
from fedveil.common.messages.round import Task
from fedveil.common.run_lines import ResultFile, read_file
from fedveil.experiments import simulate as simulation
from fedveil.experiments.in_process import InProcessTransport, run_in_process

pytestmark = pytest.mark.rough_prices

USAGE = shutil.disk_usage


def charged(folder: Path) -> list[int]:
    with Ledger(folder / "ledgers" / "site-0.sqlite") as ledger:
        return [entry.round_number for entry in ledger.entries()]


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The bytes that a disk has left, once ``free`` is set."""
    left: dict[str, int] = {}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=left["free"]) if left else USAGE(path))
    return left


class FillsUp(InProcessTransport):
    """Whose server's disk fills up in round 1."""

    room: dict[str, int]

    def deliver(self, node: int, task: Task, content: Any) -> Any:
        self.room["free"] = 1_000_000
        return super().deliver(node, task, content)


def test_no_site_pays_for_a_round_that_could_not_be_saved(toy_settings: dict[str, Any], room: dict[str, int]) -> None:
    FillsUp.room = room
    with pytest.raises(RunFailed, match=r"^the disk of .*ffa-lora-1 is full: 1\.00 MB are left, and 4\.\d\d MB are"):
        run_in_process({**toy_settings, "rounds": 3}, 2, "1", kind=FillsUp)
    folder = Path(toy_settings["output"]) / "ffa-lora-1"
    assert charged(folder) == [1]
    result = read_file(ResultFile, folder)
    assert result.status == "failed"
    assert "make room" in result.reason
    assert result.reached is not None, "round 1, which could be saved, was not"
    room.clear()
    run_in_process({**toy_settings, "rounds": 3, "resume": "1"}, 2, "1")
    assert charged(folder) == [1, 2, 3]


def test_a_run_without_room_starts_nothing(
    toy_settings: dict[str, Any], room: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(_: Path) -> None:
        raise AssertionError("Flower was started")

    monkeypatch.setattr(simulation, "_superlink", started)
    room["free"] = 200_000
    with pytest.raises(RunFailed, match=r"the disk of .* is full: 200\.00 kB are left") as told:
        simulation.simulate(toy_settings, 2, print)
    assert str(Path(toy_settings["output"]).absolute()) in str(told.value)


def test_an_error_of_a_disk_that_is_full_all_the_same_is_a_sentence(toy_settings: dict[str, Any]) -> None:
    """Another program may take the room within a round: here the system says so of the log."""
    folder = Path(toy_settings["output"]) / "ffa-lora-1"

    class Full(InProcessTransport):
        def deliver(self, node: int, task: Task, content: Any) -> Any:
            path = folder / "run.log"  # which nobody reads: that file has no end
            if task.round_number == 2 and not path.is_symlink():
                path.unlink()
                path.symlink_to("/dev/full")
            return super().deliver(node, task, content)

    with pytest.raises(OSError, match="No space left"):
        run_in_process({**toy_settings, "rounds": 3}, 2, "1", kind=Full)
    result = read_file(ResultFile, folder)
    assert result.reason.startswith(f"the disk of {folder} is full (No space left on device): make room")
    assert "Errno" not in result.reason


def test_where_not_even_the_result_can_be_written_the_sentence_is_raised(
    toy_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    written = os.replace

    def full(source: Any, target: Any) -> None:
        if Path(target).name in ("checkpoint.safetensors", "result.json"):
            raise OSError(28, "No space left on device")
        written(source, target)

    monkeypatch.setattr("fedveil.common.files.os.replace", full)
    with pytest.raises(RunFailed, match=r"^the disk of .*ffa-lora-1 is full \(No space left on device\): make room"):
        run_in_process(toy_settings, 2, "1")
