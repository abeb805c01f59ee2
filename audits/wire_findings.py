"""The findings in captures of the sites' networks: clear text, private pieces, and bytes by what they are for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from audits.finding import SOUND
from audits.frames import SEALED, Capture, Stream, read_capture, tls_records
from audits.needles import Needles, find, needles_of_tensors, needles_of_texts
from fedveil.common.data.sources import train_and_test
from fedveil.common.findings import Finding
from fedveil.common.model.base import load_base_model
from fedveil.common.run_lines import ConfigFile, RoundLine, read_file, read_lines
from fedveil.common.tasks.text import TextExample
from fedveil.strategies.job import configure

FLEET_PORT = 9092
HARMLESS = frozenset({"ARP", "ICMP6", "IGMP"})
"""Frames by which a network finds its addresses and groups; no process of ours sends them."""
TOLERANCE = 0.01
"""How far the interfaces' counters and the captures may differ: frames at either end of the span."""


@dataclass(frozen=True)
class Heard:
    """One site's network, as captured and as counted by the interface itself."""

    site: str
    capture: Path
    job_bytes: int
    """Counted from the start of the containers to the end of the job."""
    quiet_bytes: int
    """Counted in the quiet time after it."""


def findings_of(heard: Sequence[Heard], run: Path, bundle: int, seconds: float, quiet_seconds: float) -> list[Finding]:
    """Return the findings about a run.

    Args:
        heard: one for each site's network.
        run: the run's folder.
        bundle: bytes of the bundle of code that every site fetches once.
        seconds: from the start of the containers to the end of the job.
        quiet_seconds: how long the quiet time was.

    Raises:
        DataError: a capture or a file of the run cannot be read.
    """
    captures = {one.site: read_capture(one.capture) for one in heard}
    config = configure(read_file(ConfigFile, run).settings).config
    train, _ = train_and_test(config.data, config.model.task)
    texts = needles_of_texts(
        t for e in train.examples if isinstance(e, TextExample) for t in (e.text, e.text_pair, e.completion) if t
    )
    weights = needles_of_tensors(load_base_model(config.model.name, config.model.task).module.state_dict().values())
    payload = sum(line.bytes_down + line.bytes_up for line in read_lines(RoundLine, run))
    streams = [stream for capture in captures.values() for stream in capture.streams]
    return [
        clear_text(captures),
        *private_pieces([stream.data for stream in streams], texts, weights),
        traffic(heard, captures.values(), payload, bundle, seconds, quiet_seconds),
    ]


def clear_text(captures: dict[str, Capture]) -> Finding:
    """Return whether every frame of every network is TLS 1.3 to the Fleet port, or harmless."""
    faults, records, connections = list[str](), 0, 0
    for site, capture in captures.items():
        faults += [f"{site}: {n} frames of {kind}" for kind, n in capture.others.items() if kind not in HARMLESS]
        for stream in capture.streams:
            connections += stream.target_port == FLEET_PORT
            found = tls_records(stream.data)
            records += found.application
            if fault := _port_fault(stream) or stream.missing or found.fault:
                faults.append(f"{site}: {stream.source} to {stream.target}: {fault}")
    figures = {
        "frames": sum(capture.frames for capture in captures.values()),
        "connections to the Fleet port": connections,
        "TLS records": records,
        "in clear text": len(faults),
    }
    passed = not faults and records > 0
    return Finding("clear text on the wire", SOUND, False, passed, {**figures, **_first(faults)})


def private_pieces(streams: Sequence[bytes], texts: Needles, weights: Needles) -> list[Finding]:
    """Return whether any stream holds a piece of a text or of the weights, and whether a planted one is found."""
    findings = []
    for what, needles in (("training texts", texts), ("base-model weights", weights)):
        hits = sum(len(find(stream, needles)) for stream in streams)
        figures: dict[str, int | float | str] = {
            "pieces looked for": len(needles),
            "bytes searched": sum(len(stream) for stream in streams),
            "found": hits,
        }
        searched = len(needles) > 0 and any(streams)
        findings.append(
            Finding(f"{what} on the wire", SOUND, False, searched and not hits, figures),
        )
        longest = max(streams, key=len, default=b"")
        middle = len(longest) // 2
        planted = longest[:middle] + needles[len(needles) // 2 :][:1].tobytes() + longest[middle:]
        seen = find(planted, needles)
        case = "one piece in the longest stream"
        findings.append(Finding(f"{what} on the wire", case, True, seen == [middle], {"found": len(seen)}))
    return findings


def traffic(
    heard: Sequence[Heard],
    captures: Iterable[Capture],
    payload: int,
    bundle: int,
    seconds: float,
    quiet_seconds: float,
) -> Finding:
    """Return the bytes on the wire against ``payload``, the tensors of rounds.jsonl, and what the rest is.

    Idle nodes ask for work every few seconds; what they send in the job's time is taken from the quiet time.

    It fails if counters and captures disagree, for then one of them missed something.
    """
    captures = list(captures)
    counted = sum(one.job_bytes + one.quiet_bytes for one in heard)
    job = sum(one.job_bytes for one in heard)
    idle = sum(one.quiet_bytes for one in heard) / quiet_seconds * seconds
    captured = sum(capture.wire_bytes for capture in captures)
    bundles = bundle * sum(bool(capture.streams) for capture in captures)
    carried = sum(capture.tcp_payload_bytes for capture in captures)
    records = [tls_records(stream.data) for capture in captures for stream in capture.streams]
    content = sum(r.application_bytes for r in records)
    hellos = sum(r.handshake_bytes for r in records)
    sealed = sum(r.application for r in records)
    figures: dict[str, int | float | str] = {
        "counted by the interfaces, all the time": counted,
        "captured by tcpdump, all the time": captured,
        "until the job's end": job,
        "adapter payload of rounds.jsonl": payload,
        "bytes on the wire / payload": _ratio(job, payload),
        "bundles, one a site": bundles,
        "idle nodes would have sent in the job's time": round(idle),
        "bytes on the wire / (payload + bundles + idle)": _ratio(job, payload + bundles + idle),
        "all the time: frames without TCP's payload": captured - carried,
        "all the time: TLS hellos": hellos,
        "all the time: TLS record headers and tags": sealed * (5 + SEALED),
        "all the time: encrypted content": content,
    }
    agree = abs(counted - captured) <= TOLERANCE * captured
    return Finding("bytes on the wire", SOUND, False, agree and captured > 0, figures)


def _ratio(value: float, of: float) -> float:
    return value / of if of else float("inf")


def _port_fault(stream: Stream) -> str:
    return "" if FLEET_PORT in (stream.target_port, stream.source_port) else "not the Fleet port"


def _first(faults: Sequence[str]) -> dict[str, int | float | str]:
    return {"first": faults[0]} if faults else {}
