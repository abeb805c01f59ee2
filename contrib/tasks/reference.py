"""Costs of rows under a run's base model, without the adapter: computed once and kept in the record."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedveil.common.errors import ConfigError, DataError
from fedveil.common.tasks.base import KEPT, Record

if TYPE_CHECKING:
    from torch import nn

    from fedveil.common.derived import Source
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


def claimed_in(config: Mapping[str, Any], what: str, use: str) -> list[Source]:
    """Return the runs that a model was made from; ``fedveil merge`` writes them into its configuration.

    Raises:
        ConfigError: one has no claim, so that the model's answers would tell of its records.
        DataError: what the model says of runs is not as it was written.
    """
    from fedveil.common.derived import sources_in  # a command line that only helps imports no account

    sources = sources_in(config)
    if bare := [source.run for source in sources if source.epsilon in (None, math.inf)]:
        raise ConfigError(
            f"{what} was trained on records by run {bare[0]}, which has no claim, so it cannot be {use}: take one that "
            "promises its records privacy, or one that is public"
        )
    return sources


def claimed_in_folder(folder: Path, what: str, use: str) -> list[Source]:
    """Return the runs that the model in a folder was made from; errors as ``claimed_in``'s."""
    from fedveil.common.strict_json import json_of

    try:
        config = json_of((folder / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(
            f"{folder / 'config.json'} cannot be read ({type(error).__name__}): merge the run again"
        ) from error
    return claimed_in(config if isinstance(config, dict) else {}, what, use)
