"""Flower wiring of a site: decode, train, encode. Everything else is in ``client.process``."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedveil.client.process import SiteProcess
from fedveil.common.config.flat import Scalar
from fedveil.common.messages.round import Reply, SumReply
from fedveil.common.messages.wire import encode_reply

app = ClientApp()
process = SiteProcess()
"""This process; Flower calls a function and gives it none."""


def answer(
    content: RecordDict,
    node: Mapping[str, Scalar],
    settings: Mapping[str, Scalar],
    run: str,
    memory: MutableMapping[str, bytes],
    *,
    simulated: bool | None = None,
) -> Reply | SumReply:
    """Return this process's reply to a train message, as ``SiteProcess.answer``."""
    return process.answer(content, node, settings, run, memory, simulated=simulated)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Answer one round's task."""
    record = context.state.config_records.get("kept", ConfigRecord())
    memory = {key: value for key, value in record.items() if isinstance(value, bytes)}
    with process.answering(context.node_config):  # a key too: on the way to it a new process reads the records
        reply = answer(message.content, context.node_config, context.run_config, str(context.run_id), memory)
        context.state["kept"] = ConfigRecord(dict(memory))
        encoded = encode_reply(reply)
    return Message(encoded, reply_to=message)
