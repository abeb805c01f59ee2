"""Replies from Flower's grid, each pulled in a thread of its own: an upload that never ends holds up no other."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from queue import Empty, SimpleQueue
from threading import Thread

from flwr.app import Message
from flwr.serverapp import Grid
from google.protobuf.message import DecodeError

from common.log import place_of

UNREADABLE = (ValueError, TypeError, KeyError, IndexError, AttributeError, EOFError, DecodeError)
"""What Flower raises when it unpacks bytes that are no message; trouble at the SuperLink is none of them."""
log = logging.getLogger("fedveil.server")
USUAL_SECONDS = 1.0
"""Most pulls are over by then; one that is not goes on beside the next."""


class Pulls:
    """The pulls of one exchange.

    A site can announce a reply and never send all of it. Flower waits for the rest for minutes, in
    the middle of a pull, while the replies of others pass their time of life.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._done: SimpleQueue[tuple[str, list[Message | None]]] = SimpleQueue()
        self.under_way: set[str] = set()
        """Ids of the tasks whose reply is being pulled."""
        self.trouble = ""
        """What went wrong in the latest pull that failed, as in a SuperLink whose database is busy."""

    def pull(self, waiting: Collection[str]) -> Iterator[tuple[str, Message | None]]:
        """Yield ``(id of the task's message, reply)`` for what has arrived; None for a reply that cannot be unpacked.

        One by one: a message that cannot be unpacked must not take others with it. Whatever else
        goes wrong in a pull is noted, and the next call tries again: a reply waits until it is pulled.
        """
        for asked in sorted(set(waiting) - self.under_way):
            self.under_way.add(asked)
            # A daemon: a pull that hangs must not keep a finished run from ending.
            thread = Thread(target=self._pull_one, args=(asked,), daemon=True)
            thread.start()
            thread.join(USUAL_SECONDS)
        while True:
            try:
                asked, found = self._done.get_nowait()
            except Empty:
                return
            self.under_way.discard(asked)
            if asked in waiting:
                yield from ((asked, message) for message in found[:1])

    def _pull_one(self, asked: str) -> None:
        found: list[Message | None] = []
        try:
            for message in self._grid.pull_messages([asked]):
                if message.metadata.reply_to_message_id == asked:
                    found.append(message)
                else:  # any node can address a message to the server's own number, and each pull brings it along
                    log.warning("a message that answers no task is dropped: any registered site may have sent it")
        except UNREADABLE:
            found = [None]
        except Exception as error:
            self.trouble = place_of(error)
        self._done.put((asked, found))
