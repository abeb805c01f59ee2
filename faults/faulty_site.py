"""A site's ClientApp that keeps what it sends and, where the plan says so, stalls, lies or is asked twice.

Everything up to the reply is the real site's: it reads the same policy and pays from the same ledger.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict

from faults.fault_plan import FaultPlan, open_plan
from fedveil.client import app as honest
from fedveil.common.messages.formats import Float32
from fedveil.common.messages.round import Reply, TrainResult
from fedveil.common.messages.tensors import apply
from fedveil.common.messages.wire import encode_reply, round_of

BEFORE, AFTER = "held before the charge", "held between charge and reply"
TWICE = "asked twice"
app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Answer one round's task, rightly or as the plan says."""
    plan, site, number = open_plan(), str(context.node_config["site"]), round_of(message.content)
    fault = plan.fault(site, number)
    if fault == BEFORE:
        plan.hold(site, number)
    honest.encode_reply = partial(_sent, plan, fault, message.content)  # type: ignore[attr-defined]
    if fault == TWICE:
        honest.train(message, context)
    return honest.train(message, context)


def _sent(plan: FaultPlan, fault: str, task: RecordDict, reply: Reply) -> RecordDict:
    """Keep a reply, and return what leaves the site in its place."""
    record = encode_reply(reply)
    if not isinstance(reply, TrainResult):
        return record
    plan.keep(reply.site, reply.run, reply.round_number, _bytes(task), _bytes(record))
    if fault == AFTER:
        plan.hold(reply.site, reply.round_number)
    return LIES[fault](reply, record, plan) if fault in LIES else record


def _bytes(record: RecordDict) -> bytes:
    return recorddict_to_proto(record).SerializeToString()


def _changed(
    change: Callable[[TrainResult], TrainResult],
) -> Callable[[TrainResult, RecordDict, FaultPlan], RecordDict]:
    return lambda result, record, plan: encode_reply(change(result))


def _too_many(result: TrainResult, record: RecordDict, plan: FaultPlan) -> RecordDict:
    data = record.array_records["adapter"]["state"].data
    array = Array("float32", (len(data) // 4,), Float32.stype, data)
    record["adapter"] = ArrayRecord({"state": array, **{f"state {i}": array for i in range(99)}})
    return record


def _old_round(result: TrainResult, record: RecordDict, plan: FaultPlan) -> RecordDict:
    return _again(plan.kept(result.site, result.run, result.round_number - 1, "reply")[0])


def _another_run(result: TrainResult, record: RecordDict, plan: FaultPlan) -> RecordDict:
    run = next(run for run in plan.runs(result.site) if run != result.run)
    return _again(plan.kept(result.site, run, 1, "reply")[0])


def _again(reply: bytes) -> RecordDict:
    return recorddict_from_proto(ProtoRecordDict.FromString(reply))


def _garbage(result: TrainResult, record: RecordDict, plan: FaultPlan) -> RecordDict:
    record.config_records["header"]["body"] = b"\xff\xfe garbage" * 1000
    record["adapter"] = ArrayRecord({"state": Array("float32", (7,), Float32.stype, b"\x00\xff" * 99)})
    return record


LIES: dict[str, Callable[[TrainResult, RecordDict, FaultPlan], RecordDict]] = {
    "NaN": _changed(lambda r: replace(r, contribution=apply(lambda t: t * float("nan"), r.contribution))),
    "wrong shapes": _changed(lambda r: replace(r, contribution=apply(lambda t: torch.cat([t, t]), r.contribution))),
    "another model's adapter": _changed(
        lambda r: replace(r, contribution={f"other.{name}": f for name, f in r.contribution.items()})
    ),
    "100 times too many tensors": _too_many,
    "an old round": _old_round,
    "another run's reply": _another_run,
    "garbage bytes": _garbage,
}
