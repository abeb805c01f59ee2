"""The unpacked copy in the cache is used only if it is the one that FedVeil knows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedveil.demo import unpacked
from fedveil.demo.smollm2 import SMOLLM2
from fedveil.demo.unpacked import Unpacked

FILES = {"config.json": b"{}", "model.safetensors": b"weights" * 1000}


class Unpacking:
    """Writes FILES in place of a model, and counts."""

    times = 0
    files = FILES

    def __call__(self, source: Path, folder: Path) -> None:
        self.times += 1
        folder.mkdir()
        for name, content in self.files.items():
            (folder / name).write_bytes(content)

    def __init__(self) -> None:
        self.model = Unpacked(SMOLLM2, {n: hashlib.sha256(c).hexdigest() for n, c in FILES.items()}, self)

    def read(self) -> dict[str, bytes]:
        with self.model.folder() as folder:
            return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def unpacking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Unpacking:
    @contextmanager
    def package(_: object) -> Iterator[Path]:
        yield tmp_path

    monkeypatch.setattr(unpacked, "packaged_folder", package)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Unpacking()


def alter(kept: Path) -> None:
    (kept / "model.safetensors").write_bytes(b"another" * 1000)


def add(kept: Path) -> None:
    (kept / "adapter_config.json").write_text("{}")


def link(kept: Path) -> None:
    (kept / "config.json").rename(kept.parent / "config.json")
    (kept / "config.json").symlink_to(kept.parent / "config.json")


def lose(kept: Path) -> None:
    (kept / "config.json").unlink()


def test_it_is_unpacked_once(unpacking: Unpacking) -> None:
    assert [unpacking.read() for _ in range(3)] == [FILES] * 3
    assert unpacking.times == 1


@pytest.mark.parametrize("spoil", [alter, add, link, lose])
def test_a_copy_that_someone_touched_is_never_used_and_is_replaced(unpacking: Unpacking, spoil: object) -> None:
    unpacking.read()
    spoil(unpacking.model.place())  # type: ignore[operator]
    assert unpacking.read() == FILES
    assert (unpacking.read(), unpacking.times) == (FILES, 2)


def test_a_cache_that_is_believed_is_found_out(unpacking: Unpacking, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault: a copy is used because it is there."""
    unpacking.read()
    alter(unpacking.model.place())
    monkeypatch.setattr(Unpacked, "is_known", lambda _, folder: (folder / "config.json").is_file())
    assert unpacking.read() != FILES, "the fault is not found"


def test_what_other_libraries_write_is_used_and_not_kept(unpacking: Unpacking) -> None:
    unpacking.files = {**FILES, "config.json": b'{"a": 1}'}
    assert [unpacking.read(), unpacking.read()] == [unpacking.files] * 2
    assert unpacking.times == 2
    assert not unpacking.model.place().exists()


def test_a_cache_that_cannot_be_written_is_none(
    unpacking: Unpacking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert [unpacking.read(), unpacking.read()] == [FILES] * 2
