"""The packed header of a message: its fields are written one after another, and read with their checks."""

from __future__ import annotations

import math
import secrets
import struct
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

from flwr.app import ConfigRecord, RecordDict

from fedveil.common.errors import ProtocolError
from fedveil.common.messages.blocks import NONCE_BYTES, WORDS_STYPE, block_of, encode_state
from fedveil.common.messages.formats import FLOAT32, FORMATS
from fedveil.common.messages.round import PROTOCOL, REFUSAL_KINDS, Refusal
from fedveil.common.messages.state import AdapterState
from fedveil.common.packed import Form
from fedveil.privacy.secure_sum.attempt import KeyOffer
from fedveil.privacy.secure_sum.roster import MOST_SITES

KINDS = (
    *("train", "result", *REFUSAL_KINDS),
    *("key task", "key", "share task", "shares", "survivor task", "survivors", "unmask task", "unmasking"),
)
"""Kinds of messages; a header has a kind's place here. Of a secure sum, each task is followed by its reply."""
SITE_CHARACTERS, TEXT_CHARACTERS = 200, 1000
"""Most characters of a site's name and of any other text."""
PREFIX, LENGTH = struct.Struct("<BI"), struct.Struct("<H")
ATTEMPT, SITES, KEY = struct.Struct("<I"), struct.Struct("<H"), struct.Struct("<32s64s")
EMPTY: Mapping[str, AdapterState] = MappingProxyType({})
T = TypeVar("T")


class Reader:
    """Takes a packed header apart; a field that is missing or wrong is a ProtocolError."""

    def __init__(self, record: RecordDict) -> None:
        header = record.config_records.get("header")
        if header is None:
            raise ProtocolError("the message has no header: it does not come from FedVeil")
        if type(header.get("protocol")) is not int or header["protocol"] != PROTOCOL:
            raise ProtocolError(
                f"the other side speaks protocol {header.get('protocol')!r}, this one {PROTOCOL}: run the same version"
            )
        packed, nonce = header.get("body"), header.get("nonce")
        if not isinstance(packed, bytes):
            raise ProtocolError("the message's header is not a block of bytes")
        if not isinstance(nonce, bytes) or len(nonce) != NONCE_BYTES:
            raise ProtocolError(f"the message's header has no nonce of {NONCE_BYTES} bytes")
        self.nonce = nonce
        self._rest = packed
        code, self.round_number = self.take(PREFIX, "kind and round")
        if code >= len(KINDS):
            raise ProtocolError(f"the message is of unknown kind {code}")
        self.kind = KINDS[code]
        self.run = self.text("run")

    def take(self, form: struct.Struct, name: str) -> tuple[Any, ...]:
        """Return the next fields; ProtocolError if a float among them is not finite."""
        values = form.unpack(self._next(form.size, name))
        _check_finite(values, name)
        return values

    def fields(self, form: Form, name: str, endless: str = "") -> dict[str, Any]:
        """Return the next fields by name; no number is below 0, and none infinite but the one called ``endless``."""
        data = self._next(form.size, name)
        try:
            values = form.unpack(data)
        except ProtocolError as error:
            raise ProtocolError(f"in the message's {name}, {error}") from error
        _check_finite([v for key, v in values.items() if (key, v) != (endless, math.inf)], name)
        if any(isinstance(value, int | float) and value < 0 for value in values.values()):
            raise ProtocolError(f"the message's {name} states a negative figure")
        return values

    def _next(self, size: int, name: str) -> bytes:
        if len(self._rest) < size:
            raise ProtocolError(f"the message's header ends before its {name}")
        data, self._rest = self._rest[:size], self._rest[size:]
        return data

    def text(self, name: str, longest: int = TEXT_CHARACTERS) -> str:
        """Return the next text, of at most ``longest`` characters."""
        (size,) = self.take(LENGTH, name)
        data, self._rest = self._rest[:size], self._rest[size:]
        try:
            value = data.decode()
        except UnicodeDecodeError as error:
            raise ProtocolError(f"the message's {name} is not UTF-8") from error
        if len(data) != size or len(value) > longest:
            raise ProtocolError(f"the message's {name} is not a text of at most {longest} characters")
        return value

    @property
    def more(self) -> bool:
        """Whether anything is left."""
        return bool(self._rest)

    def end(self) -> None:
        """Raise ProtocolError if the header goes on after its last field."""
        if self._rest:
            raise ProtocolError(f"the message's header has {len(self._rest)} bytes too many")

    def site(self) -> str:
        """Return the next text as a site's name, which can be printed."""
        site = self.text("site", SITE_CHARACTERS)
        if not site.isprintable():
            raise ProtocolError(f"the reply's site name {site!r} holds characters that cannot be printed")
        return site

    def site_of(self, run: str, round_number: int) -> str:
        """Return the next text as the name of the site that answers; ProtocolError if it answers another round."""
        site = self.site()
        if self.run != run or self.round_number != round_number:
            raise ProtocolError(f"{site} answers run {self.run!r}, round {self.round_number}, not this one")
        return site

    def key(self) -> KeyOffer:
        """Return the next site's name and key."""
        return KeyOffer(self.site(), *self.take(KEY, "key"))

    def several(self, read: Callable[[], T]) -> tuple[T, ...]:
        """Return what ``read`` returns for each of the sites of a sum, of which the next field is the number."""
        (sites,) = self.take(SITES, "sites")
        if not 0 < sites <= MOST_SITES:
            raise ProtocolError(f"the message names {sites} sites of a sum, and 1 to {MOST_SITES} are possible")
        return tuple(read() for _ in range(sites))

    def block(self, size: int, name: str) -> bytes:
        """Return the next ``size`` bytes."""
        return self._next(size, name)


def _check_finite(values: Iterable[Any], name: str) -> None:
    if not all(math.isfinite(value) for value in values if isinstance(value, float)):
        raise ProtocolError(f"a figure of the message's {name} is not finite")


def pack(
    kind: str,
    round_number: int,
    run: str,
    rest: bytes,
    words: bytes = b"",
    blocks: Mapping[str, AdapterState] = EMPTY,
    precision: str = FLOAT32,
) -> RecordDict:
    """Return a message with a new nonce; ``rest`` are the fields of its kind, and ``precision`` is the blocks'."""
    nonce = secrets.token_bytes(NONCE_BYTES)
    try:
        packed = PREFIX.pack(KINDS.index(kind), round_number) + pack_text(run) + rest
    except (ValueError, struct.error) as error:
        raise ProtocolError(f"a message of kind {kind!r} and round {round_number} cannot be sent: {error}") from error
    form, data = FORMATS[precision], {name: encode_state(state, precision) for name, state in blocks.items()}
    record = RecordDict({name: block_of("state", form.stype, form.dtype, d, nonce) for name, d in data.items()})
    if words:
        record["sum"] = block_of("words", WORDS_STYPE, "uint32", words, nonce)
    record["header"] = ConfigRecord({"protocol": PROTOCOL, "nonce": nonce, "body": packed})
    return record


def read_refusal(reader: Reader, run: str, round_number: int) -> Refusal:
    """Return the refusal that a reader has begun; ProtocolError if it is of another round."""
    site, reason = reader.site_of(run, round_number), reader.text("reason")
    reader.end()
    return Refusal(run, round_number, site, reader.kind, reason)


def pack_text(value: str, longest: int = TEXT_CHARACTERS) -> bytes:
    """Return a text with its length, cut to ``longest`` characters."""
    # "replace": half a surrogate pair, as in a file name that is not UTF-8, must not keep a refusal from arriving.
    data = value[:longest].encode(errors="replace")
    return LENGTH.pack(len(data)) + data


def pack_site(site: str) -> bytes:
    """Return a site's name."""
    return pack_text(site, SITE_CHARACTERS)


def pack_key(offer: KeyOffer) -> bytes:
    """Return a site's name and its key."""
    return pack_site(offer.site) + KEY.pack(offer.public, offer.signature)


def pack_several(values: Iterable[bytes]) -> bytes:
    """Return packed fields of the sites of a sum, with their number."""
    packed = list(values)
    return SITES.pack(len(packed)) + b"".join(packed)
