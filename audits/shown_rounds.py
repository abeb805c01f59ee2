"""A trusted server's run folder, progress, log and terminal, which must not show who was drawn.

Two rounds differ in who is drawn, in what those answer and in how long they take. Their noised sums are made equal, so
whatever differs in what is shown came from the draw. Then lines that tell of it are planted, and must be found.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from audits.faults import SOUND, Fault, zero_noise
from audits.finding import judged
from audits.shell import with_each
from audits.whole_sites import Cohort, MadeUp, noise_of
from fedveil.common.findings import Finding
from fedveil.common.messages.round import Refusal, Reply, Task, TrainResult
from fedveil.common.messages.state import AdapterState
from fedveil.common.model.score import Score
from fedveil.server.collect import trusted
from fedveil.server.collect.base import Collected
from fedveil.server.collect.shown import Shown, ShownOfCohort
from fedveil.server.observers import RoundOutcome, Update
from fedveil.server.records import RunFolder
from fedveil.server.sites import Exchange, Sites
from fedveil.server.terminal import round_line
from fedveil.strategies.state import ServerState

SITES = 6
DRAWS = ((0, 1), (2, 3, 4))
"""Who is drawn in the one round, and in the other."""


class Watched(MadeUp):
    """A transport that shows its progress in a run's folder, as the one over Flower does."""

    folder: RunFolder

    def exchange(self, tasks: Mapping[int, Task], timeout: float) -> Exchange:
        """Return what the nodes answer."""
        exchange = super().exchange(tasks, timeout)
        answered = [reply.site for reply in exchange.replies.values()]
        self.folder.progress(self.folder.shown.answered(1, answered, len(tasks)))
        return Exchange(exchange.replies, 100 * len(tasks), 100 * len(tasks))


class _Kept(logging.Handler):
    """Keeps the messages of a log."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextmanager
def _log() -> Iterator[list[str]]:
    """Return what the server logs meanwhile, also where nothing is logged otherwise."""
    log, handler, disabled = logging.getLogger("fedveil.server"), _Kept(), logging.root.manager.disable
    level, log.propagate = log.level, False
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    logging.disable(logging.NOTSET)
    try:
        yield handler.lines
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = True
        logging.disable(disabled)


def _answer(node: int, received: AdapterState) -> Reply:
    """Return no change, or of every second node a refusal."""
    if node % 2:
        return Refusal("audit", 1, f"site-{node}", "failed", f"site-{node} is away")
    return TrainResult("audit", 1, f"site-{node}", 1, received, None)


def shown_of_draw(folder: Path, drawn: Sequence[int]) -> dict[str, str]:
    """Return what one round shows in which these nodes are drawn, by where it is shown."""
    folder.mkdir()
    cohort = Cohort(folder, SITES, 0.5)
    transport = Watched(_answer, SITES)
    transport.folder = RunFolder(folder / "run", cohort.job, "audit")
    transport.folder.started(Score(0.5, 1.0), cohort.state, {})
    with _log() as lines, patch.object(trusted, "private_poisson_sample", lambda *_: torch.tensor(drawn)):
        got = cohort.asking(transport).collect(1, cohort.state)
        outcome = RoundOutcome(1, got, None, 1.0 + len(drawn))
        transport.folder.finished(outcome, Update(cohort.state, cohort.state, cohort.state), {})
        transport.folder.say(round_line(transport.folder.shown, outcome, {}), 1)
    files = ("rounds.jsonl", "privacy.jsonl", "progress.json", "run.log")
    paths = {name: transport.folder.path / name for name in files}
    shown = {name: path.read_text(encoding="utf-8") for name, path in paths.items() if path.is_file()}
    return {"log": "\n".join(lines), **shown}


def draws_stay_hidden(folder: Path, fault: Fault = SOUND) -> Finding:
    """Hold what two rounds show against each other that differ in who was drawn."""
    with fault.plant(), noise_of(zero_noise):
        one, other = (shown_of_draw(folder / str(number), drawn) for number, drawn in enumerate(DRAWS))
    telling = [name for name in {**one, **other} if one.get(name) != other.get(name)]
    return judged("what a trusted server shows", fault.name, bool(telling), {"tells of the draw": ", ".join(telling)})


def _absences() -> AbstractContextManager[Any]:
    """The server writes down which of the sites that it asked have failed."""
    ask = Sites.ask

    def telling(sites: Sites, nodes: Sequence[int], number: int, state: ServerState) -> Exchange:
        exchange = ask(sites, nodes, number, state)
        refused = {n: (r.site, r.kind, r.reason) for n, r in exchange.replies.items() if isinstance(r, Refusal)}
        sites.absent(Collected(attempts=1), number, refused, set(exchange.replies))
        return exchange

    return patch.object(Sites, "ask", telling)


def _bytes() -> AbstractContextManager[Any]:
    """The server counts the bytes that were really sent."""
    ask, sent = Sites.ask, list[int]()

    def counting(sites: Sites, *rest: Any) -> Exchange:
        exchange = ask(sites, *rest)
        sent.append(exchange.bytes_up)
        return exchange

    patched = patch.multiple(Sites, ask=counting)
    return _both(patched, patch.object(trusted.TrustedCollector, "_usual_bytes", lambda *_: (sent[-1], sent[-1])))


@contextmanager
def _both(one: Any, other: Any) -> Iterator[None]:
    with one, other:
        yield


PROGRESS = Fault("progress that counts who was asked", lambda: patch.object(ShownOfCohort, "answered", Shown.answered))
SECONDS = Fault("rounds with their times", lambda: patch.object(ShownOfCohort, "seconds", Shown.seconds))
ABSENCES = Fault("a log that names who failed", _absences)
BYTES = Fault("the bytes of those who were drawn", _bytes)
FAULTS = (PROGRESS, SECONDS, ABSENCES, BYTES)


def audit_shown_rounds(folder: Path) -> Sequence[Finding]:
    """Audit the server as it is, then with each line that tells who was drawn."""
    return with_each(FAULTS, folder, draws_stay_hidden)
