"""Keep model hubs out of this process: it runs what was installed."""

from __future__ import annotations

import sys

CODE_LOADER = "kernels"
"""The package that downloads compiled code and runs it; bitsandbytes asks it at its import, without being told to."""


def bar_code() -> None:
    """Let no library load compiled code from a hub, from its cache neither: each has a way of its own without."""
    sys.modules[CODE_LOADER] = None  # type: ignore[assignment]  # Python's own word for a package that is not there
