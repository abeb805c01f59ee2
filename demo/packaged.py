"""Models and data that PyPI packages carry: their files are read, the packages never imported.

These are small packages by single authors. So every one is pinned to a version, every file to its
SHA-256, and no code of theirs runs. A loader that is given a folder reads what lies in it, whatever is
listed: so folders are loaded from copies of our own, which hold the listed files and nothing else.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import ClassVar

from fedveil.common.errors import DataError
from fedveil.common.files import sha256_of

HASH_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class PackagedFile:
    """One file of an installed distribution."""

    distribution: str
    version: str
    path: str
    """Relative to site-packages, with forward slashes."""
    sha256: str
    """In hexadecimal."""
    extra: str = ""
    """FedVeil's extra that installs the distribution; empty: it is installed by itself, without its dependencies."""

    is_folder: ClassVar[bool] = False

    @contextmanager
    def located(self) -> Iterator[Path]:
        """Yield where the file lies; errors as of ``packaged_file``."""
        yield packaged_file(self)


@dataclass(frozen=True, slots=True)
class PackagedFolder:
    """A folder of an installed distribution, such as a saved model; files that are not named are never seen."""

    distribution: str
    version: str
    path: str
    """Relative to site-packages, with forward slashes."""
    files: Mapping[str, str]
    """SHA-256 in hexadecimal of each file, by its path relative to the folder."""
    extra: str = ""
    """As in PackagedFile."""


@dataclass(frozen=True, slots=True)
class PackagedTree:
    """A folder of an installed distribution with more files than could be listed: all of them, known by one hash."""

    distribution: str
    version: str
    path: str
    """Relative to site-packages, with forward slashes."""
    sha256: str
    """In hexadecimal, of a line for each file, in the order of their paths: its SHA-256, two blanks, its path."""
    extra: str = ""
    """As in PackagedFile."""

    is_folder: ClassVar[bool] = True

    def located(self) -> AbstractContextManager[Path]:
        """Yield a copy of the folder; errors as of ``packaged_tree``."""
        return packaged_tree(self)


Packaged = PackagedFile | PackagedFolder | PackagedTree


def packaged_file(file: PackagedFile) -> Path:
    """Return where ``file`` lies, after checking its distribution's version and its hash.

    Raises:
        DataError: the distribution is not installed or has another version, or the file is missing
            or altered; the message says how to install the right one.
    """
    return _checked(_installed(file), file, file.path, file.sha256)


@contextmanager
def packaged_folder(folder: PackagedFolder) -> Iterator[Path]:
    """Yield a private copy of ``folder`` that holds the files that it names and nothing else; gone afterwards.

    What is hashed is what is written, so a file that changes meanwhile changes nothing.

    Raises:
        DataError: as for packaged_file, or there is no room for the copy.
    """
    found = _installed(folder)
    with tempfile.TemporaryDirectory(prefix="fedveil-model-") as private:
        for name, sha256 in folder.files.items():
            path = f"{folder.path}/{name}"
            location, target = Path(str(found.locate_file(path))), Path(private) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                digest = _copied(location, target)
            except (FileNotFoundError, IsADirectoryError):
                raise DataError(_lost(folder, path)) from None
            except OSError as error:
                raise DataError(
                    f"{path} of the package {folder.distribution} cannot be copied to {private} ({error.strerror}): "
                    "check permissions and space, or name another folder in TMPDIR"
                ) from error
            if digest != sha256:
                raise DataError(_altered(folder, path))
        yield Path(private)


@contextmanager
def packaged_tree(tree: PackagedTree) -> Iterator[Path]:
    """Yield a private copy of all files below a folder; gone afterwards.

    Raises:
        DataError: as for packaged_folder; a file more or less is an altered tree.
    """
    root = Path(str(_installed(tree).locate_file(tree.path)))
    with tempfile.TemporaryDirectory(prefix="fedveil-data-") as private:
        whole = hashlib.sha256()
        try:
            for name in sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()):
                target = Path(private) / name
                target.parent.mkdir(parents=True, exist_ok=True)
                whole.update(f"{_copied(root / name, target)}  {name}\n".encode())
        except OSError as error:
            raise DataError(
                f"{tree.path} of the package {tree.distribution} cannot be copied to {private} ({error.strerror}): "
                "check permissions and space, or name another folder in TMPDIR"
            ) from error
        if whole.hexdigest() != tree.sha256:
            raise DataError(_altered(tree, tree.path))
        yield Path(private)


def _copied(source: Path, target: Path) -> str:
    """Copy a file and return the SHA-256 of the bytes that were written."""
    digest = hashlib.sha256()
    with source.open("rb") as stream, target.open("xb") as copy:
        while block := stream.read(HASH_BLOCK_BYTES):
            digest.update(block)
            copy.write(block)
    return digest.hexdigest()


def _install_command(item: Packaged) -> str:
    if item.extra:
        return f"pip install 'fedveil[{item.extra}]'"
    return f"pip install --no-deps --only-binary :all: {item.distribution}=={item.version}"


def _installed(item: Packaged) -> Distribution:
    try:
        found = distribution(item.distribution)
    except PackageNotFoundError:
        raise DataError(
            f"the package {item.distribution} is not installed; install it with: {_install_command(item)}"
        ) from None
    if found.version != item.version:
        raise DataError(
            f"the package {item.distribution} has version {found.version}, but only {item.version} is known to "
            f"FedVeil; install that with: {_install_command(item)}"
        )
    return found


def _checked(found: Distribution, item: PackagedFile, path: str, sha256: str) -> Path:
    location = Path(str(found.locate_file(path)))
    if not location.is_file():
        raise DataError(_lost(item, path))
    status = location.stat()
    if _sha256(location, status.st_size, status.st_mtime_ns) != sha256:
        raise DataError(_altered(item, path))
    return location


def _lost(item: Packaged, path: str) -> str:
    return f"the package {item.distribution} {item.version} lacks its file {path}; {_repair(item)}"


def _altered(item: Packaged, path: str) -> str:
    return (
        f"the file {path} of the package {item.distribution} {item.version} is not the one FedVeil knows "
        f"(its SHA-256 differs), so it is not used; {_repair(item)}"
    )


def _repair(item: Packaged) -> str:
    wheel = f"--no-deps --only-binary :all: {item.distribution}=={item.version}"
    return f"reinstall it with: pip install --force-reinstall {wheel}"


@lru_cache(maxsize=256)
def _sha256(path: Path, size: int, modified_ns: int) -> str:
    """Return the hash of a file; size and time are in the cache's key so that a changed file is hashed anew."""
    return sha256_of(path)
