"""SIGKILL at random moments of a round: no kill may lose a charge of something that left the site, or a sum's key.

    .venv/bin/python -m audits.kills --kills 200

A process plays a deployed site that is asked for round after round. It says when a transaction of the
ledger begins and ends, and when a reply would leave the site. Half of the kills come at a moment drawn
uniformly from the length of a round, the others within a transaction's length of the beginning of one.
Then a new process goes on with the ledger that the dead one left. After every kill

* the ledger opens,
* it has a charge for every release, at least,
* it shows an epsilon no smaller than that of the releases,
* it shows no more than the budget, and at most one charge more than before.

When the budget is spent, the next round must be refused; the next kills are of a site with a fresh ledger.

A site of a secure sum is played as well. After a kill that charged it, its node comes up with the memory that it had
before, and is sent the same task: it must send no second vector under that key.
"""

from __future__ import annotations

import os
import random
import shutil
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from audits.finding import judged
from audits.forked import Child, Send, fork
from audits.shell import run_alone
from audits.sum_site import SumSite
from audits.tiny_site import OneSite, tiny_site
from fedveil.client.ledger.file import LedgerFile
from fedveil.client.ledger.ledger import Ledger
from fedveil.client.ledger.sums import Sums
from fedveil.common.errors import LedgerError
from fedveil.common.findings import Finding
from fedveil.common.messages.round import Refusal, TrainTask
from fedveil.common.messages.wire import encode_reply
from fedveil.common.threads import THREADS
from fedveil.privacy.accounting import gaussian_release
from fedveil.privacy.events import Event
from fedveil.privacy.privacy_filter import promised

DELTA = 1e-3
BUDGET_ROUNDS = 6
"""Rounds that the budget of one ledger pays for."""
PHASES = ("before the charge", "between charge and release", "after the release")
SPAN = 1.1
TRANSACTION = ("begun", "ended")
TRANSACTIONS, CHARGE = {False: 2, True: 3}, 1
"""Transactions in a round, by whether it is of a sum: the policy's budget is held against the stored one, then the
round is charged. In a sum the budget is looked at again, for the next round's key."""
SUMMED: dict[str, Any] = {
    "privacy.mode": "secure-sum",
    "privacy.honest-sites": 2,
    "training.local-steps": 1,
    "training.optimizer": "sgd",
}
PlayRound = Callable[[OneSite, TrainTask, Send], None]


def play_round(site: OneSite, task: TrainTask, send: Send) -> None:
    """Answer one task as a site does, and say when the reply would leave."""
    started = time.perf_counter()
    reply = site.ask(task)
    encode_reply(reply)
    if isinstance(reply, Refusal):
        send(f"refused {reply.kind} {reply.reason}")
    else:
        send(f"released {time.perf_counter() - started}")


def charge_late(site: OneSite, task: TrainTask, send: Send) -> None:
    """The fault: what was trained leaves the site before its charge is in the ledger."""
    aside = site.ledger.with_suffix(".aside")
    if site.ledger.exists():
        shutil.copy(site.ledger, aside)
    play_round(replace(site, node={**site.node, "ledger": str(aside)}), task, send)
    time.sleep(30)
    aside.replace(site.ledger)


def forget_keys(site: OneSite, task: TrainTask, send: Send) -> None:
    """The fault: under which key a vector was charged is in the node's memory alone."""
    with patch.object(Sums, "use_key", lambda *own: None):
        play_round(site, task, send)


FAULTS: dict[PlayRound, str] = {
    charge_late: "charged after the release",
    forget_keys: "keys of masks known to the memory alone",
}


@contextmanager
def telling(send: Send) -> Iterator[None]:
    """Say when a transaction has begun, with nothing read yet, and when it is over."""
    transaction = LedgerFile.transaction

    @contextmanager
    def told(file: LedgerFile) -> Iterator[Any]:
        with transaction(file) as db:
            send(f"begun {time.perf_counter()}")
            yield db
        send(f"ended {time.perf_counter()}")

    with patch.object(LedgerFile, "transaction", told):
        yield


@dataclass
class Life:
    """One ledger, from its first charge to the end of its budget."""

    number: int
    charged: int = 0
    released: int = 0


@dataclass
class Kills:
    """Kills one site's processes and keeps the count."""

    site: OneSite
    play: PlayRound
    peers: SumSite | None = None
    """The same site among those of a sum; None: it sends plain uploads."""
    lengths: list[float] = field(default_factory=list)
    """Seconds of the latest rounds."""
    phases: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    transactions: list[list[float]] = field(default_factory=list)
    """Seconds that each of a round's transactions took."""
    replayed: int = 0
    """Tasks that were sent again, to the memory that there was before a kill."""
    inside: int = 0
    """Kills between the beginning of a transaction and its end."""
    rolled_back: int = 0
    """Kills that left a journal behind, with which the next process undid half a write."""
    budgets_spent: int = 0

    def __post_init__(self) -> None:
        self.transactions = [[] for _ in range(TRANSACTIONS[self.summed])]

    @property
    def summed(self) -> bool:
        """Whether the site's vectors are summed."""
        return self.peers is not None

    @property
    def budget(self) -> float:
        """Epsilon of ``BUDGET_ROUNDS`` rounds, and nothing more."""
        return cost_of(BUDGET_ROUNDS, summed=self.summed) + 1e-9

    def begin(self, number: int) -> Life:
        """Give the site a ledger that has spent nothing."""
        self.site.node["ledger"] = str(self.site.ledger.with_name(f"life-{number}.sqlite"))
        (self.peers or self.site).rule(epsilon=self.budget, delta=DELTA)
        return Life(number)

    def next_task(self, life: Life, task: TrainTask) -> TrainTask | Refusal:
        """Return the next round's task, for which a sum's site has given a new key; or why it gave none."""
        run, number = f"life-{life.number}", life.released + 1
        if self.peers is None:
            return replace(task, run=run, round_number=number)
        self.site.memory.clear()
        reply = self.peers.key(number, run=run)
        return reply if isinstance(reply, Refusal) else self.peers.task(number, run=run)

    def start(self, wanted: TrainTask | Refusal) -> Child:
        """Start the process that answers a task, from this one's memory of the node."""

        def work(send: Send) -> None:
            send("started")
            if isinstance(wanted, Refusal):
                send(f"refused {wanted.kind} {wanted.reason}")
                return
            with telling(send):
                self.play(self.site, wanted, send)

        child = fork(work)
        child.line()
        return child

    def whole_round(self, wanted: TrainTask | Refusal) -> str:
        """Let a process answer and return what it said at the end."""
        child = self.start(wanted)
        lines = [child.line()]
        while lines[-1].startswith(TRANSACTION):
            lines.append(child.line())
        child.kill()
        self.note_transactions(lines)
        return lines[-1]

    def kill(self, life: Life, task: TrainTask, span: float, aimed: bool) -> None:
        """Kill a process, then look at what it left.

        Args:
            life: the ledger.
            task: what the process is asked.
            span: the latest moment, in lengths of a round.
            aimed: wait for one of the round's transactions to begin, and kill within about its length.
        """
        wanted, said = self.next_task(life, task), list[str]()
        child = self.start(wanted)
        if aimed:
            place = random.randrange(len(self.transactions))
            while sum(line.startswith("begun") for line in said) <= place and (line := child.line()):
                said.append(line)
            time.sleep(random.uniform(0, 1.2 * statistics.median(self.transactions[place])))
        else:
            time.sleep(random.uniform(0, span * statistics.median(self.lengths[-9:])))
        said += child.kill()
        released = [line for line in said if line.startswith("released")]
        self.lengths += [float(line.split()[1]) for line in released]
        self.violations += [line for line in said if not line.startswith(("released", *TRANSACTION))]
        self.inside += self.note_transactions(said)
        self.rolled_back += Path(f"{self.site.ledger}-journal").exists()
        charged = self.look(life, len(released))
        self.phases[PHASES[2] if released else PHASES[min(1, charged)]] += 1
        if self.summed and charged:
            self.replay(life, wanted)

    def replay(self, life: Life, wanted: TrainTask | Refusal) -> None:
        """Send a task that was charged again, to the memory that there was before: no second vector may leave."""
        self.replayed += 1
        said = self.whole_round(wanted)
        refused = "refused budget" if life.charged >= BUDGET_ROUNDS else "refused policy"
        if not said.startswith(refused) or self.look(life, 0):
            self.violations.append(f"a second vector under one key of masks: {said}")

    def note_transactions(self, said: list[str]) -> bool:
        """Keep how long finished transactions took, and return whether one is unfinished."""
        times = [float(line.split()[1]) for line in said if line.startswith(TRANSACTION)]
        for lengths, begin, end in zip(self.transactions, times[::2], times[1::2], strict=False):
            lengths.append(end - begin)
        return len(times) % 2 == 1

    def look(self, life: Life, released: int) -> int:
        """Reopen the ledger, note what must not be, and return how many charges are new."""
        life.released += released
        try:
            with Ledger(self.site.ledger) as ledger:
                rounds = Counter(entry.round_number for entry in ledger.entries())
                shown = ledger.epsilon("clinic", DELTA)
        except LedgerError as error:
            self.violations.append(f"the ledger does not open: {error}")
            return 0
        rows, before = sum(rounds.values()), life.charged
        life.charged = rows
        unpaid = [number for number in range(1, life.released + 1) if not rounds[number]]
        if unpaid:
            self.violations.append(f"ledger {life.number}: rounds {unpaid} were released and are not charged")
        if shown < cost_of(life.released, summed=self.summed) or rows < before:
            self.violations.append(f"ledger {life.number} shows {shown:.4f}, less than was released")
        if shown > self.budget:
            self.violations.append(f"ledger {life.number} shows {shown:.4f}, above its budget {self.budget:.4f}")
        if rows > before + 1:
            self.violations.append(f"ledger {life.number}: one round was charged {rows - before} times")
        return rows - before

    def spent(self, life: Life, task: TrainTask) -> None:
        """Ask for one more round than the budget pays for: it must be refused and cost nothing."""
        said = self.whole_round(self.next_task(life, task))
        if not said.startswith("refused budget") or self.look(life, 0):
            self.violations.append(f"ledger {life.number} is spent, yet the site said: {said}")
        self.budgets_spent += 1


def cost_of(rounds: int, *, summed: bool = False) -> float:
    """Return the epsilon of so many of the site's rounds: two steps each, or one sum."""
    if not rounds:
        return 0.0
    plain = gaussian_release(2.0, 0.25, rounds if summed else 2 * rounds)
    event = Event("summed-gaussian", {**plain.event.figures, "honest_sites": 2.0})
    return promised([replace(plain, event=event) if summed else plain], DELTA)[0]


def kill_rounds(
    folder: Path, kills: int, play: PlayRound = play_round, span: float = 0.0, *, summed: bool = False
) -> Finding:
    """Kill ``kills`` processes, each in a round of its own, and return what was found.

    Args:
        folder: an empty folder for the site.
        kills: how many.
        play: what a process does with a task.
        span: kill at any moment of so many lengths of a round; 0: half of the kills within ``SPAN`` lengths, and
            half at a transaction.
        summed: whether the site is one of a secure sum.
    """
    os.environ[THREADS] = "1"  # a forked process cannot use the threads of its parent
    site = tiny_site(folder, **(SUMMED if summed else {}))
    site.settings["rounds"] = BUDGET_ROUNDS + 1
    audit, task = Kills(site, play, SumSite(site) if summed else None), site.task(1)
    for rounds in range(1, BUDGET_ROUNDS + 2):  # children inherit prices, not only libraries
        cost_of(rounds, summed=summed)
    audit.begin(0)
    site.ask(audit.peers.task(1, run="0") if audit.peers else replace(task, run="0"))  # and the model
    site.memory.clear()
    for number in range(3):
        said = audit.whole_round(audit.next_task(audit.begin(-1 - number), task))
        audit.lengths.append(float(said.removeprefix("released ")))
    life = audit.begin(1)
    for number in range(kills):
        audit.kill(life, task, span or SPAN, aimed=not span and number % 2 == 1)
        if life.charged >= BUDGET_ROUNDS:
            audit.spent(life, task)
            life = audit.begin(life.number + 1)
    return judged(
        f"kills{' in a secure sum' if summed else ''}",
        FAULTS.get(play, ""),
        bool(audit.violations),
        {
            "kills": kills,
            **{phase: audit.phases[phase] for phase in PHASES},
            "inside a transaction": audit.inside,
            "journals rolled back": audit.rolled_back,
            "length of a round in ms": 1000 * statistics.median(audit.lengths),
            "of a charge in ms": 1000 * statistics.median(audit.transactions[CHARGE]),
            **({"tasks sent again": audit.replayed} if summed else {}),
            "budgets spent to the end": audit.budgets_spent,
            "violations": len(audit.violations),
            **({"first violation": audit.violations[0]} if audit.violations else {}),
        },
    )


def kills_of_all(folder: Path, kills: int) -> list[Finding]:
    """Kill ``kills`` rounds of the code as it is, half as many of a sum, and some with the faults built in.

    The late charges are killed late enough to be after the release. ``folder`` must be empty.
    """
    for name in ("sound", "late", "summed", "forgetful"):
        (folder / name).mkdir()
    return [
        kill_rounds(folder / "sound", kills),
        kill_rounds(folder / "late", 20, charge_late, span=4.0),
        kill_rounds(folder / "summed", kills // 2, summed=True),
        kill_rounds(folder / "forgetful", 20, forget_keys, span=4.0, summed=True),
    ]


if __name__ == "__main__":
    run_alone(__doc__, "kills", 200, kills_of_all)
