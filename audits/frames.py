"""A packet capture as TCP streams, counted layer by layer, and whether a stream is TLS from its first byte."""

from __future__ import annotations

import socket
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import dpkt

from fedveil.common.errors import DataError

HANDSHAKE, CHANGE_CIPHER, ALERT, APPLICATION = 22, 20, 21, 23
RECORD_HEADER = 5
LONGEST_RECORD = 2**14 + 256
"""Bytes of a TLS 1.3 record behind its header (RFC 8446, 5.2)."""
CLEAR_IN_TLS13 = frozenset({1, 2})
"""Handshake messages that TLS 1.3 sends in the clear: the two hellos. The server's certificate is encrypted."""
TLS13_VERSION = b"\x00\x2b\x00\x02\x03\x04"
"""The server hello's extension supported_versions that says 1.3."""


@dataclass
class Stream:
    """One direction of one TCP connection, put in order."""

    source: str
    target: str
    data: bytes = b""
    missing: str = ""
    """What the capture lacks of it; empty if it is whole."""
    target_port: int = 0
    source_port: int = 0


@dataclass
class Capture:
    """What was captured on one interface."""

    frames: int = 0
    wire_bytes: int = 0
    """Whole frames, Ethernet headers included."""
    tcp_frames: int = 0
    tcp_wire_bytes: int = 0
    tcp_payload_bytes: int = 0
    """Repeated segments count again."""
    others: Counter[str] = field(default_factory=Counter)
    """Frames that are no TCP, by kind."""
    streams: list[Stream] = field(default_factory=list)


@dataclass
class _Half:
    """Segments of one direction by their distance from its first byte."""

    first: int
    segments: dict[int, bytes] = field(default_factory=dict)


def read_capture(path: Path) -> Capture:
    """Read a file that ``tcpdump -w`` wrote on an Ethernet interface.

    Raises:
        DataError: it is missing, or no such file.
    """
    capture, halves = Capture(), dict[tuple[bytes, int, bytes, int], _Half]()
    try:
        with path.open("rb") as file:
            reader = dpkt.pcap.Reader(file)
            if reader.datalink() != dpkt.pcap.DLT_EN10MB:
                raise DataError(f"{path} was not captured on an Ethernet interface: name a bridge or a veth")
            for _, frame in reader:
                _add(capture, halves, frame)
    except (OSError, ValueError, dpkt.UnpackError) as error:
        raise DataError(f"{path} is no capture of tcpdump: {error}") from error
    capture.streams += [_ordered(ends, half) for ends, half in halves.items()]
    return capture


def _add(capture: Capture, halves: dict[tuple[bytes, int, bytes, int], _Half], frame: bytes) -> None:
    capture.frames += 1
    capture.wire_bytes += len(frame)
    packet = dpkt.ethernet.Ethernet(frame).data
    segment = getattr(packet, "data", None)
    if not isinstance(segment, dpkt.tcp.TCP):
        capture.others[type(segment if isinstance(segment, dpkt.Packet) else packet).__name__] += 1
        return
    capture.tcp_frames += 1
    capture.tcp_wire_bytes += len(frame)
    capture.tcp_payload_bytes += len(segment.data)
    ends = (packet.src, segment.sport, packet.dst, segment.dport)
    if segment.flags & dpkt.tcp.TH_SYN:
        first = (segment.seq + 1) % 2**32
        if ends in halves and halves[ends].first != first:  # the same port once more: a connection of its own
            capture.streams.append(_ordered(ends, halves.pop(ends)))
        halves.setdefault(ends, _Half(first))
        return
    half = halves.setdefault(ends, _Half(-1))
    if segment.data:
        place = (segment.seq - half.first) % 2**32
        half.segments[place] = max(half.segments.get(place, b""), bytes(segment.data), key=len)


def _ordered(ends: tuple[bytes, int, bytes, int], half: _Half) -> Stream:
    source, source_port, target, target_port = ends
    stream = Stream(
        _address(source, source_port),
        _address(target, target_port),
        target_port=target_port,
        source_port=source_port,
    )
    parts, length = list[bytes](), 0
    for place, data in sorted(half.segments.items()):
        if half.first < 0:
            stream.missing = "its beginning"
        elif place > length and place < 2**31:
            stream.missing = stream.missing or f"{place - length} bytes after byte {length}"
        new = data if stream.missing else data[max(0, length - place) :] if place < 2**31 else b""
        parts.append(new)
        length = max(length, place + len(data)) if place < 2**31 else length
    stream.data = b"".join(parts)
    return stream


def _address(address: bytes, port: int) -> str:
    family = socket.AF_INET if len(address) == 4 else socket.AF_INET6
    return f"{socket.inet_ntop(family, address)}:{port}"


@dataclass(frozen=True)
class Records:
    """The TLS records of one stream."""

    fault: str = ""
    """Why the stream is not TLS 1.3 from its first to its last byte; empty if it is."""
    application: int = 0
    """Number of encrypted records."""
    application_bytes: int = 0
    """What they carry: without record headers, authentication tags and the byte of the content's type."""
    handshake_bytes: int = 0
    """Everything before the first encrypted record."""


SEALED = 17
"""Bytes of tag and content type in every encrypted record."""


def tls_records(data: bytes) -> Records:
    """Walk through the TLS records of one direction of a connection.

    A connection that was cut may end in the middle of a record; nothing else may stand outside of one.
    """
    at, count, carried, before = 0, 0, 0, 0
    while at < len(data):
        kind, version, length = data[at], data[at + 1 : at + 3], int.from_bytes(data[at + 3 : at + 5], "big")
        if len(data) - at < RECORD_HEADER and kind in (CHANGE_CIPHER, ALERT, HANDSHAKE, APPLICATION):
            break
        if version not in (b"\x03\x01", b"\x03\x03") or not 0 < length <= LONGEST_RECORD:
            return Records(f"byte {at} begins no TLS record")
        body = data[at + RECORD_HEADER : at + RECORD_HEADER + length]
        if kind == HANDSHAKE:
            if count:
                return Records(f"byte {at}: a handshake in clear text after encrypted records")
            if len(body) < length:
                break
            if body[0] not in CLEAR_IN_TLS13 or (body[0] == 2 and TLS13_VERSION not in body):
                return Records(f"byte {at}: a handshake of TLS before 1.3, which shows certificates")
        elif kind == APPLICATION:
            if not before:
                return Records("it begins without a handshake")
            count += 1
            carried += max(0, length - SEALED)
        elif kind not in (CHANGE_CIPHER, ALERT):
            return Records(f"byte {at} begins no TLS record")
        if kind != APPLICATION:
            before += RECORD_HEADER + length
        at += RECORD_HEADER + length
    return Records("", count, carried, before)
