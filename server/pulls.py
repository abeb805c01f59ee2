"""Replies from Flower's grid, each pulled in a thread of its own: an upload that never ends holds up no other."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterator
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, cast

from flwr.app import Message
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE as PART_BYTES
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents, pull_objects
from flwr.superlink.grid.http_grid import HttpGrid
from google.protobuf.message import DecodeError

from fedveil.common.log import place_of
from fedveil.common.messages.blocks import Layout

UNREADABLE = (ValueError, TypeError, KeyError, IndexError, AttributeError, EOFError, DecodeError)
"""What Flower raises when it unpacks bytes that are no message; trouble at the SuperLink is none of them."""
log = logging.getLogger("fedveil.server")
HEADER_BYTES, HEADER_PARTS = 2**22, 16
"""More than an answer has besides its numbers: names, figures, a sealed share for each site; and in objects."""
USUAL_SECONDS = 1.0
"""Most pulls are over by then; one that is not goes on beside the next."""


def room_for(layout: Layout) -> int:
    """Return how many bytes an answer with these numbers may have in all, at four a number."""
    return HEADER_BYTES + 4 * sum(math.prod(shape) for factors in layout.values() for shape in factors.values())


def pull_answer(grid: HttpGrid, asked: str, room: int) -> list[Message]:
    """Return the answer to a task, none if it is not there; its parts are pulled until they are more than ``room``.

    Flower announces the parts of a message by their hashes, and says of none how large it is. So too many are refused
    before the first is pulled, and sizes are counted as they come. Any node can address a message to the server's own
    number, which Flower hands over with any request, whole or not: none of its parts is pulled.

    Raises:
        ValueError: it is no answer of this run.
    """
    client, run = grid._runtime_client, cast(Any, grid)._run.run_id
    got = client.PullMessages(PullAppMessagesRequest(message_ids=[asked]))
    found = []
    for message, tree in zip(got.messages_list, got.message_object_trees, strict=True):
        if message.metadata.reply_to_message_id != asked:
            log.warning("a message that answers no task is dropped: any registered site may have sent it")
            continue
        name, parts = message.metadata.message_id, [part.object_id for part in iterate_object_tree(tree)]
        if len(parts) > HEADER_PARTS + room // PART_BYTES:
            raise ValueError(f"the message has {len(parts)} parts, more than an answer")
        pull = make_pull_object_fn_protobuf(client.PullObject, grid.node, run)
        contents = pull_objects(parts, _within(room, pull))
        client.ConfirmMessageReceived(ConfirmMessageReceivedRequest(node=grid.node, run_id=run, message_object_id=name))
        found.append(cast(Message, inflate_object_from_contents(name, contents)))
    return found


def _within(room: int, pull: Callable[[str], bytes]) -> Callable[[str], bytes]:
    sizes: list[int] = []

    def counted(name: str) -> bytes:
        content = pull(name)
        sizes.append(len(content))
        if sum(sizes) > room:
            raise ValueError(f"the message has more than {room} bytes, the most of an answer")
        return content

    return counted


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
        try:
            if isinstance(self._grid, HttpGrid):
                found += pull_answer(self._grid, asked, self._room)
            else:  # a simulation's: its messages are of this machine alone, and whole
                found += self._grid.pull_messages([asked])
        except UNREADABLE:
            found = [None]
        except Exception as error:
            self.trouble = place_of(error)
        self._done.put((asked, found))
