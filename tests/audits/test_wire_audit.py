"""The audit of the wire finds clear text, private pieces and missing frames that are planted in captures."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import dpkt
import pytest
import torch

from audits import wire
from audits.frames import TLS13_VERSION, Capture, read_capture, tls_records
from audits.needles import WIDTH, find, needles_of_tensors, needles_of_texts
from audits.wire_findings import Heard, clear_text, private_pieces, traffic
from fedveil.common.errors import DataError

pytestmark = pytest.mark.rough_prices

SITE, SERVER = (b"\x0a\x00\x00\x03", 40000), (b"\x0a\x00\x00\x02", 9092)
TEXT = "the plot is thin but the two leads carry it with charm to spare"


def record(kind: int, body: bytes) -> bytes:
    return bytes([kind, 3, 3]) + len(body).to_bytes(2, "big") + body


CLIENT_HELLO = record(22, b"\x01" + bytes(60))
SERVER_HELLO = record(22, b"\x02" + bytes(40) + TLS13_VERSION + bytes(10))


def sealed(content: bytes) -> bytes:
    """Return an encrypted record; the test's cipher is a mask."""
    return record(23, bytes(byte ^ 0x5A for byte in content) + bytes(17))


@dataclass
class Wire:
    """Writes a capture, frame by frame."""

    frames: list[bytes] = field(default_factory=list)

    def tcp(self, source: tuple[bytes, int], target: tuple[bytes, int], seq: int, data: bytes, flags: int = 16) -> None:
        segment = dpkt.tcp.TCP(sport=source[1], dport=target[1], seq=seq % 2**32, flags=flags, data=data)
        packet = dpkt.ip.IP(src=source[0], dst=target[0], p=dpkt.ip.IP_PROTO_TCP, data=segment)
        packet.len = len(packet)
        self.frames.append(bytes(dpkt.ethernet.Ethernet(data=packet, type=dpkt.ethernet.ETH_TYPE_IP)))

    def connection(self, up: Sequence[bytes], down: Sequence[bytes], first: int = 1000) -> Wire:
        for source, target, parts in ((SITE, SERVER, up), (SERVER, SITE, down)):
            self.tcp(source, target, first, b"", dpkt.tcp.TH_SYN)
            at = first + 1
            for part in parts:
                self.tcp(source, target, at, part)
                at += len(part)
        return self

    def save(self, folder: Path) -> Path:
        path = folder / "site-1.pcap"
        with path.open("wb") as file:
            writer = dpkt.pcap.Writer(file)
            for number, frame in enumerate(self.frames):
                writer.writepkt(frame, ts=number)
        return path


def whole() -> Wire:
    up = [CLIENT_HELLO, record(20, b"\x01") + sealed(b"polls"), sealed(b"adapter" * 40)]
    return Wire().connection(up, [SERVER_HELLO, sealed(b"answers")])


def test_a_federation_over_tls_passes(tmp_path: Path) -> None:
    capture = read_capture(whole().save(tmp_path))
    finding = clear_text({"site-1": capture})
    assert finding.passed, finding.figures
    assert finding.figures["TLS records"] == 3
    assert finding.figures["connections to the Fleet port"] == 1
    assert capture.wire_bytes == sum(map(len, whole().frames))
    assert capture.tcp_payload_bytes == sum(len(stream.data) for stream in capture.streams)


def test_segments_are_put_in_order_also_where_sequence_numbers_wrap(tmp_path: Path) -> None:
    parts = [CLIENT_HELLO, sealed(b"one"), sealed(b"two"), sealed(b"three")]
    made = Wire().connection(parts, [SERVER_HELLO], first=2**32 - 80)
    made.frames[2], made.frames[4] = made.frames[4], made.frames[2]
    made.frames.append(made.frames[3])  # sent twice
    made.tcp(SITE, SERVER, 2**32 - 80 + len(b"".join(parts)), b"\0")  # keep-alive: the last byte again
    capture = read_capture(made.save(tmp_path))
    assert capture.streams[0].data == b"".join(parts)
    assert clear_text({"site-1": capture}).passed


def test_a_port_that_is_used_again_is_another_connection(tmp_path: Path) -> None:
    made = whole()
    made.frames += Wire().connection([CLIENT_HELLO, sealed(b"again")], [SERVER_HELLO], first=777_000).frames
    capture = read_capture(made.save(tmp_path))
    assert len(capture.streams) == 4
    assert clear_text({"site-1": capture}).figures["connections to the Fleet port"] == 2


CLEAR = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + TEXT.encode()


@pytest.mark.parametrize(
    ("up", "says"),
    [
        ([CLEAR], "byte 0 begins no TLS record"),
        ([CLIENT_HELLO, sealed(b"polls"), CLEAR], f"byte {len(CLIENT_HELLO + sealed(b'polls'))} begins no TLS record"),
        ([CLIENT_HELLO, record(22, b"\x0b" + bytes(900))], "which shows certificates"),
        ([record(22, b"\x02" + bytes(90))], "which shows certificates"),
        ([CLIENT_HELLO, sealed(b"x"), CLIENT_HELLO], "a handshake in clear text after encrypted records"),
        ([sealed(b"x")], "it begins without a handshake"),
        ([CLIENT_HELLO, bytes([23, 3, 3, 255, 255]) + bytes(70_000)], "begins no TLS record"),
    ],
)
def test_clear_text_in_a_stream_is_found(tmp_path: Path, up: list[bytes], says: str) -> None:
    pieces = [part[at : at + 60_000] for part in up for at in range(0, len(part), 60_000)]
    finding = clear_text({"site-1": read_capture(Wire().connection(pieces, [SERVER_HELLO]).save(tmp_path))})
    assert not finding.passed
    assert says in str(finding.figures["first"])


def test_a_record_that_is_cut_off_by_the_end_is_no_fault() -> None:
    whole_stream = CLIENT_HELLO + sealed(b"x" * 100)
    for end in range(1, len(whole_stream)):
        assert tls_records(whole_stream[:end]).fault == "", end


def test_frames_that_are_no_tcp_and_other_ports_are_found(tmp_path: Path) -> None:
    made = whole()
    packet = dpkt.ip.IP(src=SITE[0], dst=SERVER[0], p=17, data=dpkt.udp.UDP(sport=1, dport=53, data=TEXT.encode()))
    packet.len = len(packet)
    made.frames.append(bytes(dpkt.ethernet.Ethernet(data=packet, type=dpkt.ethernet.ETH_TYPE_IP)))
    finding = clear_text({"site-1": read_capture(made.save(tmp_path))})
    assert (finding.passed, finding.figures["first"]) == (False, "site-1: 1 frames of UDP")
    made = whole()
    made.tcp(SITE, (SERVER[0], 8000), 5, b"", dpkt.tcp.TH_SYN)
    finding = clear_text({"site-1": read_capture(made.save(tmp_path))})
    assert not finding.passed
    assert "not the Fleet port" in str(finding.figures["first"])


@pytest.mark.parametrize(("lost", "says"), [(0, "its beginning"), (2, "bytes after byte")])
def test_a_capture_with_a_hole_does_not_pass(tmp_path: Path, lost: int, says: str) -> None:
    made = whole()
    del made.frames[lost]
    finding = clear_text({"site-1": read_capture(made.save(tmp_path))})
    assert not finding.passed
    assert says in str(finding.figures["first"])


def test_a_capture_of_nothing_does_not_pass() -> None:
    assert not clear_text({"site-1": Capture()}).passed


def test_what_is_no_capture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.pcap").write_bytes(b"nothing of the kind, but long enough")
    with pytest.raises(DataError, match="no capture"):
        read_capture(tmp_path / "a.pcap")
    with pytest.raises(DataError, match="no capture"):
        read_capture(tmp_path / "b.pcap")


NOISE = bytes(torch.randint(0, 256, (20_000,), generator=torch.Generator().manual_seed(3)).tolist())
WEIGHTS = torch.randn(40, 30, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("at", [0, 1, 7, 9_991])
def test_a_piece_of_a_text_is_found_at_any_offset(at: int) -> None:
    needles = needles_of_texts([TEXT, "short"])
    assert find(NOISE, needles) == []
    for start in range(len(TEXT) - 31):
        assert find(NOISE[:at] + TEXT[start : start + 31].encode() + NOISE[at:], needles), start


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("at", [0, 3, 8_888])
def test_a_run_of_weights_is_found_in_every_precision(kind: torch.dtype, at: int) -> None:
    needles = needles_of_tensors([WEIGHTS, torch.arange(100)])
    assert find(NOISE, needles) == []
    run = WEIGHTS.view(-1)[101 : 101 + 47].to(kind).view(torch.uint8).numpy().tobytes()
    assert find(NOISE[:at] + run + NOISE[at:], needles)


def test_zeros_and_ones_are_nobodys_weights() -> None:
    needles = needles_of_tensors([torch.zeros(500), torch.ones(500)])
    assert len(needles) == 0
    assert find(bytes(5_000), needles) == []


def test_planted_pieces_fail_the_finding_and_the_planted_control_is_found() -> None:
    texts, weights = needles_of_texts([TEXT]), needles_of_tensors([WEIGHTS])
    clean = private_pieces([NOISE, NOISE[:50]], texts, weights)
    assert [finding.passed for finding in clean] == [True] * 4
    leak = NOISE[:77] + TEXT.encode() + NOISE[77:300] + WEIGHTS.numpy().tobytes() + NOISE[300:]
    found = private_pieces([NOISE, leak], texts, weights)
    assert [finding.passed for finding in found[::2]] == [False, False]
    assert not private_pieces([], texts, weights)[0].passed, "nothing was searched"
    assert texts.shape[1] * 8 == WIDTH


def test_the_ratio_is_that_of_the_counters_and_they_must_agree_with_the_capture(tmp_path: Path) -> None:
    capture = read_capture(whole().save(tmp_path))
    total = capture.wire_bytes
    heard = [Heard("site-1", tmp_path, total - 100, 100)]
    finding = traffic(heard, [capture, Capture()], payload=280, bundle=90, seconds=30, quiet_seconds=60)
    assert finding.passed
    assert finding.figures["bytes on the wire / payload"] == pytest.approx((total - 100) / 280)
    assert finding.figures["bundles, one a site"] == 90, "a network without a site has none"
    assert finding.figures["bytes on the wire / (payload + bundles + idle)"] == pytest.approx(
        (total - 100) / (280 + 90 + 50)
    )
    parts = [value for name, value in finding.figures.items() if name.startswith("all the time: ")]
    hellos = len(CLIENT_HELLO) + len(SERVER_HELLO) + len(record(20, b"\x01"))
    assert parts[1:] == [hellos, 3 * 22, len(b"polls" + b"adapter" * 40 + b"answers")]
    assert sum(int(part) for part in parts) == total
    missed = [Heard("site-1", tmp_path, total, total)]
    assert not traffic(missed, [capture], payload=280, bundle=90, seconds=30, quiet_seconds=60).passed


def test_a_bridges_counter_is_read_with_the_headers_that_it_leaves_out() -> None:
    table = (
        "Inter-|   Receive\n face |bytes\n  br-a1:  1000 10 0 0 0 0 0 0  200 2 0 0 0 0 0 0\n    lo: 7 1 0 0 0 0 0 0 7 1"
    )
    assert wire.counted(table, "br-a1") == 1000 + 10 * 14 + 200
    with pytest.raises(wire.CannotListen, match="no interface br-b2"):
        wire.counted(table, "br-b2")


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(wire.CannotListen, match="only root"):
        wire.listen(tmp_path / "new")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(wire.CannotListen, match="there is no tcpdump"):
        wire.listen(tmp_path / "new")
    for name in ("tcpdump", "docker"):
        stand_in(tmp_path, name, "echo it does not work >&2; exit 1")
    with pytest.raises(wire.CannotListen, match="is there already"):
        wire.listen(tmp_path)
    with pytest.raises(wire.CannotListen, match="docker compose up --no-start failed: it does not work"):
        wire.listen(tmp_path / "new")


def stand_in(folder: Path, name: str, script: str) -> None:
    """Put a program of this name on a PATH that begins with the folder."""
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


TCPDUMP = 'trap "echo {dropped} packets dropped by kernel >&2; exit 0" TERM; {first}; sleep 60 & wait'


@pytest.mark.parametrize(
    ("dropped", "first", "says"),
    [
        (0, "echo listening on br-a1 >&2", ""),
        (7, "echo listening on br-a1 >&2", "tcpdump lost frames of br-a1"),
        (0, "echo no such device >&2; exit 1", "does not listen on br-a1: no such device"),
    ],
)
def test_a_capture_begins_before_the_body_and_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dropped: int, first: str, says: str
) -> None:
    stand_in(tmp_path, "tcpdump", TCPDUMP.format(dropped=dropped, first=first))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    reached = []
    outcome = pytest.raises(wire.CannotListen, match=says) if says else nullcontext()
    with outcome, wire.captured("br-a1", tmp_path / "site-1.pcap"):
        reached.append("listening" in (tmp_path / "site-1.log").read_text())
    assert reached == ([] if "no such device" in first else [True])


def test_bridges_are_those_of_the_sites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    networks = [
        {"Id": f"{name}0123456789abcdef".replace("-", "e"), "Labels": {"com.docker.compose.network": name}}
        for name in ("site-2", "control", "site-1")
    ]
    (tmp_path / "networks.json").write_text(json.dumps(networks))
    stand_in(tmp_path, "docker", f'case "$2" in ls) echo a b c;; inspect) cat {tmp_path}/networks.json;; esac')
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert wire.bridges_of("fedveil") == {"site-1": "br-sitee1012345", "site-2": "br-sitee2012345"}
    stand_in(tmp_path, "docker", "true")
    with pytest.raises(wire.CannotListen, match="no network of a site"):
        wire.bridges_of("fedveil")
