"""A site without records, which pays for rounds."""

from __future__ import annotations

from pathlib import Path

from fedveil.client.policy import Policy
from fedveil.client.site import Site
from fedveil.common.tasks.examples import Dataset


def clinic(folder: Path, policy: Policy | None = None) -> Site:
    data = Dataset("ward", (), ("bad", "good"))
    return Site("ward", data, "ward", 2000, folder / "ledger.sqlite", policy or Policy())
