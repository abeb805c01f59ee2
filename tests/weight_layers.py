"""A layer whose weight is noised."""

from __future__ import annotations

from torch import Tensor

Layer = dict[str, Tensor]

RANK, ALPHA, STD = 3, 6.0, 0.7
