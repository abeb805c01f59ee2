"""A library: adapters of finished runs on one basis, in one folder, with what each is about and what its run claims.

``library.toml`` has the basis: the base model by its fingerprint, layers, rank, seed and the A that follows from them,
by its fingerprint. Each adapter lies in a folder of its name, as any derived model does (``common.derived``), with its
run's claim in ``derived.json``. On one basis every weighted sum of changes is exact and of the same rank, and a choice
among them is one of B's. LoRALib has adapters in one format, too, on bases of their own.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from fedveil.common.adapters import Adapter
from fedveil.common.check import PLAIN_NAME
from fedveil.common.config.text import to_toml
from fedveil.common.derived import DerivedFile, Source, derived
from fedveil.common.errors import ConfigError, DataError
from fedveil.common.files import expanded, replace_file
from fedveil.common.messages.state import AdapterState
from fedveil.common.paths import check_vacant
from fedveil.common.run_lines import read_file
from fedveil.common.strict_json import from_json
from fedveil.common.toml import read_toml
from fedveil.contrib.library.pairs import Pairs, basis_of, read_pairs, stacked

NAME = "library.toml"
DIGITS = 16
"""Of an adapter's fingerprint that ``start.adapters`` has."""


@dataclass(frozen=True)
class Basis:
    """What all adapters of a library have in common."""

    base_model: str
    base_fingerprint: str
    """As ``AdapterFile.base_fingerprint``."""
    targets: str
    """As ``adapter.targets``."""
    rank: int
    seed: int
    """From which A follows (``adapter.start = "orthonormal"``)."""
    directions: str
    """Fingerprint of every layer's A."""

    @property
    def words(self) -> str:
        """The settings of a run on it."""
        return (
            f"model.name {self.base_model!r}, adapter.targets {self.targets!r}, adapter.rank {self.rank} and seed "
            f"{self.seed}"
        )


@dataclass(frozen=True)
class Member:
    """One adapter."""

    name: str
    about: str
    """What its run's records are, in public words."""
    task: str
    fingerprint: str
    """Of its factors."""


@dataclass(frozen=True)
class Library:
    """A folder of adapters."""

    folder: Path
    basis: Basis
    adapters: list[Member] = field(default_factory=list)

    def write(self) -> None:
        """Write ``library.toml``."""
        parts = [to_toml({f"basis.{key}": value for key, value in vars(self.basis).items()})]
        parts += [f"[[adapters]]\n{to_toml(vars(member))}" for member in self.adapters]
        replace_file(self.folder / NAME, "\n".join(parts).encode())

    @property
    def setting(self) -> str:
        """What ``start.adapters`` is for all of them."""
        return ",".join(f"{member.name}={member.fingerprint[:DIGITS]}" for member in self.adapters)

    def member(self, name: str) -> Member:
        """Return the adapter of a name; DataError if there is none."""
        for member in self.adapters:
            if member.name == name:
                return member
        known = ", ".join(member.name for member in self.adapters) or "none"
        raise DataError(f"{self.folder} has no adapter {name!r}: it has {known}")

    def pairs(self, name: str) -> Pairs:
        """Return an adapter's factors; DataError if they are not those that were added."""
        pairs = read_pairs(self.folder / name / "adapter")
        if pairs.fingerprint != self.member(name).fingerprint:
            raise DataError(f"{self.folder / name} is not the adapter that was added: add it again under another name")
        return pairs

    def sources(self, name: str) -> list[Source]:
        """Return the runs that an adapter comes from."""
        return read_file(DerivedFile, self.folder / name).sources

    def stack(self, names: Sequence[str], adapter: Adapter, began: AdapterState) -> AdapterState:
        """Return every layer's B of chosen adapters, shape (adapters, out, rank), at the scale of a run's adapter.

        Args:
            names: of the adapters.
            adapter: of the run.
            began: the run's adapter as server and sites derive it.

        Raises:
            DataError: the run's A is another than the library's, so that a B of the one means nothing to the other.
        """
        own = {layer: {"A": factors["A"]} for layer, factors in began.items() if "A" in factors}
        if basis_of(own) != self.basis.directions:
            raise DataError(
                f"the adapters of {self.folder} are on another basis than the run's, of {self.basis.words}: set these"
            )
        read = [self.pairs(name).layers for name in names]

        return {layer: {"B": (stacked(read, layer) / adapter.scaling).float()} for layer in own}


def open_library(folder: Path | str) -> Library:
    """Return the library of a folder.

    Raises:
        DataError: it holds none, or ``library.toml`` is not as it was written.
    """
    folder = expanded(folder)
    path = folder / NAME
    if not path.is_file():
        raise DataError(f"{folder} holds no {NAME}: name a library's folder, or make one by 'fedveil library init'")
    return from_json(_File, read_toml(path, "the library"), str(path)).library(folder)


@dataclass(frozen=True)
class _File:
    basis: Basis
    adapters: list[Member] = field(default_factory=list)

    def library(self, folder: Path) -> Library:
        return Library(folder, self.basis, self.adapters)


def init(folder: Path, like: Path) -> Library:
    """Make an empty library with the basis of a finished run's adapter.

    Raises:
        DataError: the folder is not empty, or the run has no adapter on a basis that others can have.
    """
    from fedveil.experiments.evaluate import about_of  # which is in no bundle, as a server's start may be

    check_vacant(folder)
    adapter = like / "adapter"
    about, pairs = about_of(adapter), read_pairs(adapter)
    settings = about.settings
    if settings.get("adapter.start") not in ("orthonormal", "library", "described"):
        raise DataError(
            f"{like} has adapter.start {settings.get('adapter.start')!r}, whose A is the run's own: a library's "
            "adapters have the A of their seed, by 'orthonormal'"
        )
    basis = Basis(
        about.base_model,
        about.base_fingerprint,
        str(settings["adapter.targets"]),
        max(len(factors["A"]) for factors in pairs.layers.values()),
        int(settings["seed"]),
        pairs.basis,
    )
    folder.mkdir(parents=True, exist_ok=True)
    made = Library(folder, basis)
    made.write()
    return made


def add(folder: Path, run: Path, name: str, about: str) -> tuple[Library, list[Source]]:
    """Copy a finished run's adapter into a library, with the run's claim.

    Args:
        folder: the library's.
        run: a run's folder, or that of a derived model.
        name: of the adapter in the library.
        about: what the run's records are, in public words: others choose by it.

    Raises:
        ConfigError: the name is not plain, or the library has it, or ``about`` is empty.
        DataError: the run has no adapter, or one on another basis.
    """
    from fedveil.experiments.evaluate import about_of
    from fedveil.reports.card import NAME as CARD
    from fedveil.reports.derived import sources_of, write_folder

    library = open_library(folder)
    if not PLAIN_NAME.fullmatch(name) or name in {member.name for member in library.adapters}:
        raise ConfigError(f"--name is {name!r}: choose a plain name that the library has not: letters, digits, '-'")
    if not about.strip() or "\n" in about:
        raise ConfigError("--about is empty: say in one line what the run's records are, in words that are public")
    of, pairs = about_of(run / "adapter"), read_pairs(run / "adapter")
    if of.base_fingerprint != library.basis.base_fingerprint or pairs.basis != library.basis.directions:
        raise DataError(
            f"{run} is on another basis than {folder}, of {library.basis.words}, whose A no site trains, as strategy "
            "'ffa-lora' has it"
        )
    check_vacant(folder / name)
    sources = sources_of(run)

    def copied(adapter: Path) -> None:
        for path in sorted((run / "adapter").iterdir()):
            if path.is_file() and path.name != CARD:
                shutil.copyfile(path, adapter / path.name)

    write_folder(folder / name, derived("library add", of.base_model, sources), copied)
    member = Member(name, about.strip(), of.task, pairs.fingerprint)
    library = replace(library, adapters=[*library.adapters, member])
    library.write()
    return library, sources
