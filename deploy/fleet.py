"""Ask a server's Fleet API whether it would let a site in, without joining.

The request is the one by which a SuperNode goes online, signed with the site's key, but with a
heartbeat interval that the server must refuse. It looks up the key before it refuses, so the answer
says whether the key is registered and the clocks agree, and the site does not go online.
"""

from __future__ import annotations

from contextlib import suppress

from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    ActivateNodeResponse,
    RegisterNodeFleetRequest,
    RegisterNodeFleetResponse,
    UnregisterNodeFleetRequest,
    UnregisterNodeFleetResponse,
)

from fedveil.deploy import fleet_grpc, fleet_http
from fedveil.deploy.fleet_answers import Answer, NotAnswered, Reply
from fedveil.deploy.node_keys import pem_of
from fedveil.deploy.road import Road
from fedveil.deploy.transport import IS_HTTP

REFUSED_INTERVAL = 0.0


def ask_to_join(server: str, authority: bytes, key: ec.EllipticCurvePrivateKey, road: Road) -> Reply:
    """Return how the server at HOST:PORT, with a certificate of the authority (PEM), would answer this site.

    Of the site's private key only a signature of the time goes out.
    """
    request = ActivateNodeRequest(public_key=pem_of(key), heartbeat_interval=REFUSED_INTERVAL)
    try:
        with _calls(server, authority, road) as call:
            call("ActivateNode", request, ActivateNodeResponse, key)
    except NotAnswered as error:
        return error.reply
    return Reply(Answer.OTHER, "it let this check go online, which it must not")


def asks_for_keys(server: str, authority: bytes) -> bool | None:
    """Return whether the server at ``server`` turns away an unregistered key; None: unknown.

    The server is one of this machine, dialled past every proxy. A fresh key tries to register, which a server that
    demands keys refuses to all. A server that accepts it gets a request to forget it; the key never goes online.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    with _calls(server, authority, Road()) as call:
        try:
            request = RegisterNodeFleetRequest(public_key=pem_of(key))
            taken = call("RegisterNode", request, RegisterNodeFleetResponse, key)
        except NotAnswered as error:
            return True if error.registers_none else None
        with suppress(NotAnswered):
            forget = UnregisterNodeFleetRequest(node_id=taken.node_id)
            call("UnregisterNode", forget, UnregisterNodeFleetResponse, key)
    return False


_calls = fleet_http.calls if IS_HTTP else fleet_grpc.calls
