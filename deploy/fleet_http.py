"""Calls of the Fleet API by HTTP, as Flower has it from 1.40 on, behind the server's front door."""

from __future__ import annotations

import re
import ssl
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any

import httpx
from cryptography.hazmat.primitives.asymmetric import ec

from fedveil.deploy.fleet_answers import PATIENCE, Answer, Call, NotAnswered, signed_now
from fedveil.deploy.node_keys import pem_of, signature
from fedveil.deploy.road import Road

PROTOBUF = "application/protobuf"
REGISTERS_NONE, WRONG_INTERVAL, NOT_ACTIVATED = 2001, 2003, 2004
"""Codes of Flower's errors (``flwr.supercore.error.ApiErrorCode``)."""
AHEAD, BEHIND = 5.0, 300.0
"""Seconds by which a site's clock may differ from the server's."""


@contextmanager
def calls(server: str, authority: bytes, road: Road) -> Iterator[Call]:
    """Yield what calls the server at HOST:PORT, with a certificate of the authority (PEM), by this road."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=authority.decode("ascii"))
    base, proxy = f"https://{server}", road.proxy.url if road.proxy else None
    with httpx.Client(base_url=base, verify=context, proxy=proxy, trust_env=False, timeout=PATIENCE) as client:
        yield partial(_call, client)


def _call(client: httpx.Client, method: str, request: Any, answer: Any, key: ec.EllipticCurvePrivateKey) -> Any:
    time, path = signed_now(), "/v1/fleet/" + re.sub(r"(?<!^)(?=[A-Z])", "-", method).lower()
    headers = {
        "content-type": PROTOBUF,
        "accept": PROTOBUF,
        "flwr-public-key": b64encode(pem_of(key)).decode(),
        "flwr-timestamp": time,
        "flwr-signature": b64encode(signature(key, time)).decode(),
    }
    try:
        found = client.post(path, content=request.SerializeToString(), headers=headers)
    except httpx.HTTPError as error:
        raise NotAnswered(Answer.UNREACHABLE, str(error)) from error
    if found.is_success:
        return answer.FromString(found.content)
    raise _understood(found)


def _understood(found: httpx.Response) -> NotAnswered:
    try:
        told = found.json()
        code, words = told.get("code"), str(told.get("detail"))
    except (ValueError, AttributeError):
        code, words = None, found.text[:200]
    if code == WRONG_INTERVAL:
        return NotAnswered(Answer.REGISTERED, words)
    if code in (REGISTERS_NONE, NOT_ACTIVATED):
        return NotAnswered(Answer.UNKNOWN_KEY, words, registers_none=code == REGISTERS_NONE)
    if found.status_code == httpx.codes.UNAUTHORIZED and not -AHEAD < _behind(found) < BEHIND:
        return NotAnswered(Answer.CLOCK, words)
    if found.status_code in (httpx.codes.BAD_GATEWAY, httpx.codes.SERVICE_UNAVAILABLE, httpx.codes.GATEWAY_TIMEOUT):
        return NotAnswered(Answer.UNREACHABLE, words or f"{found.status_code}")
    return NotAnswered(Answer.OTHER, f"{found.status_code}: {words}")


def _behind(found: httpx.Response) -> float:
    """Return by how many seconds this machine's clock is behind the server's; 0 if that does not say its time."""
    try:
        return (parsedate_to_datetime(found.headers["date"]) - datetime.now(UTC)).total_seconds()
    except (KeyError, ValueError, TypeError):
        return 0.0
