"""The bundle of code that a server hands to sites (Flower's FAB, a zip), known by a hash of what is in it.

The hash is SHA-256 over the sorted paths, each with the hash of its content, so neither the zip's times nor its
packing matter. ``pyproject.toml`` counts by its values, because Flower writes its text anew, and Flower's own
list of the files (``.info/CONTENT``) not at all. A site compares it with its policy and, by default, with the hash
of the version that is installed there. Nothing of a bundle is written to a disk or executed here.
"""

from __future__ import annotations

import hashlib
import io
import json
import stat
import tomllib
import zipfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path, PurePosixPath

from common.errors import ProtocolError

PROJECT = Path(__file__).resolve().parent.parent
SETTINGS = "pyproject.toml"
OWN_SETTINGS = "common/bundle.toml"
"""The project's ``pyproject.toml`` as package data: an installed wheel has no other."""
MANIFEST = ".info/CONTENT"
MOST_BYTES = 4 << 20
"""Of the zip. FedVeil's own has 0.5 MB; what is larger is none, and is not opened."""
MOST_FILES = 1000
MOST_CONTENT = 16 << 20
"""Bytes of all files together, as the zip states them; no file is inflated beyond what is stated."""
_PLAIN = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def files_of(project: Path) -> dict[str, bytes]:
    """Return the files that a bundle of ``project`` consists of, by path: its settings and what ``fab-include`` names.

    Args:
        project: the folder that holds the packages; in it ``common/bundle.toml``, or as a bundle was unpacked there,
            ``pyproject.toml``.
    """
    own = project / OWN_SETTINGS
    text = (own if own.is_file() else project / SETTINGS).read_bytes()
    patterns = tomllib.loads(text.decode())["tool"]["flwr"]["app"]["fab-include"]
    found = {file for pattern in patterns for file in project.glob(pattern)}
    return {SETTINGS: text, **{file.relative_to(project).as_posix(): file.read_bytes() for file in sorted(found)}}


@lru_cache(maxsize=1)
def own_digest() -> str:
    """Return the hash of the installed version's own bundle, as its files were at the first call."""
    return digest(files_of(PROJECT))


def digest(files: Mapping[str, bytes]) -> str:
    """Return a bundle's hash, 64 hexadecimal digits.

    Raises:
        ProtocolError: ``pyproject.toml`` is not TOML.
    """
    whole = hashlib.sha256()
    for path, content in sorted(files.items()):
        if path == MANIFEST:
            continue
        name = path.encode()
        told = _values(content) if path == SETTINGS else content
        whole.update(len(name).to_bytes(4, "big") + name + hashlib.sha256(told).digest())
    return whole.hexdigest()


def _values(content: bytes) -> bytes:
    try:
        return json.dumps(tomllib.loads(content.decode()), sort_keys=True, default=str).encode()
    except (ValueError, RecursionError) as error:
        raise ProtocolError("the bundle's pyproject.toml is not TOML") from error


def bundle_digest(content: bytes) -> str:
    """Return the hash of a bundle as it was received; it is read in memory, within bounds.

    Raises:
        ProtocolError: it is too large, or not a plain zip of plain files.
    """
    if len(content) > MOST_BYTES:
        raise ProtocolError(f"the bundle has more than {MOST_BYTES} bytes")
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = archive.infolist()
            _check_members(members)
            return digest({member.filename: archive.read(member) for member in members})
    except ProtocolError:
        raise
    except Exception as error:  # zipfile raises whatever zlib, struct and the codecs raise
        raise ProtocolError("the bundle is not a plain zip file") from error


def _check_members(members: list[zipfile.ZipInfo]) -> None:
    names = [member.filename for member in members]
    if len(names) > MOST_FILES or sum(member.file_size for member in members) > MOST_CONTENT:
        raise ProtocolError(f"the bundle has more than {MOST_FILES} files or {MOST_CONTENT} bytes of content")
    if len(set(names)) != len(names):
        raise ProtocolError("the bundle names a file twice")
    for member in members:
        mode, path = member.external_attr >> 16, PurePosixPath(member.filename)
        plain = (
            member.compress_type in _PLAIN
            and not member.flag_bits & 1  # encrypted
            and (not stat.S_IFMT(mode) or stat.S_ISREG(mode))
            and not member.is_dir()
            and not path.is_absolute()
            and ".." not in path.parts
            and "\\" not in member.filename
        )
        if not plain:
            raise ProtocolError("the bundle holds something that is no plain file")
