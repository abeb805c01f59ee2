"""The messages of a secure sum beside its vectors."""

from __future__ import annotations

from flwr.app import RecordDict

from fedveil.common.errors import ProtocolError
from fedveil.common.messages import round as of_round
from fedveil.common.messages.header import (
    ATTEMPT,
    KEY,
    KINDS,
    Reader,
    pack,
    pack_key,
    pack_several,
    pack_site,
    read_refusal,
)
from fedveil.common.messages.round import REFUSAL_KINDS, SumAnswer, SumReply, SumTask
from fedveil.privacy.secure_sum.attempt import KeyOffer
from fedveil.privacy.secure_sum.identity import SIGNATURE_BYTES
from fedveil.privacy.secure_sum.recovery import SEALED_BYTES, Sharing
from fedveil.privacy.secure_sum.shares import SHARE_BYTES
from fedveil.privacy.secure_sum.survivors import Agreement

SUM_TASKS: dict[str, type[SumTask]] = {
    "key task": of_round.KeyTask,
    "share task": of_round.ShareTask,
    "survivor task": of_round.SurvivorTask,
    "unmask task": of_round.UnmaskTask,
}
"""Tasks of a secure sum, by kind."""


def _kind_of(task: SumTask) -> str:
    return next(kind for kind, form in SUM_TASKS.items() if form is type(task))


def encode_sum_task(task: SumTask) -> RecordDict:
    """Return a task of a secure sum as Flower records."""
    rest = ATTEMPT.pack(task.attempt)
    if isinstance(task, of_round.ShareTask):
        rest += pack_several(map(pack_key, task.offers))
    elif isinstance(task, of_round.SurvivorTask):
        rest += pack_several(map(pack_site, task.survivors))
    elif isinstance(task, of_round.UnmaskTask):
        rest += pack_several(pack_site(site) + signature for site, signature in task.signatures)
    return pack(_kind_of(task), task.round_number, task.run, rest)


def decode_sum_task(record: RecordDict) -> SumTask:
    """Return a task of a secure sum; ProtocolError if the message is another, or has another form."""
    reader = Reader(record)
    if reader.kind not in SUM_TASKS:
        raise ProtocolError(f"a task of a secure sum was expected, not {reader.kind!r}")
    (attempt,) = reader.take(ATTEMPT, "attempt")
    where, kind = (reader.run, reader.round_number, attempt), SUM_TASKS[reader.kind]
    task: SumTask
    if kind is of_round.KeyTask:
        task = of_round.KeyTask(*where)
    elif kind is of_round.ShareTask:
        task = of_round.ShareTask(*where, reader.several(reader.key))
    elif kind is of_round.SurvivorTask:
        task = of_round.SurvivorTask(*where, reader.several(reader.site))
    else:
        signed = reader.several(lambda: (reader.site(), reader.block(SIGNATURE_BYTES, "signature")))
        task = of_round.UnmaskTask(*where, signed)
    reader.end()
    return task


def encode_sum_reply(reply: SumReply) -> RecordDict:
    """Return what a site sends for a secure sum beside its vector as Flower records."""
    if isinstance(reply, of_round.KeyReply):
        kind, rest = "key", pack_key(reply.offer)
    elif isinstance(reply, of_round.ShareReply):
        kind, rest = "shares", pack_key(reply.sharing.offer) + pack_several(reply.sharing.sealed)
    elif isinstance(reply, of_round.SurvivorReply):
        signed = KEY.pack(reply.agreement.digest, reply.agreement.signature)
        kind, rest = "survivors", pack_site(reply.site) + signed
    else:
        kind, rest = "unmasking", pack_site(reply.site) + pack_several(reply.shares)
    return pack(kind, reply.round_number, reply.run, rest)


def decode_sum_reply(record: RecordDict, task: SumTask) -> SumAnswer:
    """Return the answer to a task of a secure sum that asks for no vector.

    Raises:
        ProtocolError: it belongs to another run, round or kind of task, or anything in it is not as expected.
    """
    reader = Reader(record)
    if reader.kind in REFUSAL_KINDS:
        return read_refusal(reader, task.run, task.round_number)
    expected = KINDS[1 + KINDS.index(_kind_of(task))]
    if reader.kind != expected:
        raise ProtocolError(f"the server expects a message of kind {expected!r}, not of kind {reader.kind!r}")
    site = reader.site_of(task.run, task.round_number)
    where = task.run, task.round_number, site
    reply: SumReply
    if isinstance(task, of_round.SurvivorTask):
        reply = of_round.SurvivorReply(*where, Agreement(site, *reader.take(KEY, "signature")))
    elif isinstance(task, of_round.UnmaskTask):
        reply = of_round.UnmaskReply(*where, reader.several(lambda: reader.block(SHARE_BYTES, "shares")))
    else:
        offer = KeyOffer(site, *reader.take(KEY, "key"))
        if isinstance(task, of_round.KeyTask):
            reply = of_round.KeyReply(*where, offer)
        else:
            sealed = reader.several(lambda: reader.block(SEALED_BYTES, "shares"))
            reply = of_round.ShareReply(*where, Sharing(offer, sealed))
    reader.end()
    return reply
