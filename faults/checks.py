"""The checks of a round with a fault: records, ledgers, and the adapter that the surviving replies imply.

The adapter is compared with an average of this module's own, in float64, of the replies as they were
recorded at the sites, weighted by the public sizes, as all tell the same noise. What a round
led to is what the sites were sent in the next one; after the last round it is the checkpoint, and the
exported adapter.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from flwr.common.serde import recorddict_from_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict
from numpy.typing import NDArray
from safetensors import safe_open

from faults.federation import MORE_SIZES, SIZES, Federation, Run
from fedveil.client.ledger.ledger import Ledger
from fedveil.common.findings import Finding
from fedveil.common.messages.blocks import block_data
from fedveil.common.messages.state import HEAD
from fedveil.common.run_lines import RoundLine, read_lines
from fedveil.server.checkpoint import NAME

CLOSE = 1e-6
"""Largest difference of an element; values are of order 0.01, sent and averaged as float32."""


@dataclass(frozen=True)
class Expected:
    """What a fault in one round must lead to."""

    survivors: Sequence[str]
    """Sites whose reply counts."""
    failures: Mapping[str, tuple[Sequence[str], str]] = field(default_factory=dict)
    """By site: the kinds that are right, and words of the reason."""
    charges: Mapping[str, int] = field(default_factory=dict)
    """Rows in the ledger of a site for this run and round, where it is not 1."""
    reply: int = -1
    """Which of the replies recorded in the round counts, where a site was asked more than once."""


def examine(
    federation: Federation,
    run: Run,
    number: int,
    case: str,
    expected: Expected,
    group: str,
    wrong: Sequence[str] = (),
    more: Mapping[str, int | float | str] = MappingProxyType({}),
) -> Finding:
    """Return what round ``number`` of an ended run left, against what was expected.

    Args:
        federation: the federation, all of whose messages are recorded.
        run: the run; it has ended.
        number: the round.
        case: the fault's name.
        expected: what the fault must lead to.
        group: what kind of fault it is.
        wrong: what was found wrong already.
        more: figures to show.
    """
    wrong, result = list(wrong), run.result()
    if result.status != "completed":
        wrong.append(f"the run {result.status}: {result.reason}")
    line = _line(run, number)
    told = _failures(line, expected, wrong)
    ledgers = _ledgers(federation, run, number, expected, wrong)
    difference = _difference(federation, run, number, expected, wrong)
    figures: dict[str, int | float | str] = {
        "took part": ", ".join(line.participants if line else ()) or "nobody",
        "told": told or "no failure",
        "charged": ledgers,
        "adapter": f"the survivors' mean to {difference:.1e}",
        **more,
    }
    if wrong:
        figures["wrong"] = "; ".join(wrong)
    return Finding(group, case, False, not wrong, figures)


def _line(run: Run, number: int) -> RoundLine | None:
    lines = [line for line in read_lines(RoundLine, run.path) if line.round_number == number]
    return lines[0] if len(lines) == 1 else None


def _failures(line: RoundLine | None, expected: Expected, wrong: list[str]) -> str:
    """Compare a round's line with what is expected, and return its failures in words."""
    if not line:
        wrong.append("rounds.jsonl does not have one line of this round")
        return ""
    if not line.complete:
        wrong.append("the round does not count")
    if sorted(line.participants) != sorted(expected.survivors):
        wrong.append(f"{', '.join(expected.survivors)} should have taken part")
    found = {f.site: (f.kind, f.reason) for f in line.failures}
    if set(found) != set(expected.failures):
        wrong.append(f"failures of {', '.join(expected.failures) or 'nobody'} should be told")
    for site, (kinds, words) in expected.failures.items():
        kind, reason = found.get(site, ("", ""))
        if kind not in kinds or words not in reason:
            wrong.append(f"{site}'s failure should be {' or '.join(kinds)} with {words!r}")
    return "; ".join(f"{site} ({kind}): {reason}" for site, (kind, reason) in found.items())


def _ledgers(federation: Federation, run: Run, number: int, expected: Expected, wrong: list[str]) -> str:
    words = []
    for site in sorted({*expected.survivors, *expected.failures, *expected.charges}):
        rows, wanted = charges(federation, site, run)[number], expected.charges.get(site, 1)
        words.append(f"{site} {rows}")
        if rows != wanted:
            wrong.append(f"{site}'s ledger should hold {wanted} charges of the round")
        released = len(set(map(content_of, federation.plan.kept(site, run.name, number, "reply"))))
        if rows < released:
            wrong.append(f"{site} released {released} times and was charged {rows} times")
    return ", ".join(words)


def content_of(reply: bytes) -> bytes:
    """Return what a recorded reply says, without the random bytes that make each message unlike all others."""
    record = recorddict_from_proto(ProtoRecordDict.FromString(reply))
    blocks = [block_data(array) for part in record.array_records.values() for array in part.values()]
    return b"".join([bytes(record.config_records["header"]["body"]), *blocks])  # type: ignore[arg-type]


def charges(federation: Federation, site: str, run: Run) -> Counter[int]:
    """Return how often each round of a run is in a site's ledger."""
    path = federation.sites[site].ledger
    if not path.exists():
        return Counter()
    with Ledger(path) as ledger:
        return Counter(entry.round_number for entry in ledger.entries() if entry.run == run.name)


def _difference(federation: Federation, run: Run, number: int, expected: Expected, wrong: list[str]) -> float:
    """Return the largest difference between what the survivors' replies imply and what the round led to."""
    replies = {site: federation.plan.kept(site, run.name, number, "reply") for site in expected.survivors}
    if not all(replies.values()):
        wrong.append("a survivor's reply was not recorded")
        return float("nan")
    sizes = {**SIZES, **MORE_SIZES}
    total = sum(sizes[site] for site in replies)
    mean = sum(sizes[site] / total * payload(kept[expected.reply]) for site, kept in replies.items())
    difference = max(float(np.abs(mean - after).max()) for after in _led_to(federation, run, number))
    if not difference < CLOSE:
        wrong.append("the adapter is not what the survivors' replies imply")
    return difference


def payload(record: bytes) -> NDArray[np.float64]:
    """Return the numbers of the adapter in a message as it was recorded."""
    content = recorddict_from_proto(ProtoRecordDict.FromString(record))
    return np.frombuffer(block_data(content.array_records["adapter"]["state"]), "<f4").astype(np.float64)


def masked_words(record: bytes) -> NDArray[np.uint32] | None:
    """Return the words of a masked vector in a reply as it was recorded; None if anything else is in it."""
    content = recorddict_from_proto(ProtoRecordDict.FromString(record))
    if list(content.array_records) != ["sum"]:
        return None
    return np.frombuffer(block_data(content.array_records["sum"]["words"]), "<u4").astype(np.uint32)


def _led_to(federation: Federation, run: Run, number: int) -> list[NDArray[np.float64]]:
    """Return the adapter after a round, from every place that has it, in the order in which it travels."""
    told = [task for site in federation.sites for task in federation.plan.kept(site, run.name, number + 1, "task")]
    if told:
        return [payload(task) for task in told]
    return [_checkpointed(run.path), _exported(run.path)]


def _checkpointed(path: Path) -> NDArray[np.float64]:
    with safe_open(str(path / NAME), framework="np") as file:
        order = json.loads(file.metadata()["about"])["tensors"]
        sent = sorted(
            (layer, factor, place)
            for place, (part, layer, factor) in enumerate(order)
            if part == "adapter" and (factor == "B" or layer == HEAD)
        )
        return np.concatenate([file.get_tensor(str(place)).ravel() for *_, place in sent]).astype(np.float64)


def _exported(path: Path) -> NDArray[np.float64]:
    """Return the adapter as exported for PEFT, with the head where its name sorts."""
    parts: dict[tuple[str, str], NDArray[Any]] = {}
    with safe_open(str(path / "adapter" / "adapter_model.safetensors"), framework="np") as file:
        for key in file.keys():  # noqa: SIM118
            if ".lora_B." in key:
                layer = key.removeprefix("base_model.model.").partition(".lora_B.")[0]
                parts[layer, "B"] = file.get_tensor(key)
    with safe_open(str(path / "adapter" / "head.safetensors"), framework="np") as file:
        parts |= {(HEAD, key): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return np.concatenate([parts[place].ravel() for place in sorted(parts)]).astype(np.float64)
