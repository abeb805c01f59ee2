"""Nothing that a run writes has Flower's number of a node: whoever knows it can speak as that node."""

from __future__ import annotations

import logging
from collections.abc import Collection, Container, Mapping
from pathlib import Path
from typing import Any

import pytest
from faulty_rounds import Faulty, plain
from pulled import Grid, answered, exchange
from safetensors import safe_open

from fedveil.common.messages.round import Refusal, Task
from fedveil.common.run_lines import ProgressFile, RoundLine, read_lines
from fedveil.experiments.in_process import run_in_process
from fedveil.reports import write_reports
from fedveil.server.admission import Admission
from fedveil.server.checkpoint import NAME
from fedveil.server.members import Member, mark_of
from fedveil.server.replies import refusal
from fedveil.server.sites import Exchange
from fedveil.server.tracking import rounds_of
from fedveil.strategies.job import configure

NUMBERS = (13078655862803469062, 4611686018427387905, 9876543210123456789)
"""Of sites 0 to 2."""


class Numbered(Faulty):
    """Sites with numbers as Flower's are: one does not answer in round 1, one answers under another's name."""

    lost: Mapping[int, Collection[int]] = {0: [1], 2: [0]}
    names: Mapping[int, str] | None = None

    def registered(self) -> Mapping[int, str] | None:
        return self.names

    def nodes(self, wanted: int, besides: Container[int]) -> list[int]:
        return [NUMBERS[i] for i in super().nodes(wanted, ()) if NUMBERS[i] not in besides]

    def exchange(self, tasks: Mapping[int, Task], timeout: float) -> Exchange:
        got = super().exchange({NUMBERS.index(node): task for node, task in tasks.items()}, timeout)  # type: ignore[misc]
        replies = {NUMBERS[i]: reply for i, reply in got.replies.items()}
        for node, reply in replies.items():
            if isinstance(reply, Refusal):
                replies[node] = refusal(tasks[node], node, reply.kind, reply.reason)
        return Exchange(replies, got.bytes_down, got.bytes_up)


def forms_of(number: int) -> list[bytes]:
    """Return how a number of 64 bits may stand in a file."""
    signed = number - 2**64 if number >= 2**63 else number
    words = [str(number), str(signed), f"{number:x}", f"{number:X}"]
    return [*(word.encode() for word in words), number.to_bytes(8, "big"), number.to_bytes(8, "little")]


def leaks(folder: Path) -> set[str]:
    """Return the names of the files of a folder that hold a node's number."""
    forms = [form for number in NUMBERS for form in forms_of(number)]
    found = set()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and any(form in path.read_bytes() for form in forms):
            found.add(path.name)
    return found


def told_run(settings: dict[str, Any], names: Mapping[int, str] | None, run: str) -> Path:
    """Return the folder of a run with absences, a second attempt and a refusal, and all that is made from it."""
    kind = type("Kind", (Numbered,), {"names": names})
    folder = run_in_process({**settings, "min-sites": 2, "rounds": 3}, 3, run, kind)
    write_reports(folder)
    (folder / "tracked.txt").write_text(str(rounds_of(folder)))
    return folder


@pytest.mark.parametrize("names", [None, {NUMBERS[1]: "site-1", NUMBERS[2]: "site-2"}], ids=["no table", "a table"])
def test_no_file_of_a_run_has_the_number_of_a_node(
    toy_settings: dict[str, Any], names: Mapping[int, str] | None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, "fedveil"):
        folder = told_run(toy_settings, names, "told")
    failures = [failure.site for line in read_lines(RoundLine, folder) for failure in line.failures]
    assert mark_of(NUMBERS[0], "told") in failures if names else mark_of(NUMBERS[1], "told") in failures
    assert {"rounds.jsonl", "report.json", "report.html", "report.md", NAME} <= {p.name for p in folder.iterdir()}
    assert leaks(folder) == set()
    assert not any(str(number) in line for number in NUMBERS for line in caplog.messages)


def test_a_mark_that_is_the_number_is_found(toy_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault: what stood for a node before."""
    for module in ("admission", "replies"):
        monkeypatch.setattr(f"fedveil.server.{module}.mark_of", lambda node, run: f"node {node}")
    found = leaks(told_run(toy_settings, None, "bare"))
    assert {NAME, "rounds.jsonl", "report.json", "log.jsonl"} <= found, "the fault is not found"


def test_progress_has_the_mark_of_a_node_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedveil.server.app.Message", lambda *content, **terms: content)
    told: list[ProgressFile] = []
    exchange(Grid(a=answered("away")), 1, progress=told.append)
    assert [one.answered for one in told] == [[mark_of(1, "1")]]


def test_a_mark_is_the_same_at_every_start_of_a_run_and_another_in_another_run() -> None:
    first = mark_of(NUMBERS[0], "a")
    mark_of.cache_clear()
    assert mark_of(NUMBERS[0], "a") == first
    assert len({first, mark_of(NUMBERS[0], "b"), mark_of(NUMBERS[1], "a"), mark_of(NUMBERS[0] + 1, "a")}) == 4


def test_a_node_is_known_by_its_mark_after_a_resume(toy_settings: dict[str, Any]) -> None:
    job, member = configure(plain(toy_settings)), Member("site-1", 50, None)
    saved = {mark_of(NUMBERS[0], "1"): member}
    for run, owner in (("1", NUMBERS[0]), ("2", None)):
        assert Admission(job, saved, run=run).owner("site-1", NUMBERS) == owner
    assert Admission(job, saved, run="1").owner("site-1", NUMBERS[1:]) is None, "whoever is offline owns no name"


def test_the_checkpoint_has_members_by_mark(toy_settings: dict[str, Any]) -> None:
    folder = told_run(toy_settings, None, "kept")
    with safe_open(str(folder / NAME), framework="pt") as file:
        about = file.metadata()["about"]
    assert all(mark_of(number, "kept") in about for number in NUMBERS)
