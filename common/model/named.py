"""Named base models: those whose files are known by their hashes, and the table of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from fedveil.common.rows import Table


@dataclass(frozen=True, slots=True)
class Published:
    """A model of the hub of which FedVeil knows a copy."""

    hub: str
    """Its id there."""
    license: str
    """As its authors state it there, by the hub's name for it."""
    differs: str = ""
    """How the copy's weights are others than the hub's; empty: they are the same numbers."""


@dataclass(frozen=True)
class NamedModel:
    """A model known by its name, of which each file has a known hash."""

    name: str
    """What ``model.name`` calls it."""
    files: Mapping[str, str]
    """SHA-256 in hexadecimal of each file, by its path."""
    folder: Callable[[], AbstractContextManager[Path]]
    """Yields a folder with the plain model and its processor, made of those files and nothing else."""
    published: Published


NAMED_MODELS: Table[NamedModel] = Table(
    "models",
    (),
    {
        "all-MiniLM-L6-v2": "models:MINILM_MODEL",
        "SmolLM2-135M-Instruct": "models:SMOLLM2_MODEL",
        "dinov2-small": "models:DINOV2_SMALL_MODEL",
        "whisper-tiny.en": "models:WHISPER_TINY_EN_MODEL",
    },
    "fedveil.demo",
)
"""The models that a policy without ``models`` allows. No other model is known by its hash."""
