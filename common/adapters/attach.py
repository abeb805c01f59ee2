"""An adapter in a base model: PEFT's injection, the initial factors, and reading and writing them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from fedveil.common.adapters.base import Adapter, Place, lora_config, parameters_of
from fedveil.common.adapters.layers import base_weight, layer_shape, layers_of
from fedveil.common.adapters.mapped import Mapped
from fedveil.common.adapters.targets import is_named, targets_in
from fedveil.common.errors import ConfigError, ModelError, ProtocolError
from fedveil.common.foreign_words import PEFT_OLD_NAME
from fedveil.common.messages.state import AdapterState, Factors

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer


def attach(adapter: Adapter, base: nn.Module, seed: int) -> PeftModel:
    """Put an adapter into ``base`` (in place), freeze everything else, and set the initial factors.

    Raises:
        ModelError: no layer of ``base`` is called by one of ``target_modules``, or ``auto`` finds no attention.
        ConfigError: the rank is larger than the smaller side of an adapted layer.
    """
    if not adapter.trained:
        return cast("PeftModel", base.requires_grad_(False))
    model = _injected(adapter, base)
    for name, layer in layers_of(model).items():
        if adapter.rank > (most := min(layer_shape(layer))):
            out, into = layer_shape(layer)
            raise ConfigError(
                f"adapter.rank is {adapter.rank}, but {name} is {out} × {into}: choose a rank of at most {most}"
            )
    adapter.prepare(model)
    for name, layer in layers_of(model).items():
        device = cast(Tensor, layer.get_base_layer().weight).device
        places = adapter.places(layer)
        for factor, tensor in initial_factors(adapter, name, layer, seed).items():
            if factor not in places:  # another layer has it
                continue
            module, attribute = places[factor]
            trained = factor in adapter.trained
            setattr(module, attribute, nn.Parameter(tensor.to(device, torch.float32), requires_grad=trained))
    return model


def _injected(adapter: Adapter, base: nn.Module) -> PeftModel:
    """Return the model with PEFT's layers, or ours, in place of the adapted ones."""
    from peft import get_peft_model

    named = replace(adapter, target_modules=targets_in(base, adapter.target_modules))
    transposed = any(
        type(module).__name__ == "Conv1D" and is_named(name, named.target_modules)
        for name, module in base.named_modules()
    )
    config = lora_config(named, fan_in_fan_out=transposed)
    if isinstance(adapter, Mapped):
        from fedveil.common.adapters.layer import AdaptedLinear

        # Every kind of layer, so that one that cannot be adapted is refused and not left to PEFT's own.
        config._register_custom_module({nn.Module: AdaptedLinear})
    try:
        with pefts_old_names():
            return cast("PeftModel", get_peft_model(base, config))
    except ValueError as error:
        raise ModelError(
            f"adapter.targets {','.join(named.target_modules)!r} do not fit {type(base).__name__}: "
            f"{str(error).partition(chr(10))[0]}"
        ) from error


def initial_factors(adapter: Adapter, layer_name: str, layer: LoraLayer, seed: int) -> Factors:
    """Return the factors of one layer as server and sites derive them, before anything is measured (float32, CPU).

    Raises:
        ModelError: the adapter was made without a start.
    """
    if adapter.origin is None:
        raise ModelError(
            f"the {adapter.name} adapter was made without a start: give it a row of fedveil.common.starts.STARTS"
        )
    out, into = layer_shape(layer)
    place = Place(layer_name, out, into, adapter.rank, seed, lambda: base_weight(layer).double().cpu().clone())
    zeros = {factor: torch.zeros(shape) for factor, shape in adapter.shapes(out, into).items()}
    factors = {**zeros, **adapter.constants(place)}
    return {**factors, **adapter.begin(adapter.origin.factors(place, adapter.directions), factors)}


def read_factors(adapter: Adapter, model: nn.Module) -> AdapterState:
    """Return a copy of all factors (float32, CPU)."""
    return {
        name: {factor: weight.detach().float().cpu().clone() for factor, weight in factors.items()}
        for name, factors in parameters_of(adapter, model).items()
    }


def write_factors(adapter: Adapter, model: nn.Module, state: AdapterState) -> None:
    """Copy ``state`` (any part of the factors) into the model.

    Raises:
        ProtocolError: a layer or factor is unknown, or a shape differs; nothing is written then.
    """
    parameters = parameters_of(adapter, model)
    for layer, factors in state.items():
        for factor, tensor in factors.items():
            parameter = parameters.get(layer, {}).get(factor)
            if parameter is None:
                raise ProtocolError(f"the {adapter.name} adapter has no factor {factor!r} in layer {layer!r}")
            if parameter.shape != tensor.shape:
                raise ProtocolError(
                    f"{layer}.{factor} has shape {tuple(tensor.shape)}, the model wants {tuple(parameter.shape)}"
                )
    with torch.no_grad():
        for layer, factors in state.items():
            for factor, tensor in factors.items():
                parameters[layer][factor].copy_(tensor)


@contextmanager
def pefts_old_names() -> Iterator[None]:
    """Hide what PEFT is warned of for using an old name of transformers, which we cannot change."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", PEFT_OLD_NAME, FutureWarning)
        yield


def target_shapes(base: nn.Module, target_modules: Sequence[str]) -> list[tuple[int, int]]:
    """Return (out, in) of every layer of a stock base model that an adapter on ``target_modules`` would change.

    None if these fit no layer.
    """
    try:
        names = targets_in(base, target_modules)
    except ModelError:
        return []
    shapes = []
    for name, module in base.named_modules():
        if not is_named(name, names):
            continue
        if isinstance(module, nn.Linear):
            shapes.append((module.out_features, module.in_features))
        elif type(module).__name__ == "Conv1D":
            into, out = cast(Tensor, module.weight).shape
            shapes.append((out, into))
    return shapes
