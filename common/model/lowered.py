"""Frozen weights in the precision of the forward pass, for as long as many small passes are made.

Autocast casts a frozen weight again in every pass. Private passes are small (``common.model.shapes``), and there that
is seven percent of the time (MiniLM, bfloat16, 384 tokens). The numbers are those that autocast makes, so nothing else
changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from fedveil.common.adapters.folded import RThenB


@contextmanager
def lowered(module: nn.Module, precision: torch.dtype) -> Iterator[None]:
    """Hold the frozen weights of the linear layers under ``module`` in ``precision``; put them back afterwards.

    Weights that something else than a linear layer uses as well, such as an embedding that is also the output
    layer, stay as they are, and so do those whose product is made first (``RThenB``) and those in float64, for which
    there is no autocast. Every other linear layer under ``module`` must run under autocast to ``precision``.
    """
    shared = {id(p) for child in module.modules() if type(child) is not nn.Linear for p in child.parameters(False)}
    shared |= {id(p) for child in module.modules() if isinstance(child, RThenB) for p in child.parameters()}
    frozen = [
        parameter
        for child in module.modules()
        if type(child) is nn.Linear
        for parameter in child.parameters(False)
        if not parameter.requires_grad and id(parameter) not in shared
        if parameter.dtype not in (precision, torch.float64)
    ]
    before = [parameter.data for parameter in frozen]
    try:
        for parameter in frozen:
            parameter.data = parameter.data.to(precision)
        yield
    finally:
        for parameter, data in zip(frozen, before, strict=True):
            parameter.data = data
