"""Libraries that take a second or more to import, loaded on their first use.

Rows of tables import them from here, so that a command that only asks what rows there are does not wait for them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch
    import torch.nn.functional as F
    from torch import nn
else:

    class _Later:
        """A module, as far as its attributes go."""

        def __init__(self, name: str) -> None:
            self._name = name

        def __getattr__(self, attribute: str) -> Any:
            return getattr(import_module(self._name), attribute)

    np, torch, nn, F = map(_Later, ("numpy", "torch", "torch.nn", "torch.nn.functional"))

__all__ = ["F", "nn", "np", "torch"]
