"""Files that a killed server leaves whole: replaced in one step, or appended to and on disk."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import stat
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedveil.common.errors import ConfigError, DataError, RunFailed
from fedveil.common.words import bytes_text

FileState = tuple[int, int, int] | None
DATABASE = b"SQLite format 3\0"
"""What a file of SQLite, such as a ledger, begins with."""
LONGEST_WRITE = 60.0
"""Seconds."""
ABOUT_ADAPTER = "fedveil.json"
"""What says of a saved adapter what it is."""
ABOUT_RUN = "config.json"
"""What the folder of every run has."""
PROCESS = "process.json"
"""What names the process that conducts a simulated run, in its folder."""
BESIDE_DATABASE = ("-journal", "-wal", "-shm")
"""How the names of the files end that belong to a database."""


def expanded(path: str | Path) -> Path:
    """Return a path with the folder of a user in the place of a leading ``~`` or ``~NAME``.

    Raises:
        ConfigError: the machine knows no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(
            f"{str(path)!r} begins with the folder of a user whom this machine does not know: write the whole path"
        ) from error


def sha256_of(path: Path) -> str:
    """Return a file's SHA-256 in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def replace_file(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Put ``data`` at ``path``, durably and in one step: a reader sees the old file or the new one, never half.

    ``mode`` are the rights of the file, of which the process's mask takes some away.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(partial, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:  # Ctrl-C as well: what is half written stays in nobody's folder
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def with_usual_mode(folder: Path) -> None:
    """Give the tensor files below a folder the mode that other new files in it have; safetensors gives 0600."""
    probe = folder / f".mode.{os.getpid()}.tmp"
    try:
        probe.touch()
        mode = stat.S_IMODE(probe.stat().st_mode)
    finally:
        probe.unlink(missing_ok=True)
    for path in folder.rglob("*.safetensors"):
        path.chmod(mode)


def write_output(files: Mapping[Path, bytes], reads: Iterable[Path] = ()) -> None:
    """Write a command's files, each as ``replace_file`` does, and never over what is somebody's own.

    Args:
        files: contents by path; all paths are looked at before the first is written.
        reads: what the command reads: files, and folders of which no file may be overwritten.

    Raises:
        DataError: a path is one of ``reads`` or lies in one of them, is a ledger or another database or a part of one,
            or cannot be written.
    """
    reads = list(reads)
    for path in files:
        try:
            _refuse(path, reads)
        except OSError as error:
            raise _unwritable(path, error) from error
    for path, data in files.items():
        try:
            replace_file(path, data)
        except OSError as error:
            raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path} cannot be written ({error.strerror}): name another file")


def _refuse(path: Path, reads: Sequence[Path]) -> None:
    """Raise DataError if ``path`` is of a database or of what a command reads; what is not there yet is of neither."""
    for ending in ("", *BESIDE_DATABASE):
        owner = path.with_name(path.name.removesuffix(ending)) if path.name.endswith(ending) else path
        if _is_database(owner):
            raise DataError(f"{owner} is a ledger or another database and is not overwritten: name another file")
    if not path.exists():
        return
    if not path.is_file() and not path.is_dir():
        raise DataError(f"{path} is no file that could be replaced: name another one")
    for read in reads:
        if read.exists() and (path.samefile(read) or path.resolve().is_relative_to(read.resolve())):
            place = "is read by this command" if path.samefile(read) else f"lies in {read}"
            raise DataError(f"{path} {place} and is not overwritten: name another file")


def _is_database(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(DATABASE)) == DATABASE


def drop_leftovers(folder: Path) -> None:
    """Remove what a process that was killed in ``replace_file`` left in a folder; what another one writes now stays."""
    for path in folder.glob(".*.tmp"):
        process = path.name.split(".")[-2]
        with suppress(OSError):
            # No replacement takes a minute: the number is another process's by then.
            if process.isdecimal() and (not _runs(int(process)) or time.time() - path.stat().st_mtime > LONGEST_WRITE):
                path.unlink()


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def sync_folder(folder: Path) -> None:
    """Put a folder's list of names on disk: a file in it that is synced may be without a name after a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_room(folder: Path, needed: int) -> None:
    """Raise RunFailed if the disk of a folder has not this much room, in bytes.

    A quota of the user's own cannot be read and is not seen.
    """
    left = shutil.disk_usage(folder).free
    if left < needed:
        raise RunFailed(
            f"the disk of {folder} is full: {bytes_text(left)} are left, and {bytes_text(needed)} are needed to go on; "
            "make room, or name another folder as output"
        )


def full_disk(error: BaseException, folder: Path) -> RunFailed | None:
    """Return the sentence for an error which says that a folder's disk, or a quota of it, is full; None: another."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RunFailed(
            f"the disk of {folder} is full ({error.strerror}): make room, or name another folder as output"
        )
    return None


def finite(value: Any) -> Any:
    """Return ``value`` with figures that have no JSON, in whatever is nested in it, as the text ``inf`` or ``nan``."""
    if isinstance(value, Mapping):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def append_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Append JSON lines, durably; a crash in between leaves a part, which ``cut_file`` takes away."""
    with path.open("ab") as file:
        file.write("".join(json.dumps(finite(line), allow_nan=False) + "\n" for line in lines).encode())
        file.flush()
        os.fsync(file.fileno())


def whole_lines(path: Path) -> list[str]:
    """Return the lines of a text that another process appends to; none of a file that is not there yet.

    A line that is being written is left out: it may end within a character.
    """
    content = path.read_bytes() if path.is_file() else b""
    return content[: content.rfind(b"\n") + 1].decode().splitlines()


def state_of(path: str | Path) -> FileState:
    """Return when a plain file was written last, and changed in any way, in nanoseconds, and its bytes; None: no such.

    A copy may set when it was written, as cp -p, tar and rsync -t do, and a row of equal length leaves the number of
    bytes. The system alone sets when it was changed.
    """
    try:
        state = os.stat(path)
    except (OSError, ValueError):  # also of a name that no file can have
        return None
    return (state.st_mtime_ns, state.st_ctime_ns, state.st_size) if stat.S_ISREG(state.st_mode) else None


def length(path: Path) -> int:
    """Return a file's length in bytes; 0 if it is missing."""
    return path.stat().st_size if path.exists() else 0


def cut_file(path: Path, size: int) -> None:
    """Cut a file back to ``size`` bytes, durably; one that is not there stays away."""
    if path.exists():
        with path.open("r+b") as file:
            file.truncate(size)
            os.fsync(file.fileno())
