"""Costs of rows under a run's base model, without the adapter: computed once and kept in the record."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fedveil.common.errors import ConfigError
from fedveil.common.files import expanded
from fedveil.common.tasks.base import KEPT, Record

CARD = "README.md"
"""The file of a model's card."""

if TYPE_CHECKING:
    from torch import nn

    from fedveil.common.model.federated import FederatedModel


@contextmanager
def adapter_off(encoder: nn.Module) -> Iterator[None]:
    """Let the layers of an encoder compute as those of its base model; what requires a gradient stays so."""
    # PEFT's own way makes all factors require a gradient afterwards, frozen ones too.
    layers: list[Any] = [layer for layer in encoder.modules() if hasattr(layer, "_disable_adapters")]
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer._disable_adapters = was


def costs_of(model: FederatedModel, rows: Sequence[Record], length: int) -> list[float]:
    """Return the loss of each row of one record, in a batch of theirs alone that is ``length`` tokens long."""
    import torch

    with torch.no_grad():
        return [float(cost) for cost in model.losses(model.fixed_batch(rows, length, len(rows))).double()]


def kept_costs(model: FederatedModel, record: Record, rows: Sequence[Record], length: int) -> list[float]:
    """Return the same of the base model; the record keeps them from the first time on."""
    if KEPT not in record:
        with adapter_off(model.module.encoder):
            record[KEPT] = costs_of(model, rows, length)
    costs: list[float] = record[KEPT]
    return costs


def check_reference(name: str) -> None:
    """Refuse a base model that was made of a run without a claim, whose records its likelihoods would tell of.

    Args:
        name: as ``model.name``; the card in a folder of ``fedveil merge`` says what the run claimed.

    Raises:
        ConfigError: it was.
    """
    import yaml

    card = expanded(name) / CARD
    if not card.is_file():
        return
    try:
        head = yaml.safe_load(card.read_text(encoding="utf-8").split("---\n")[1])
    except (OSError, UnicodeDecodeError, IndexError, yaml.YAMLError):
        return  # a card of somebody else's
    claim = head.get("differential_privacy") if isinstance(head, dict) else None
    if isinstance(claim, dict) and claim.get("claim") == "none":
        raise ConfigError(
            f"the base model {name!r} was trained on records by a run that has no claim, so it cannot be the reference "
            "of preference.loss 'dpo': start from one that promises its records privacy"
        )
