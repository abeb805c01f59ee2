"""Folders that are made once: complete or not at all, never over something that is there."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from fedveil.common.errors import ConfigError, DataError
from fedveil.common.files import sync_folder

PRIVATE_MODE = 0o600
PUBLIC_MODE = 0o644
FOLDER_MODE = 0o700


def make_folder(folder: Path, files: Mapping[str, bytes], private: frozenset[str]) -> None:
    """Put ``files`` into ``folder``; those named in ``private`` are readable by their owner only.

    Everything is synced beside its place and then moved in order, so a folder with the last file is complete.

    Args:
        folder: made if it is not there.
        files: contents by path relative to ``folder``.
        private: keys of ``files`` that get mode 0600; all others get 0644.

    Raises:
        ConfigError: one of the files is there already; nothing was changed.
        DataError: the folder cannot be written; none of the files was left in it.
    """
    for name in files:
        if (folder / name).exists():
            raise ConfigError(f"{folder / name} is there already and is not overwritten: name another folder")
    made, placed = not folder.exists(), list[Path]()
    try:
        folder.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=".new-", dir=folder))
        try:
            for name, content in files.items():
                _write(draft / name, content, PRIVATE_MODE if name in private else PUBLIC_MODE)
            for name in files:
                (folder / name).parent.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
                (draft / name).replace(folder / name)
                placed.append(folder / name)
                sync_folder((folder / name).parent)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        if made:
            sync_folder(folder.parent)
    except OSError as error:
        # Half a folder could be neither used nor made again: its files would be said to be there already.
        for path in placed:
            path.unlink(missing_ok=True)
        if made:
            shutil.rmtree(folder, ignore_errors=True)
        raise DataError(f"cannot make {folder} ({error.strerror}): name a folder that you may write") from error


def put_file(path: Path, content: bytes, *, private: bool) -> None:
    """Put ``content`` at ``path``, durably and in one step, in place of what is there.

    Raises:
        DataError: the folder cannot be written.
    """
    draft = path.with_name(f".{path.name}.new")
    try:
        draft.unlink(missing_ok=True)  # of one that was interrupted
        _write(draft, content, PRIVATE_MODE if private else PUBLIC_MODE)
        draft.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise DataError(f"cannot write {path} ({error.strerror}): check permissions and space") from error


def _write(path: Path, content: bytes, mode: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # The mode is set when the file is made: a key is at no moment readable by others.
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        os.fchmod(file.fileno(), mode)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def read_bytes(path: Path, what: str) -> bytes:
    """Return a file's content.

    Raises:
        DataError: it cannot be read; the message says which part of the folder it is.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {what} {path} ({error.strerror})") from error
