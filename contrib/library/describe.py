"""The nearest adapters of a library by public descriptions: SG-LoRA's choice of experts, in closed form.

Descriptions are embedded by MiniLM, which comes with FedVeil, whatever the run's base model is. Of the ``top`` nearest
by cosine each has the weight softmax(cosine / temperature). SG-LoRA takes CLIP's embeddings, and draws the adapter from
a conditional generator around the weighted mean, which learns from hundreds of experts; here the mean itself begins.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fedveil.common.model.base import load_base_model

EMBEDDER = "all-MiniLM-L6-v2"
LONGEST = 128
"""Tokens of a description."""


@torch.no_grad()
def embedded(texts: Sequence[str]) -> Tensor:
    """Return an embedding of length 1 of each text, shape (texts, width), float64."""
    base = load_base_model(EMBEDDER, "classification")
    rows = []
    for text in texts:  # each by itself: what one is does not follow from the others
        batch = base.processor([text], truncation=True, max_length=LONGEST, return_tensors="pt")
        hidden = base.module(**batch).last_hidden_state.double()[0]
        rows.append(F.normalize(hidden.mean(0), dim=0))
    return torch.stack(rows)


def nearness(wanted: str, descriptions: Sequence[str]) -> list[float]:
    """Return the cosine of each description to what is wanted, -1 to 1."""
    own, *others = embedded([wanted, *descriptions])
    return [float(own @ other) for other in others]


def weights(cosines: Sequence[float], top: int, temperature: float) -> list[float]:
    """Return the weight of each, which sum to 1: of the ``top`` nearest softmax(cosine / temperature), else 0.

    >>> [round(weight, 3) for weight in weights([0.9, 0.1, 0.8], 2, 0.1)]
    [0.731, 0.0, 0.269]
    """
    values = torch.tensor(cosines, dtype=torch.float64)
    chosen = sorted(range(len(cosines)), key=lambda number: (-cosines[number], number))[:top]
    shares = (values[chosen] / temperature).softmax(0)
    return torch.zeros_like(values).scatter(0, torch.tensor(chosen), shares).tolist()
