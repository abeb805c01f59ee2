"""Ask a server's Fleet API whether it would let a site in, without joining.

The request is the one by which a SuperNode goes online, signed with the site's key, but with a
heartbeat interval that the server must refuse. It looks up the key before it refuses, so the answer
says whether the key is registered and the clocks agree, and the site does not go online.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from typing import Any

import grpc
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    ActivateNodeResponse,
    RegisterNodeFleetRequest,
    RegisterNodeFleetResponse,
    UnregisterNodeFleetRequest,
    UnregisterNodeFleetResponse,
)

from fedveil.deploy.road import Road

ACTIVATE = "/flwr.proto.Fleet/ActivateNode"
REGISTER = "/flwr.proto.Fleet/RegisterNode"
UNREGISTER = "/flwr.proto.Fleet/UnregisterNode"
AUTHENTICATED = "authentication is enabled"
"""What a server says that registers no key by the Fleet API."""
REFUSED_INTERVAL = 0.0
PATIENCE = 10.0
"""Seconds that an answer is waited for."""


class Answer(Enum):
    """What the server said."""

    REGISTERED = "the server knows this site's key"
    UNKNOWN_KEY = "the server does not know this site's key"
    CLOCK = "the server refuses the time of this site's clock"
    UNREACHABLE = "the server does not answer"
    OTHER = "the server gave another answer"


@dataclass(frozen=True)
class Reply:
    """The answer, and the server's own words."""

    answer: Answer
    words: str


def ask_to_join(server: str, authority: bytes, key: ec.EllipticCurvePrivateKey, road: Road) -> Reply:
    """Return how the server at HOST:PORT, with a certificate of the authority (PEM), would answer this site.

    Of the site's private key only a signature of the time goes out.
    """
    with _channel(server, authority, road) as channel:
        try:
            request = ActivateNodeRequest(public_key=_pem(key), heartbeat_interval=REFUSED_INTERVAL)
            _call(channel, ACTIVATE, request, ActivateNodeResponse, key)
        except grpc.RpcError as error:
            return _understood(error.code(), error.details() or "")
    return Reply(Answer.OTHER, "it let this check go online, which it must not")


def asks_for_keys(server: str, authority: bytes) -> bool | None:
    """Return whether the server at ``server`` turns away an unregistered key; None: unknown.

    The server is one of this machine, dialled past every proxy. A fresh key tries to register, which a server that
    demands keys refuses to all. A server that accepts it gets a request to forget it; the key never goes online.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    with _channel(server, authority, Road()) as channel:
        try:
            request = RegisterNodeFleetRequest(public_key=_pem(key))
            taken = _call(channel, REGISTER, request, RegisterNodeFleetResponse, key)
        except grpc.RpcError as error:
            refused = error.code() == grpc.StatusCode.FAILED_PRECONDITION and AUTHENTICATED in (error.details() or "")
            return True if refused else None
        with suppress(grpc.RpcError):
            forget = UnregisterNodeFleetRequest(node_id=taken.node_id)
            _call(channel, UNREGISTER, forget, UnregisterNodeFleetResponse, key)
    return False


def _channel(server: str, authority: bytes, road: Road) -> grpc.Channel:
    credentials = grpc.ssl_channel_credentials(root_certificates=authority)
    return grpc.secure_channel(server, credentials, road.channel_options)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def _call(channel: grpc.Channel, path: str, request: Any, answer: Any, key: ec.EllipticCurvePrivateKey) -> Any:
    """Send one request, with the time signed by ``key``, as every call of a SuperNode is."""
    time = datetime.now(UTC).isoformat()
    metadata = (
        ("flwr-public-key-bin", _pem(key)),
        ("flwr-timestamp", time),
        ("flwr-signature-bin", key.sign(time.encode("ascii"), ec.ECDSA(hashes.SHA256()))),
    )
    call = channel.unary_unary(
        path, request_serializer=type(request).SerializeToString, response_deserializer=answer.FromString
    )
    return call(request, metadata=metadata, timeout=PATIENCE)


def _understood(code: grpc.StatusCode, words: str) -> Reply:
    words = " ".join(words.split())
    if code == grpc.StatusCode.UNAUTHENTICATED and "timestamp" in words:
        return Reply(Answer.CLOCK, words)
    if code == grpc.StatusCode.INVALID_ARGUMENT:
        return Reply(Answer.REGISTERED, words)
    if code == grpc.StatusCode.FAILED_PRECONDITION:
        return Reply(Answer.UNKNOWN_KEY, words)
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
        return Reply(Answer.UNREACHABLE, words)
    return Reply(Answer.OTHER, f"{code.name}: {words}")
