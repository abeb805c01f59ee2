"""Bundles as Flower builds them of the code in this checkout."""

from __future__ import annotations

from flwr.cli.build import build_fab_from_files

from fedveil.common.bundle import PROJECT, files_of


def own_bundle(**replaced: str) -> bytes:
    """Return the bundle that Flower builds of this version, with the texts of some files replaced."""
    files = files_of(PROJECT) | {path.replace("__", "/") + ".py": text.encode() for path, text in replaced.items()}
    return build_fab_from_files(files)[0]
