"""Signed tasks and answers of tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from fedveil.common.messages.round import Refusal, TrainResult, TrainTask
from fedveil.common.messages.signed import Asked, SiteKeys, digest, sign_answer
from fedveil.common.messages.wire import encode_reply
from fedveil.deploy.certificates import Issued
from fedveil.deploy.server_folder import ServerFolder, authority_beside

SETTINGS = {"rounds": 2, "privacy.epsilon": 8.0, "head.train": True, "strategy": "fed-sb"}


ASKED = Asked("17", SETTINGS, 7)


TASK = TrainTask("17", 3, {"l": {"A": torch.ones(2, 2)}}, {}, "", "0a" * 16, "1b" * 16)


ANSWER = Refusal("17", 3, "clinic", "budget", "spent")


@dataclass(frozen=True)
class World:
    """A server, its folder, a site that it has registered as node 7, and the same of another federation."""

    server: ServerFolder
    site: Path
    others: ServerFolder

    @property
    def keys(self) -> SiteKeys:
        return SiteKeys.read(self.server.path / "ca.crt", self.site / "node.key")

    @property
    def public(self) -> bytes:
        return (self.site / "node.pub").read_bytes()

    def authority(self) -> Issued:
        folder = authority_beside(self.server.path)
        return Issued((folder / "ca.crt").read_bytes(), (folder / "ca.key").read_bytes())


def header(record: RecordDict, **changes: Any) -> RecordDict:
    fields = {**record.config_records["header"], **changes}
    record["header"] = ConfigRecord({key: value for key, value in fields.items() if value is not None})
    return record


def body_with(record: RecordDict, position: int, byte: int) -> RecordDict:
    packed = record.config_records["header"]["body"]
    assert isinstance(packed, bytes)
    return header(record, body=packed[:position] + bytes([byte]) + packed[position + 1 :])


def block_with(record: RecordDict, **changes: Any) -> RecordDict:
    one = record.array_records["adapter"]["state"]
    parts = {"dtype": one.dtype, "shape": one.shape, "stype": one.stype, "data": one.data, **changes}
    record["adapter"] = ArrayRecord({"state": Array(**parts)})
    return record


def data_of(record: RecordDict) -> bytes:
    return record.array_records["adapter"]["state"].data


def result(world: World, task: bytes = b"\7" * 32) -> RecordDict:
    record = encode_reply(TrainResult("17", 3, "clinic", 50, TASK.state, None))
    sign_answer(record, task, world.keys)
    return record


def honest(world: World) -> Callable[[Message], list[Message]]:
    def answer(message: Message) -> list[Message]:
        record = encode_reply(TrainResult("17", 3, "clinic", 50, TASK.state, None))
        sign_answer(record, digest(ASKED.task(message.content)), world.keys)
        return [Message(record, reply_to=message)]

    return answer


def forged(message: Message) -> list[Message]:
    return [Message(encode_reply(replace(ANSWER, reason="I am the clinic")), reply_to=message)]
