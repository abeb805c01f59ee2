"""A site whose passes take times that a test says."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from flwr.app import Context, RecordDict
from flwr.app.message import make_message
from flwr.app.metadata import Metadata

from audits.tiny_site import OneSite
from fedveil.client import app, deadline, process, rehearsals
from fedveil.client.deadline import TRAINED, Deadline
from fedveil.client.ledger import file as ledger_file
from fedveil.client.ledger.ledger import Ledger
from fedveil.client.process import SiteProcess
from fedveil.client.timing import Timing
from fedveil.common.messages.round import Reply
from fedveil.common.messages.wire import encode_task
from fedveil.common.model.federated import FederatedModel
from fedveil.privacy import dpsgd
from fedveil.strategies.job import configure


class Clock:
    """Hands that a sleep moves, which takes no time; it stands for the module ``time``.

    On the real clock a busy machine would move them as well, and what is right would be late now and then.
    """

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


# --- a site's answers, through Flower's own entry ---------------------------------------------------------------------
class Played:
    """A site that is asked as Flower asks it, with times of passes and noise of the test's own."""

    def __init__(self, site: OneSite, timing: Timing, monkeypatch: pytest.MonkeyPatch) -> None:
        self.site, self.timing, self.deadlines, self.clock = site, timing, list[Deadline](), Clock()
        self.postpones, self.passes_postpone = False, False
        played = self

        class Watched(Deadline):
            def __init__(self, seconds: float) -> None:
                super().__init__(seconds, began=played.clock.monotonic())
                played.deadlines.append(self)

            @contextmanager
            def extended(self) -> Iterator[None]:
                with super().extended():
                    played.postpones = True
                    yield
                played.postpones = False

        replies, answer = list[Reply](), app.answer
        self.replies = replies

        def answered(*words: Any) -> Reply:
            replies.append(answer(*words))
            return replies[-1]

        monkeypatch.setattr(deadline, "time", self.clock)
        monkeypatch.setattr(app, "answer", answered)
        monkeypatch.setattr(process, "Deadline", Watched)
        monkeypatch.setattr(app, "process", SiteProcess())
        monkeypatch.setattr(rehearsals, "rehearse", lambda _: timing)
        noise = dpsgd.ClipAndNoise.add_noise

        def later(mechanism: Any) -> None:
            played.clock.sleep(timing.empty)
            noise(mechanism)

        monkeypatch.setattr(dpsgd.ClipAndNoise, "add_noise", later)
        self.slower = 1.0
        losses = FederatedModel.losses

        def passes(model: FederatedModel, batch: Any) -> Any:
            self.passes_postpone |= self.postpones
            self.clock.sleep(self.slower * timing.passes[batch["input_ids"].shape[1]])
            return losses(model, batch)

        monkeypatch.setattr(FederatedModel, "losses", passes)

        class Waiting(sqlite3.Connection):
            """Moves the hands by as long as it waits for the lock: SQLite knows the real clock alone."""

            def execute(self, *words: Any) -> sqlite3.Cursor:
                if words[0] != "BEGIN IMMEDIATE":
                    return super().execute(*words)
                began = time.monotonic()
                try:
                    return super().execute(*words)
                finally:
                    played.clock.sleep(time.monotonic() - began)

        monkeypatch.setattr(ledger_file.sqlite3, "connect", partial(sqlite3.connect, factory=Waiting))

    @property
    def least(self) -> float:
        """The shortest reply-after that the run is not refused for."""
        training = configure(self.site.settings).config.training
        return self.timing.worst(training.local_steps, training.sample_rate * 50, 0) / TRAINED + 0.01

    def ask(self, number: int = 1) -> tuple[Reply, float, float]:
        """Return the reply, the seconds from the task to it, and those of them that did not postpone it."""
        task = self.site.task(number)
        if not number:
            task = replace(task, state={}, basis={}, basis_fingerprint="")
        message = make_message(Metadata(1, "one", 1, 7, "", "1", time.time(), 600.0, "train"), encode_task(task))
        context = Context(1, 7, dict(self.site.node), RecordDict(), dict(self.site.settings), series_id=0)
        began = self.clock.monotonic()
        app.train(message, context)
        now = self.clock.monotonic()
        return self.replies[-1], now - began, now - self.deadlines[-1].began

    def at_its_time(self, reply_after: float) -> tuple[Reply, float]:
        """Ask under this ``reply-after``; the answer must leave at it. Return it, and the seconds it took in all."""
        self.site.rule(reply_after=reply_after)
        reply, whole, counted = self.ask()
        assert counted == pytest.approx(reply_after), f"{counted:.2f} seconds, reply-after = {reply_after:.2f}"
        return reply, whole

    @property
    def failures(self) -> int:
        with Ledger(self.site.ledger) as opened:
            return len(opened.failures())


def timing(long: float = 0.0, empty: float = 0.0) -> Timing:
    """Return the seconds of the toy model's lengths, of which only the greatest is slow."""
    rows = {8: 48, 16: 24, 24: 16, 32: 12}
    return Timing({length: long if length == 32 else long / 16 for length in rows}, rows, empty, 0.0)
