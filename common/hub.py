"""Model hubs: a process asks one only for what its own command named, and runs no code from one."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

HUB = "hub:"
"""What stands before a name that a command wants fetched."""
CODE_LOADER = "kernels"
"""The package that downloads compiled code and runs it; bitsandbytes asks it at its import, without being told to."""
CLOSED = {
    **dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"), "1"),
    **dict.fromkeys(("HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK"), "1"),
    "RAY_USAGE_STATS_ENABLED": "0",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
"""Environment variables by which libraries ask no hub, send no telemetry and install nothing at run time."""
_OFFLINE = ("huggingface_hub.constants", "HF_HUB_OFFLINE"), ("datasets.config", "HF_HUB_OFFLINE")
"""Where libraries keep what they read of those variables at their import."""
_named: set[str] = set()
_forbidden = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
"""Whether the hub was closed before: by the user, or by the process of FedVeil's that started this one."""


def close() -> None:
    """Close hubs to this process and all that it starts, whatever the environment says or was imported before."""
    os.environ.update(CLOSED)
    _set_offline(value=True)
    sys.modules[CODE_LOADER] = None  # type: ignore[assignment]  # Python's own word for a package that is not there


def name_sources(sources: Iterable[str]) -> None:
    """Let this process fetch sources that its own command named as ``hub:NAME``."""
    _named.update(sources)


@contextmanager
def opened(source: str) -> Iterator[None]:
    """Let libraries ask the hub for a source that this process's command named; any other comes from the cache."""
    import datasets
    import huggingface_hub

    del datasets, huggingface_hub  # imported first, since they read the variables once
    if source not in _named or _forbidden:
        yield
        return
    try:
        _set_offline(value=False)
        yield
    finally:
        _set_offline(value=True)


def _set_offline(*, value: bool) -> None:
    for module, name in _OFFLINE:
        if module in sys.modules:
            setattr(sys.modules[module], name, value)
