"""Calls of the Fleet API by gRPC, as Flower 1.39 has it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from cryptography.hazmat.primitives.asymmetric import ec

from fedveil.deploy.fleet_answers import PATIENCE, Answer, Call, NotAnswered, signed_now
from fedveil.deploy.node_keys import pem_of, signature
from fedveil.deploy.road import Road

AUTHENTICATED = "authentication is enabled"
"""What a server says that registers no key by the Fleet API."""


@contextmanager
def calls(server: str, authority: bytes, road: Road) -> Iterator[Call]:
    """Yield what calls the server at HOST:PORT, with a certificate of the authority (PEM), by this road."""
    credentials = grpc.ssl_channel_credentials(root_certificates=authority)
    with grpc.secure_channel(server, credentials, road.channel_options) as channel:

        def call(method: str, request: Any, answer: Any, key: ec.EllipticCurvePrivateKey) -> Any:
            time = signed_now()
            metadata = (
                ("flwr-public-key-bin", pem_of(key)),
                ("flwr-timestamp", time),
                ("flwr-signature-bin", signature(key, time)),
            )
            send = channel.unary_unary(
                f"/flwr.proto.Fleet/{method}",
                request_serializer=type(request).SerializeToString,
                response_deserializer=answer.FromString,
            )
            try:
                return send(request, metadata=metadata, timeout=PATIENCE)
            except grpc.RpcError as error:
                raise _understood(error.code(), error.details() or "") from error

        yield call


def _understood(code: grpc.StatusCode, words: str) -> NotAnswered:
    if code == grpc.StatusCode.UNAUTHENTICATED and "timestamp" in words:
        return NotAnswered(Answer.CLOCK, words)
    if code == grpc.StatusCode.INVALID_ARGUMENT:
        return NotAnswered(Answer.REGISTERED, words)
    if code == grpc.StatusCode.FAILED_PRECONDITION:
        return NotAnswered(Answer.UNKNOWN_KEY, words, registers_none=AUTHENTICATED in words)
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
        return NotAnswered(Answer.UNREACHABLE, words)
    return NotAnswered(Answer.OTHER, f"{code.name}: {words}")
