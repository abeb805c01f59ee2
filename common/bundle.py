"""The bundle of code that a server hands to sites (Flower's FAB, a zip), known by a hash of what is in it.

The hash is SHA-256 over the sorted paths, each with the hash of its content, so neither the zip's times nor its
packing matter. ``pyproject.toml`` counts by its values, because Flower rewrites its text, and Flower's own
list of the files (``.info/CONTENT``) not at all. A site compares it with its policy and, by default, with the hash
of the version that is installed there. Nothing of a bundle is written to a disk or executed here.
"""

from __future__ import annotations

import hashlib
import io
import json
import stat
import struct
import tomllib
import zipfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path, PurePosixPath

from fedveil.common.errors import ProtocolError

PROJECT = Path(__file__).resolve().parent.parent
PACKAGE = "fedveil"
SETTINGS = "pyproject.toml"
OWN_SETTINGS = "common/bundle.toml"
"""The project's ``pyproject.toml`` as package data: an installed wheel has no other."""
MANIFEST = ".info/CONTENT"
MOST_BYTES = 4 << 20
"""Of the zip. FedVeil's own has 2 MB; a larger file is not opened."""
MOST_FILES = 1000
MOST_DIRECTORY = 128 << 10
"""Bytes of the zip's list of files; FedVeil's own has 21 kB. zipfile reads all of it, in a time that grows with the
square of what it says of one file."""
MOST_SETTINGS, MOST_DOTS = 32 << 10, 20
"""Bytes of ``pyproject.toml``, and dots in one of its lines, up to which it is parsed. FedVeil's own has 10 kB and 7.
The parser's time grows with the square of the dots in a key: 64 kB with 100 in each line take it 0.6 s of a core."""
_END = struct.Struct("<4s4xHHL4xH")
"""The end of a zip without a comment: mark, files on this disk and in all, bytes of their list and of the comment."""
_LONG_END = b"PK\x06\x07"
"""Mark of a second end for zips beyond 4 GB, 20 bytes before the other, whose numbers it replaces."""


def files_of(project: Path) -> dict[str, bytes]:
    """Return the files that a bundle of ``project`` consists of, by path: its settings and what ``fab-include`` names.

    Args:
        project: the folder that holds the rooms: a checkout, an installed wheel's package, or an unpacked bundle, which
            has no ``common/bundle.toml`` but ``pyproject.toml``.
    """
    settings = project / OWN_SETTINGS
    text = (settings if settings.is_file() else project / SETTINGS).read_bytes()
    patterns = tomllib.loads(text.decode())["tool"]["flwr"]["app"]["fab-include"]
    files = {file.relative_to(project).as_posix(): file for pattern in patterns for file in project.glob(pattern)}
    if not (project / PACKAGE).is_dir():  # a wheel's package: its own files lie among the rooms
        files |= {f"{PACKAGE}/{file.name}": file for file in project.glob("*.py")}
    return {SETTINGS: text, **{name: file.read_bytes() for name, file in sorted(files.items())}}


@lru_cache(maxsize=1)
def own_digest() -> str:
    """Return the hash of the installed version's own bundle, as its files were at the first call."""
    return digest(files_of(PROJECT))


def digest(files: Mapping[str, bytes]) -> str:
    """Return a bundle's hash, 64 hexadecimal digits.

    Raises:
        ProtocolError: ``pyproject.toml`` is not TOML, or beyond the bounds.
    """
    whole = hashlib.sha256()
    for path, content in sorted(files.items()):
        if path == MANIFEST:
            continue
        name = path.encode()
        counted = _values(content) if path == SETTINGS else content
        whole.update(len(name).to_bytes(4, "big") + name + hashlib.sha256(counted).digest())
    return whole.hexdigest()


def _values(content: bytes) -> bytes:
    dots = max(line.count(b".") for line in content.split(b"\n"))
    if len(content) > MOST_SETTINGS or dots > MOST_DOTS:
        raise ProtocolError(
            f"the bundle's pyproject.toml has more than {MOST_SETTINGS} bytes, or a line of more than {MOST_DOTS} dots"
        )
    try:
        return json.dumps(tomllib.loads(content.decode()), sort_keys=True, default=str).encode()
    except (ValueError, RecursionError) as error:
        raise ProtocolError("the bundle's pyproject.toml is not TOML") from error


def bundle_digest(content: bytes, *, own_alone: bool = False) -> str:
    """Return the hash of a bundle as it was received; it is read in memory, within bounds.

    Args:
        content: the zip.
        own_alone: only the installed version's own bundle is wanted: the ``pyproject.toml`` of one whose other files
            differ is not parsed, and its hash is empty.

    Raises:
        ProtocolError: it is too large, or not a plain zip of plain files.
    """
    if len(content) > MOST_BYTES:
        raise ProtocolError(f"the bundle has more than {MOST_BYTES} bytes")
    try:
        _check_end(content)
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = archive.infolist()
            _check_members(members, len(content))
            files = {member.filename: archive.read(member) for member in members}
    except ProtocolError:
        raise
    except Exception as error:  # zipfile raises whatever struct and the codecs raise
        raise ProtocolError("the bundle is not a plain zip file") from error
    return "" if own_alone and _code_digest(files) != _own_code_digest() else digest(files)


def _code_digest(files: Mapping[str, bytes]) -> str:
    """Return the hash of a bundle's files without ``pyproject.toml``."""
    return digest({path: content for path, content in files.items() if path != SETTINGS})


@lru_cache(maxsize=1)
def _own_code_digest() -> str:
    return _code_digest(files_of(PROJECT))


def _check_end(content: bytes) -> None:
    """Raise ProtocolError unless a zip ends as Flower writes it, and its list of files is short enough to be read."""
    mark, _, files, directory, comment = _END.unpack(content[-_END.size :])
    if mark != b"PK\x05\x06" or comment or content[-_END.size - 20 :].startswith(_LONG_END):
        raise ProtocolError("the bundle is not a plain zip file")
    if files > MOST_FILES or directory > MOST_DIRECTORY:
        raise ProtocolError(f"the bundle has more than {MOST_FILES} files, or {MOST_DIRECTORY} bytes to list them")


def _check_members(members: list[zipfile.ZipInfo], size: int) -> None:
    """Raise ProtocolError unless these are plain files that share no byte of a zip of ``size`` bytes."""
    names = [member.filename for member in members]
    if len(names) > MOST_FILES or sum(member.file_size for member in members) > size:
        raise ProtocolError(f"the bundle has more than {MOST_FILES} files, or files that overlap")
    if len(set(names)) != len(names):
        raise ProtocolError("the bundle names a file twice")
    for member in members:
        mode, path = member.external_attr >> 16, PurePosixPath(member.filename)
        plain = (
            member.compress_type == zipfile.ZIP_STORED  # as Flower writes them: nothing is inflated here
            and member.compress_size == member.file_size
            and not member.flag_bits & 1  # encrypted
            and (not stat.S_IFMT(mode) or stat.S_ISREG(mode))
            and not member.is_dir()
            and not path.is_absolute()
            and ".." not in path.parts
            and "\\" not in member.filename
        )
        if not plain:
            raise ProtocolError("the bundle holds something that is no plain file, or one that is compressed")
