"""Canary records: the gradient of each lies along one axis of all that a model trains, and is longer than the clip.

Then a step adds one clip norm to that number if the record was in, noise to every number, and nothing
else: no record can be told better than that, so what is measured with them is the worst case.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Dirac:
    """Losses of canary records for a module whose trained parameters are all of ``nn.Linear`` layers.

    Axes count the trained numbers, in the order of ``module.parameters()``.

    Args:
        module: the model; its layers are called one by one, so that hooks on them see each record.
        length: of every record's gradient, before the clip.
    """

    def __init__(self, module: nn.Module, length: float) -> None:
        self.length = length
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        starts = torch.tensor([0, *(p.numel() for p in self.parameters)]).cumsum(0).tolist()
        start = {id(p): at for p, at in zip(self.parameters, starts, strict=False)}
        self.size = int(starts[-1])
        """Number of axes."""
        linears = [child for child in module.modules() if isinstance(child, nn.Linear)]
        self._layers = [
            (linear, start.get(id(linear.weight)), start.get(id(linear.bias)))
            for linear in linears
            if id(linear.weight) in start or id(linear.bias) in start
        ]

    def __call__(self, axes: Tensor) -> Tensor:
        """Return one loss per record, shape (records,); a step against it makes the number of its axis grow.

        Args:
            axes: int64, shape (records,): each record's axis.
        """
        loss = torch.zeros(len(axes))
        for linear, weight, bias in self._layers:
            inputs, rows, active = torch.zeros(len(axes), linear.in_features), torch.zeros_like(axes), axes < 0
            if weight is not None:
                inside = (axes >= weight) & (axes < weight + linear.weight.numel())
                at = axes[inside] - weight
                inputs[inside.nonzero()[:, 0], at % linear.in_features] = 1.0
                rows[inside], active = at // linear.in_features, active | inside
            if bias is not None:
                inside = (axes >= bias) & (axes < bias + linear.bias.numel())
                rows[inside], active = axes[inside] - bias, active | inside
            loss = loss - self.length * active * linear(inputs).gather(1, rows[:, None])[:, 0]
        return loss
