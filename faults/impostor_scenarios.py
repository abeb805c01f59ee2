"""A registered site in the name of the server and of another site, against real workers and a real server."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from flwr.app import ConfigRecord, Message, RecordDict

from faults.checks import charges
from faults.federation import SIZES, Federation, Run
from faults.impostor import SERVER, Impostor, online
from fedveil.common.findings import Finding
from fedveil.common.messages.round import Refusal
from fedveil.common.messages.wire import encode_reply, round_of
from fedveil.common.run_lines import RoundLine, read_lines
from fedveil.deploy.fleet_answers import NotAnswered

IMPOSTOR, VICTIM, GROUP = "mill", "ward", "a registered site as another"
HONEST, OPEN = "fedveil.client.worker", "faults.open_worker"
"""The sites' workers: the product's, and one that does not look whose a task is."""
ROUNDS, FORGED_IN, DEADLINE = 4, 2, 120.0
TRIES = 200
"""Of microseconds before and after the own task; the finding's attack took 59 to 83 in all."""
AHEAD, FORGED = 2, 3
"""Rounds by which a forged task is ahead of the one that it is made of; and how many are forged."""
PAID = "a site was charged for what the server did not ask"
NOT_SIGNED, NO_ANSWER = "the task's signature is not of this message", "answers no task"
"""Words in the log of whoever receives a forged task, or a forged answer."""


@dataclass
class Attacks:
    """What an impostor tries in a run, by the number of the round, and what came of it."""

    impostor: Impostor
    victim: int
    """Flower's number of the victim's node."""
    run: Run
    earlier: dict[int, Message] = field(default_factory=dict)
    """By round, the impostor's own genuine tasks."""
    came: dict[str, bool] = field(default_factory=dict)
    """By attack, whether Flower took it or told what was asked."""

    def of(self, number: int, task: Message) -> None:
        """Attack in a round, once, with what was received in it."""
        own, refusal = self.impostor, encode_reply(Refusal(self.run.name, number, VICTIM, "policy", "never"))
        if number == 1:
            self.came["the victim's task is named"] = bool(own.name_of_task(task, self.victim, TRIES))
            self.came["its refusal is kept"] = own.answers_as(refusal, task, self.victim, TRIES)
            self.came["a refusal to the server's number"] = own.push(own.message(refusal, SERVER, SERVER, task))
        if number == FORGED_IN:
            forged = {
                "own task for the victim": task.content,
                "own task of a later round": _of_round(task.content, number + AHEAD),
                "own task of an earlier round": self.earlier[1].content,
            }
            for what, content in forged.items():
                self.came[what] = own.push(own.message(content, SERVER, self.victim, task))
        self.earlier[number] = task

    def play(self) -> None:
        """Receive tasks until the run ends, attack, and refuse."""
        while not self.run.ended():
            with suppress(NotAnswered):  # of a run that ends meanwhile
                if (task := self.impostor.receive()) is None:
                    time.sleep(0.1)
                    continue
                number = round_of(task.content)
                if number not in self.earlier:
                    self.of(number, task)
                said = encode_reply(Refusal(self.run.name, number, IMPOSTOR, "policy", "it only listens"))
                name = task.metadata.message_id
                self.impostor.push(self.impostor.message(said, self.impostor.own, SERVER, task, name))


def _of_round(content: RecordDict, number: int) -> RecordDict:
    """Return a message that says that it is of another round, otherwise the same to the last byte."""
    header = dict(content.config_records["header"])
    body = header["body"]
    if not isinstance(body, bytes):
        raise TypeError("a message without a body was received")
    header["body"] = body[:1] + struct.pack("<I", number) + body[5:]
    forged = RecordDict({name: record for name, record in content.items() if name != "header"})
    forged["header"] = ConfigRecord(header)
    return forged


def impostors(folder: Path) -> Iterator[Finding]:
    """Let a registered site act as others, against the product's workers and against some that take all tasks."""
    folder.mkdir()
    yield _played(folder / "walled", HONEST)
    found = _played(folder / "open", OPEN)
    wrong = str(found.figures.get("wrong", ""))
    yield replace(found, case="the fault: sites that do not look whose a task is", built_in=True, passed=PAID in wrong)


def _played(folder: Path, worker: str) -> Finding:
    """Let a registered site forge tasks, answers and refusals, and ask who was drawn, in a run of three others."""
    folder.mkdir()
    with Federation(folder, worker=worker) as federation:
        for site in SIZES:
            federation.add_site(site)
        federation.let_in(IMPOSTOR)
        federation.wait_online(*SIZES)
        key, authority = federation.sites[IMPOSTOR].path / "node.key", (federation.server.path / "ca.crt").read_bytes()
        with online(key, f"127.0.0.1:{federation.server.fleet_port}", authority, 0) as impostor:
            run = federation.submit(rounds=ROUNDS, min_sites=len(SIZES), round_timeout=DEADLINE)
            attacks = Attacks(replace(impostor, run=int(run.flower_id)), federation.number(VICTIM), run)
            attacks.play()
        return _finding(federation, run, attacks)


def _finding(federation: Federation, run: Run, attacks: Attacks) -> Finding:
    result, lines = run.result(), read_lines(RoundLine, run.path)
    paid = {site: dict(charges(federation, site, run)) for site in SIZES}
    log = (run.path / "log.jsonl").read_text(encoding="utf-8")
    whole, refused = dict.fromkeys(range(1, ROUNDS + 1), 1), federation.processes.log(VICTIM).count(NOT_SIGNED)
    wrong = [
        words
        for words, holds in (
            (f"the run {result.status}: {result.reason}", result.status == "completed"),
            ("a site was left out of a round", all(set(SIZES) <= set(line.participants) for line in lines)),
            (PAID, all(one == whole for one in paid.values())),
            ("it learnt who was asked", not attacks.came.get("the victim's task is named", True)),
            ("an answer in another's name was kept", not attacks.came.get("its refusal is kept", True)),
            ("no forged task reached the victim: no case", attacks.came.get("own task for the victim", False)),
            ("no message reached the server: no case", attacks.came.get("a refusal to the server's number", False)),
            ("the victim's log does not tell of each forged task", refused == FORGED),
            ("the server's log does not tell of a forged answer", NO_ANSWER in log),
        )
        if not holds
    ]
    figures: dict[str, int | float | str] = {
        "took part": "; ".join(", ".join(line.participants) for line in lines),
        "told": "; ".join(f"{f.site} ({f.kind})" for line in lines for f in line.failures) or "no failure",
        "charged": ", ".join(f"{site} {sum(rounds.values())}" for site, rounds in paid.items()),
        **{what: "yes" if came else "no" for what, came in attacks.came.items()},
    }
    if wrong:
        figures["wrong"] = "; ".join(wrong)
    return Finding(GROUP, "tasks, answers and refusals are forged", False, not wrong, figures)
