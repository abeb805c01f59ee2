"""Two linear maps in a row that are one outside training."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RThenB(nn.Sequential):
    """R, then B; outside training their product at once, as the exported adapter has it.

    In bfloat16 two products round otherwise than one, and a run's accuracy would not be quite its adapter's.
    """

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the maps' output, shape (..., out), of ``hidden``, shape (..., rank)."""
        if self.training:
            return cast(Tensor, super().forward(hidden))
        R, B = (cast(nn.Linear, module).weight for module in self)
        with torch.autocast(hidden.device.type, enabled=False):
            folded = B @ R
        return F.linear(hidden, folded)
