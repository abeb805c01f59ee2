"""Read what a node sent: nothing in it is believed, and nothing in it can stop the server."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fedveil.common.errors import ProtocolError
from fedveil.common.messages.blocks import Layout
from fedveil.common.messages.columns import narrowed_layout
from fedveil.common.messages.round import Refusal, Reply, SumReply, Task, TrainResult, TrainTask
from fedveil.common.messages.sum_messages import decode_sum_reply
from fedveil.common.messages.wire import decode_reply, round_of
from fedveil.common.words import clean
from fedveil.server.members import mark_of
from fedveil.strategies.base import chooses
from fedveil.strategies.job import Job


def refusal(task: Task, node: int, kind: str, reason: str) -> Refusal:
    """Return a refusal for a node that gave no reply that counts.

    ``kind`` is ``late``, ``failed`` or ``reply`` (what it sent is not acceptable).
    """
    return Refusal(task.run, task.round_number, mark_of(node, task.run), kind, clean(reason))


def replies_to(task: Task, job: Job, layout: Layout) -> Layout | Callable[[int], Layout]:
    """Return what a site may send in answer to a task, from the whole layout: by its rank where it declares one."""
    strategy = job.strategy
    if not isinstance(task, TrainTask) or not (chooses(type(strategy)) and task.round_number):
        return layout

    def of_rank(rank: int) -> Layout:
        if rank > job.config.adapter.rank:
            raise ProtocolError(f"the reply declares rank {rank}, the run has {job.config.adapter.rank}")
        chosen = strategy.trained_columns(task.state, task.round_number, rank)
        if rank and chosen is None:
            raise ProtocolError("the reply declares a rank, which the strategy does not ask for")
        return narrowed_layout(layout, chosen)

    return of_rank


def read_reply(record: Any, layout: Layout | Callable[[int], Layout], task: Task, node: int) -> Reply | SumReply:
    """Return the reply in a node's message; whatever is wrong with it makes it a refusal.

    A vector of a secure sum is taken in a run of secure sums, and tensors in any other.

    Sizes are compared before a payload is copied; records that no reply has are never looked at.

    Args:
        record: the message's content as Flower delivers it (a RecordDict).
        layout: names and shapes of what a site may send in this round; as ``decode_reply``.
        task: what the node got.
        node: its number, whose mark it is called by as long as its own name cannot be trusted.
    """
    try:
        reply: Reply | SumReply
        if not isinstance(task, TrainTask):
            reply = decode_sum_reply(record, task)
        else:
            reply = decode_reply(record, layout, task.run, task.round_number, task.precision)
            if isinstance(reply, TrainResult) and bool(reply.words) != bool(task.offers):
                raise ProtocolError("the reply has a vector of a secure sum, or lacks it, against what was asked for")
        if not reply.site.strip():
            raise ProtocolError("the reply names no site")
    except ProtocolError as error:
        late = 0 < round_of(record) < task.round_number
        return refusal(task, node, "late" if late else "reply", str(error))
    except Exception as error:
        # A peer chooses these bytes; a decoder may fail in ways that nobody has foreseen.
        return refusal(task, node, "reply", f"the message cannot be read ({type(error).__name__})")
    return replace(reply, reason=clean(reply.reason)) if isinstance(reply, Refusal) else reply
