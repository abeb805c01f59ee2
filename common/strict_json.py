"""Frozen dataclasses as JSON objects, and back: what is missing, unknown or of another type is an error.

A field is written under its own name, or under the one that ``called`` gives it. Every field is written, but for an
empty one that is ``SPARSE``; one that has a default may be missing when it is read. Figures are finite; only a field of
type ``Epsilon``, at least 0, may be infinite, which files hold as the text ``inf``, and one of type ``Measured`` may
be ``inf``, ``-inf`` and ``nan``.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from fedveil.common.errors import DataError

MOST = sys.float_info.max
Epsilon = Annotated[float, "at least 0, may be infinite"]
Delta = Annotated[float, "at least 0 and below 1"]
Measured = Annotated[float, "may be infinite, or no number"]
"""Of a model, which may have diverged."""
NOT_FINITE = ("inf", "-inf", "nan")
BESIDE = {"beside": True}
"""Metadata of a field, a dataclass or None, whose own fields are written beside the others; all null for None."""
SPARSE = {"sparse": True}
"""Metadata of a field that is written only where it is not empty."""
T = TypeVar("T")


def json_of(text: str | bytes) -> Any:
    """Return the value of a text, in UTF-8, whose every fault is a ValueError: also brackets that nest too deeply."""
    try:
        return json.loads(text if isinstance(text, str) else text.decode("utf-8"))
    except RecursionError as error:
        raise ValueError("brackets are nested too deeply") from error


def called(key: str) -> dict[str, str]:
    """Return the metadata of a field that has another name in JSON."""
    return {"key": key}


def to_json(value: Any) -> dict[str, Any]:
    """Return a dataclass as plain objects, lists and values; ``from_json`` reads them."""
    written: dict[str, Any] = {}
    for item in fields(value):
        content = getattr(value, item.name)
        if item.metadata.get("sparse") and not content:
            continue
        if not item.metadata.get("beside"):
            written[_key(item)] = _plain(content)
        elif content is None:
            written |= dict.fromkeys(_keys(_inner(type(value), item)))
        else:
            written |= to_json(content)
    return written


def from_json(of: type[T], value: Any, what: str) -> T:
    """Return the dataclass that an object of JSON holds.

    Args:
        of: the dataclass.
        value: as ``json.loads`` gives it.
        what: whose content it is, for the error.

    Raises:
        DataError: it is no object, lacks a field, has an unknown one, or one whose type does not fit.
    """
    if not isinstance(value, dict):
        raise DataError(f"{what} is not an object")
    arguments: dict[str, Any] = {}
    known, hints = _keys(of), _hints(of)  # type: ignore[arg-type]
    if unknown := [name for name in value if name not in known]:
        raise DataError(f"{what} has the unknown field {unknown[0]!r}")
    for item in fields(of):  # type: ignore[arg-type]
        if item.metadata.get("beside"):
            inner = _inner(of, item)
            part = {name: value[name] for name in _keys(inner) if name in value}
            empty = len(part) == len(_keys(inner)) and all(content is None for content in part.values())
            arguments[item.name] = None if empty else from_json(inner, part, what)
        elif _key(item) in value:
            try:
                arguments[item.name] = _read(hints[item.name], value[_key(item)], what)
            except _MisfitError:
                raise DataError(f"{what} has no usable field {_key(item)!r}") from None
        elif item.default is MISSING and item.default_factory is MISSING:
            raise DataError(f"{what} lacks the field {_key(item)!r}")
    return of(**arguments)


class _MisfitError(Exception):
    """A value is not of the type of its field."""


@cache
def _hints(of: type) -> dict[str, Any]:
    return get_type_hints(of, include_extras=True)


def _key(item: Field[Any]) -> str:
    return str(item.metadata.get("key", item.name))


def _inner(of: type, item: Field[Any]) -> type:
    return next(kind for kind in get_args(_hints(of)[item.name]) if kind is not NoneType)


@cache
def _keys(of: type) -> tuple[str, ...]:
    names: list[str] = []
    for item in fields(of):
        names += _keys(_inner(of, item)) if item.metadata.get("beside") else (_key(item),)
    return tuple(names)


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return to_json(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_plain(item) for item in value]
    return value


def _read(kind: Any, value: Any, what: str) -> Any:
    """Return ``value`` as a field of type ``kind`` holds it, or raise _MisfitError."""
    origin, inside = get_origin(kind), get_args(kind)
    if kind == Epsilon and value in (math.inf, "inf"):
        return math.inf
    if kind == Measured and (value in NOT_FINITE or (isinstance(value, float) and not math.isfinite(value))):
        return float(value)
    if origin is Annotated:
        number = _read(inside[0], value, what)
        if (kind in (Epsilon, Delta) and number < 0) or (kind == Delta and number >= 1):
            raise _MisfitError
        return number
    if origin in (Union, UnionType):
        for option in inside:
            try:
                return _read(option, value, what)
            except _MisfitError:
                continue
        raise _MisfitError
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MOST:
        return float(value)
    if is_dataclass(kind) and isinstance(value, dict):
        return from_json(kind, value, what)  # type: ignore[arg-type]
    if isinstance(value, list) and origin is list:
        return [_read(inside[0], item, what) for item in value]
    if isinstance(value, dict) and origin is dict:
        return {name: _read(inside[1], item, what) for name, item in value.items()}
    plain = kind in (int, str, bool, NoneType) and isinstance(value, kind)
    if (plain and isinstance(value, bool) == (kind is bool)) or (origin is Literal and value in inside):
        return value
    raise _MisfitError
