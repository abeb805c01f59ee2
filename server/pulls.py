"""Replies from Flower's grid, each pulled in a thread of its own: an upload that never ends holds up no other."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterator
from contextvars import ContextVar
from queue import Empty, SimpleQueue
from threading import Thread

from flwr.app import Message
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE as PART_BYTES
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_utils import pull_objects
from flwr.superlink.grid import http_grid
from google.protobuf.message import DecodeError

from common.log import place_of
from common.messages.wire import Layout

UNREADABLE = (ValueError, TypeError, KeyError, IndexError, AttributeError, EOFError, DecodeError)
"""What Flower raises when it unpacks bytes that are no message; trouble at the SuperLink is none of them."""
log = logging.getLogger("fedveil.server")
HEADER_BYTES, HEADER_PARTS = 2**22, 16
"""More than an answer has besides its numbers: names, figures, a sealed share for each site; and in objects."""
_room: ContextVar[int] = ContextVar("room")
"""Bytes that the answer which this thread pulls may have."""
USUAL_SECONDS = 1.0
"""Most pulls are over by then; one that is not goes on beside the next."""


def room_for(layout: Layout) -> int:
    """Return how many bytes an answer with these numbers may have in all, at four a number."""
    return HEADER_BYTES + 4 * sum(math.prod(shape) for factors in layout.values() for shape in factors.values())


def pull_within_room(object_ids: list[str], pull_object_fn: Callable[[str], bytes]) -> dict[str, bytes]:
    """Return objects by id as Flower's ``pull_objects``, and stop once they are more, or larger, than an answer.

    Flower announces the objects of a message by their hashes, and says of none how large it is. So too many are refused
    before the first is pulled, and sizes are counted as they come.

    Raises:
        ValueError: they are no answer of this run.
    """
    room = _room.get()
    if len(object_ids) > HEADER_PARTS + room // PART_BYTES:
        raise ValueError(f"the message has {len(object_ids)} objects, more than an answer")
    sizes: list[int] = []

    def counted(name: str) -> bytes:
        content = pull_object_fn(name)
        sizes.append(len(content))
        if sum(sizes) > room:
            raise ValueError(f"the message has more than {room} bytes, the most of an answer")
        return content

    return pull_objects(object_ids, counted)


http_grid.pull_objects = pull_within_room  # type: ignore[attr-defined]


class Pulls:
    """The pulls of one exchange, each of at most ``room`` bytes.

    A site can announce a reply and never send all of it. Flower waits for the rest for minutes, in
    the middle of a pull, while the replies of others pass their time of life.
    """

    def __init__(self, grid: Grid, room: int) -> None:
        self._grid, self._room = grid, room
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
        _room.set(self._room)
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
