"""Ask a server's Fleet API whether it would let this site in, without joining.

The request is the one by which a SuperNode goes online, signed with the site's key, but with a
heartbeat interval that the server must refuse. It looks up the key before it refuses, so the answer
says whether the key is registered and the clocks agree, and the site does not go online.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum

import grpc
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto.fleet_pb2 import ActivateNodeRequest, ActivateNodeResponse

ACTIVATE = "/flwr.proto.Fleet/ActivateNode"
REFUSED_INTERVAL = 0.0


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


def ask_to_join(server: str, authority: bytes, key: ec.EllipticCurvePrivateKey, timeout: float = 10.0) -> Reply:
    """Return how the server at ``server`` (HOST:PORT) would answer this site.

    Args:
        server: the Fleet API.
        authority: the certificate authority's certificate, PEM.
        key: the site's private key; only a signature of the time goes out.
        timeout: seconds to wait.
    """
    pem = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    time = datetime.now(UTC).isoformat()
    metadata = (
        ("flwr-public-key-bin", pem),
        ("flwr-timestamp", time),
        ("flwr-signature-bin", key.sign(time.encode("ascii"), ec.ECDSA(hashes.SHA256()))),
    )
    with grpc.secure_channel(server, grpc.ssl_channel_credentials(root_certificates=authority)) as channel:
        call = channel.unary_unary(
            ACTIVATE,
            request_serializer=ActivateNodeRequest.SerializeToString,
            response_deserializer=ActivateNodeResponse.FromString,
        )
        request = ActivateNodeRequest(public_key=pem, heartbeat_interval=REFUSED_INTERVAL)
        try:
            call(request, metadata=metadata, timeout=timeout)
        except grpc.RpcError as error:
            return _understood(error.code(), error.details() or "")
    return Reply(Answer.OTHER, "it let this check go online, which it must not")


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
