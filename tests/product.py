"""The folders of the product."""

from __future__ import annotations

PRODUCT = (
    "fedveil",
    "common",
    "privacy",
    "demo",
    "strategies",
    "client",
    "server",
    "reports",
    "deploy",
    "experiments",
    "cli",
    "contrib",
)
