"""Files that cells of a table hold or name, and folders of files, with one sub-folder a label, as tables."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

from fedveil.common.errors import DataError, UnreadableFile
from fedveil.common.tasks.cells import UNREADABLE, Misfit, is_missing
from fedveil.common.tasks.table_files import READERS
from fedveil.common.tasks.tables import Table, Unfit

MOST_BYTES = 64 << 20
"""Of one file."""
LABEL = "label"
"""Column of a folder's labels."""
UNMEANT = ("thumbs.db", "desktop.ini")
"""Files that a file manager leaves; so are those that begin with a dot."""


def content_of(value: object, folder: Path | None) -> bytes:
    """Return the file of a cell: its bytes, those at a path below ``folder``, or as the hub has it, ``{"bytes": ...}``.

    Raises:
        Misfit: there is none, or it is as ``file_within`` refuses.
    """
    value = _of_hub(value)
    if value == b"" or (value is not UNREADABLE and is_missing(value)):
        raise Misfit("has no value", "fill it in or remove the row")
    if not isinstance(value, bytes | str):
        raise Misfit("has no bytes and no path", "put a file or its path there")
    return value if isinstance(value, bytes) else file_within(value.strip(), folder)


def cell_file(value: object, folder: Path | None = None) -> Path | None:
    """Return the file that ``content_of`` opens for a cell, whether or not it is there; None: none."""
    name = _of_hub(value)
    below = _below(name.strip()) if isinstance(name, str) else None
    return None if folder is None or below is None else folder / below


def _of_hub(value: object) -> object:
    """Return a cell's bytes or path, from a mapping of both as the hub has it."""
    if isinstance(value, Mapping) and {"bytes", "path"} >= set(value):
        return value.get("bytes") or value.get("path")
    return value


def _below(name: str) -> PurePosixPath | None:
    """Return a path that does not by its words lead out of the folder that it begins in; None: it does."""
    below = PurePosixPath(name)
    outside = below.is_absolute() or ".." in below.parts or "\\" in name or PureWindowsPath(name).drive
    return None if outside else below


def file_within(name: str, folder: Path | None) -> bytes:
    """Return the content of a plain file by its path below ``folder``; links that lead out of that are not followed.

    Raises:
        Misfit: it is not there, not below the folder, no plain file, or larger than ``MOST_BYTES``.
    """
    if folder is None:
        raise Misfit("names a file, and no folder is known that it lies in", "give the file's bytes")
    below = _below(name)
    if below is None:
        raise Misfit("names a file outside the table's own folder", "put it below that, and name it with '/'")
    try:
        root = folder.resolve(strict=True)
        path = (root / below).resolve(strict=True)
        if not path.is_relative_to(root):
            raise Misfit("names a file outside the table's own folder", "put the file itself there and no link")
        # Neither a link that was put there since, nor a pipe that would be waited for.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
        with os.fdopen(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise Misfit("names something that is no file")
            content = file.read(MOST_BYTES + 1)
    except (OSError, ValueError, RuntimeError):  # of links in a circle, and names that no file can have
        raise Misfit("names a file that is not there or cannot be opened", "check path and permissions") from None
    if len(content) > MOST_BYTES:
        raise Misfit(f"names a file of more than {MOST_BYTES >> 20} MiB")
    return content


def is_labelled_folder(path: Path) -> bool:
    """Return whether a path is a folder that has sub-folders and no table of its own."""
    try:
        entries = [entry for entry in path.iterdir() if not _is_unmeant(entry.name)]
    except OSError:
        return False
    tables = any(entry.is_file() and entry.suffix.lower() in READERS for entry in entries)
    return not tables and any(entry.is_dir() for entry in entries)


def read_labelled_folder(path: Path, column: str, suffixes: Sequence[str]) -> Table:
    """Return the files below a folder's sub-folders, whose names are the labels: columns ``column`` and ``label``.

    Rows are in the order of the files' paths. A file whose name has none of ``suffixes``, or that cannot be read, is a
    row that could not be read.

    Raises:
        UnreadableFile: there is no file in any sub-folder.
        DataError: the folder cannot be opened.
    """
    files: list[object] = []
    labels: list[object] = []
    unread: dict[int, Unfit] = {}
    try:
        names = sorted(_files_below(path))
    except OSError as error:
        raise DataError(f"{path} cannot be opened ({error.strerror or error}): check path and permissions") from error
    for row, name in enumerate(names):
        content: bytes | None = None
        try:
            if not name.lower().endswith(tuple(suffixes)):
                raise Misfit("is no file that ends in " + ", ".join(suffixes))
            content = file_within(name, path)
        except Misfit as misfit:
            unread[row] = Unfit(str(path), row + 1, misfit.what, f"{path / name} {misfit.what}", unit="row")
        files.append(content)
        labels.append(None if row in unread else PurePosixPath(name).parts[0].strip())
    if not names:
        raise UnreadableFile(f"{path} has no {column} files: put them into one sub-folder a label")
    return Table(str(path), {column: files, LABEL: labels}, unread=unread, folder=path)


def _files_below(path: Path) -> Iterator[str]:
    """Yield the paths of all files in sub-folders, relative and with forward slashes.

    A link to a folder is not followed, and counts as a file.
    """

    def stop(error: OSError) -> None:
        raise error

    for place, folders, files in os.walk(path, onerror=stop):
        folders[:] = [name for name in folders if not _is_unmeant(name)]
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        below = Path(place).relative_to(path)
        if below.parts or links:
            plain = files if below.parts else []
            yield from ((below / name).as_posix() for name in (*plain, *links) if not _is_unmeant(name))


def _is_unmeant(name: str) -> bool:
    return name.startswith(".") or name.lower() in UNMEANT
