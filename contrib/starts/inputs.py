"""A record's moments of what reaches the adapted layers, taken once for each distinct input.

A record's statistic is the mean over its tokens of x̂ x̂ᵀ, where x̂ is a token brought to length 1: a symmetric matrix of
trace 1, and so of Frobenius norm at most 1, whatever the record holds. It is also the gradient of one more linear map
P, from x̂ to as many numbers, of ``mean over t of ⟨x̂ₜ, P x̂ₜ⟩``, in which x̂ₜ counts as a constant. So a site clips,
sums and noises it by the steps that it trains by, and no tensor needs a rule of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedveil.common.adapters import Place
from fedveil.common.adapters.layers import layer_shape, layers_of
from fedveil.common.config.run import RunConfig
from fedveil.common.errors import ModelError
from fedveil.common.messages.blocks import Layout
from fedveil.common.messages.state import AdapterState, Factors
from fedveil.common.model.federated import FederatedModel
from fedveil.common.starts.base import Labels, Start, seeded
from fedveil.common.starts.directions import leading_rows
from fedveil.common.starts.gradient import shapes_of
from fedveil.common.tasks import Batch

MASK = "attention_mask"
"""What a batch calls the tensor, shape (records, tokens), that is 0 where a token is padding."""


@dataclass(frozen=True)
class OfInputs(Start):
    """A start whose A is made of the sites' moments; which records, and at what price, the row says."""

    from_seed: ClassVar[tuple[str, ...]] = ("B",)

    def factors(self, place: Place, wanted: Collection[str]) -> Factors:
        """Return orthonormal directions, which hold until the moments are there."""
        return seeded(place, wanted)

    def layout(self, model: FederatedModel) -> Layout:
        """Return ``M``, shape (in (in + 1) / 2,), of every distinct input, by the first layer that takes it."""
        return {name: {"M": (width * (width + 1) // 2,)} for name, width in _widths(model).items()}

    def complete(
        self, model: FederatedModel, config: RunConfig, labels: Labels, statistic: AdapterState
    ) -> AdapterState:
        """Return the moment of each layer's input: layers that share one share A."""
        del config, labels
        return {layer: statistic[first] for layer, first in shared_inputs(model).items()}

    def from_statistic(self, statistic: Factors, rank: int) -> Factors:
        """Return A from an eigendecomposition in float64, signs fixed."""
        return {"A": leading_rows(unpacked(statistic["M"]), rank).float()}


@torch.no_grad()
def shared_inputs(model: FederatedModel) -> dict[str, str]:
    """Return each adapted layer with the first one that takes the same input, as a made-up record tells.

    It follows from how the model is built, so that the server and all sites find the same.
    """
    first: dict[int, tuple[str, Any]] = {}
    found: dict[str, str] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def note(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            # The tensor is kept, so that no other gets its id.
            found[name] = first.setdefault(id(inputs[0]), (name, inputs[0]))[0]

        return note

    layers = layers_of(model.peft_model)
    hooks = [cast(nn.Module, layer).register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    was_training = model.module.training
    model.module.eval()
    try:
        made_up = model.collator.inventor(model.base, model.max_length)(min(4, model.max_length), 0, 0)
        model.losses(model.batch([made_up]))
    finally:
        model.module.train(was_training)
        for hook in hooks:
            hook.remove()
    return {name: found[name] for name in layers if name in found}


@contextmanager
def unit_tokens(model: FederatedModel, firsts: Iterable[str], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Show ``see`` the input of each of these layers in every pass, before the layer has it.

    It is given the layer's name and the input's tokens, each divided by its length: shape (records, tokens, in),
    float32, without a graph. Padding is among them.
    """

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def show(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            with torch.enable_grad(), torch.autocast(model.device.type, enabled=False):
                tokens = inputs[0].detach().float()
                see(name, F.normalize(tokens if tokens.dim() == 3 else tokens.flatten(1, -2)[:, None], dim=-1))

        return show

    layers = layers_of(model.peft_model)
    hooks = [cast(nn.Module, layers[name]).register_forward_pre_hook(watch(name)) for name in firsts]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def open_moments(model: FederatedModel) -> Iterator[dict[str, nn.Parameter]]:
    """Let one more map for each distinct input take a gradient, and nothing else; put everything back afterwards.

    Inside it ``model.losses`` is linear in the maps, and a record's gradient of a map, shape (in, in), is the record's
    statistic. The maps are at 0 and add nothing to the model.

    Yields:
        The maps' weights by the first layer that takes the input.
    """
    maps = {name: nn.Linear(n, n, bias=False, device=model.device) for name, n in _widths(model).items()}
    # A layer with fewer outputs than inputs has a smaller gradient than its input has a moment.
    size = sum(linear.weight.numel() * linear.weight.element_size() for linear in maps.values())
    model.initial_shapes = model.initial_shapes or shapes_of(model, size)
    before = [(p, p.requires_grad) for p in model.module.parameters()]
    seen: dict[str, Tensor] = {}

    def see(name: str, tokens: Tensor) -> None:
        seen[name] = (tokens * maps[name](tokens)).sum(-1)

    def statistic(batch: Batch) -> Tensor:
        shown = dict(seen)
        seen.clear()
        if set(shown) != set(maps):
            raise ModelError("an adapted layer has no input in this pass: choose another start, or other layers")
        return torch.stack([(values * token_weights(batch, values)).sum(1) for values in shown.values()]).sum(0)

    for linear in maps.values():
        nn.init.zeros_(linear.weight)
    model.module.requires_grad_(False)
    model.module.add_module("moments", nn.ModuleList(maps.values()))
    model.statistic = statistic
    try:
        with unit_tokens(model, maps, see):
            yield {name: cast(nn.Parameter, linear.weight) for name, linear in maps.items()}
    finally:
        model.statistic = None
        del model.module.moments
        for parameter, wanted in before:
            parameter.requires_grad_(wanted)


def token_weights(batch: Batch, tokens: Tensor) -> Tensor:
    """Return what each token counts in its record's mean: one over their number, and 0 for padding.

    Args:
        batch: as it passes the model.
        tokens: whose first two dimensions are (records, tokens).

    Raises:
        ModelError: a layer's input has another number of tokens than the batch, so that padding cannot be found.
    """
    mask = batch.get(MASK)
    if mask is None or tokens.shape[1] == 1:
        return tokens.new_full(tokens.shape[:2], 1 / tokens.shape[1])
    if mask.shape != tokens.shape[:2]:
        raise ModelError(
            f"an adapted layer has {tokens.shape[1]} tokens of a record where the batch has {mask.shape[1]}, so that "
            "padding cannot be left out: choose another start, or other adapter.targets"
        )
    real = mask.to(tokens.dtype)
    return real / real.sum(1, keepdim=True).clamp(min=1)


def mean_moments(model: FederatedModel, parts: Iterable[Batch]) -> AdapterState:
    """Return the mean of the records' statistics, ``M`` of shape (in, in) for each distinct input. No privacy.

    Raises:
        ModelError: there is no record.
    """
    seen: dict[str, Tensor] = {}
    totals: dict[str, Tensor] = {}
    records = 0
    with torch.no_grad(), unit_tokens(model, _widths(model), seen.__setitem__):
        for part in parts:
            records += len(model.losses(part))
            for name, tokens in seen.items():
                weighed = (tokens * token_weights(part, tokens)[..., None]).flatten(0, 1).double()
                totals[name] = totals.get(name, 0) + weighed.T @ tokens.flatten(0, 1).double()
            seen.clear()
    if not records:
        raise ModelError("the moments of inputs need at least one record: raise start.sample-rate")
    return {name: {"M": (total / records).float().cpu()} for name, total in totals.items()}


def packed(matrix: Tensor) -> Tensor:
    """Return the symmetric part of an (n, n) matrix as n (n + 1) / 2 numbers, whose norm is its Frobenius norm.

    They are the diagonal and √2 times what is above it.

    >>> packed(torch.tensor([[1.0, 2.0], [0.0, 3.0]]))
    tensor([1.0000, 3.0000, 1.4142])
    """
    symmetric = (matrix + matrix.T) / 2
    above = torch.triu_indices(len(matrix), len(matrix), offset=1)
    return torch.cat([symmetric.diagonal(), math.sqrt(2) * symmetric[above[0], above[1]]])


def unpacked(numbers: Tensor) -> Tensor:
    """Return the symmetric matrix, float64, of which ``packed`` made these numbers.

    >>> unpacked(packed(torch.tensor([[1.0, 2.0], [2.0, 3.0]]))).round(decimals=4)
    tensor([[1., 2.],
            [2., 3.]], dtype=torch.float64)
    """
    size = (math.isqrt(8 * len(numbers) + 1) - 1) // 2
    numbers = numbers.double()
    matrix = torch.diag(numbers[:size])
    above = torch.triu_indices(size, size, offset=1)
    matrix[above[0], above[1]] = matrix[above[1], above[0]] = numbers[size:] / math.sqrt(2)
    return matrix


def _widths(model: FederatedModel) -> dict[str, int]:
    """Return the numbers of each distinct input, by the first layer that takes it."""
    layers = layers_of(model.peft_model)
    return {name: layer_shape(layers[name])[1] for name in sorted(set(shared_inputs(model).values()))}
