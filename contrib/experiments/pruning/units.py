"""Structured pruning of a base model: whole neurons, and whole groups of attention heads, so that it is a stock model.

Zhang, You et al.: Train Small, Infer Large (LoRAM), ICLR 2025. Sites train an adapter on the small model, and it is
recovered onto the large one: with J_o and J_i the selections of a layer's kept outputs and inputs the small layer is
J_o W J_iᵀ, and the recovered change is J_oᵀ ΔW' J_i, zero wherever something was taken out. So the large model with the
pruned units at zero and the recovered adapter computes what the small one does with its own; the large one whole adds
what the units say that no site ever saw. Averaging and recovering commute.

Every layer loses as many neurons and groups, because a stock configuration has one number for all; which, may differ.
The query heads of a group go with its key and value head, however many they are: of a model with grouped queries a
single head cannot be taken out.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedveil.common.errors import ConfigError, ModelError
from fedveil.common.messages.state import Factors
from fedveil.contrib.rules.loraprune import COLUMNS, ROWS

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.(?:self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj(?=\.|$)")
_NAMES = {f"self_attn.{name}_proj" for name in "qkvo"} | {f"mlp.{name}_proj" for name in ("gate", "up", "down")}
_ENDS = ("o", "down")
"""Projections whose inputs are what units give; those of the others are what units take."""
Index = tuple[int, ...]


@dataclass(frozen=True)
class Units:
    """How many units the layers of a model have."""

    groups: int
    """Of heads that share a key and a value head."""
    queries: int
    """Query heads of a group."""
    width: int
    """Numbers of a head."""
    neurons: int
    """Of the gated layer."""


@dataclass(frozen=True)
class Kept:
    """The units that stay, ascending, of every layer in order."""

    groups: tuple[Index, ...]
    neurons: tuple[Index, ...]

    def sides(self, layer: str, units: Units) -> tuple[Index | None, Index | None]:
        """Return the outputs and the inputs of a layer's weight that stay; None: all."""
        found = _role(layer)
        if found is None:
            return None, None
        number, role = found
        if role in ("gate", "up", "down"):
            kept = self.neurons[number]
            return (None, kept) if role == "down" else (kept, None)
        each = units.width * (units.queries if role in "qo" else 1)
        kept = tuple(each * group + i for group in self.groups[number] for i in range(each))
        return (None, kept) if role == "o" else (kept, None)


def units_of(module: nn.Module) -> Units:
    """Return how many units a model's layers have.

    Raises:
        ModelError: it is no model of gated layers with a projection each for queries, keys, values and outputs.
    """
    config: Any = module.config
    ends = {".".join(name.rsplit(".", 2)[-2:]) for name, _ in module.named_modules()}
    if not ends >= _NAMES:
        raise ModelError(
            f"{type(module).__name__} cannot be pruned to a stock model: only those with the layers "
            f"{', '.join(sorted(_NAMES))} can, such as Llama, Mistral and Qwen2"
        )
    heads, groups = int(config.num_attention_heads), int(config.num_key_value_heads)
    width = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    return Units(groups, heads // groups, width, int(config.intermediate_size))


@torch.no_grad()
def by_text(module: nn.Module, texts: Iterable[Tensor], groups: int, neurons: int) -> Kept:
    """Return the units of every layer that add most to what follows, on a text that is no person's record.

    A unit ends in columns of one layer: a neuron in one of ``down_proj``, a group of heads in those of ``o_proj``. Its
    score is the sum over its columns c of E[x_c²] ‖W_c‖², with x_c what reaches the column: the energy that it adds,
    were its numbers not correlated. Wanda (Sun et al., ICLR 2024) scores single weights by the same two factors.

    Args:
        module: the model, in eval mode.
        texts: tokens, shape (1, tokens), at least one text, on the model's device.
        groups: that stay in each layer. neurons: that stay in each layer.

    Raises:
        ConfigError: more units are to stay than there are, or none.
        ModelError: as in ``units_of``.
    """
    units = _checked(module, groups, neurons)
    ends = {found: layer for name, layer in module.named_modules() if (found := _role(name)) and found[1] in _ENDS}
    energy: dict[tuple[int, str], Tensor] = {}

    def watch(end: tuple[int, str]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def see(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            sums = inputs[0].double().square().flatten(0, -2).sum(0)
            energy[end] = energy[end] + sums if end in energy else sums

        return see

    hooks = [layer.register_forward_pre_hook(watch(end)) for end, layer in ends.items()]
    try:
        for tokens in texts:
            module(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    totals: dict[tuple[int, str], Tensor] = {}
    for (number, role), layer in ends.items():
        kind, count = _kind(role, units)
        columns = energy[number, role] * layer.get_parameter("weight").double().square().sum(0)
        totals[number, kind] = columns.reshape(count, -1).sum(1).cpu()
    return _kept(totals, groups, neurons)


def by_scores(module: nn.Module, scores: Mapping[str, Factors], groups: int, neurons: int) -> Kept:
    """Return the units of every layer that a run's scores put first (``contrib.rules.loraprune``).

    A unit's score is the sum over the adapted layers that it goes through. Where all units of a kind stay, no score of
    that kind is needed.

    Raises:
        ConfigError: more units are to stay than there are, or none; or the run has no score of a layer's units.
        ModelError: as in ``units_of``.
    """
    units = _checked(module, groups, neurons)
    totals: dict[tuple[int, str], Tensor] = {}
    for layer, factors in scores.items():
        found = _role(layer)
        if found is None or ROWS not in factors:
            continue
        number, role = found
        of_side = factors[COLUMNS if role in _ENDS else ROWS].double()
        kind, count = _kind(role, units)
        totals[number, kind] = totals.get((number, kind), 0) + of_side.reshape(count, -1).sum(1)
    layers = int(module.config.num_hidden_layers)  # type: ignore[union-attr,arg-type]
    for kind, wanted, most in (("groups", groups, units.groups), ("neurons", neurons, units.neurons)):
        for number in range(layers):
            if wanted == most:
                totals[number, kind] = torch.ones(most, dtype=torch.float64)
            elif (number, kind) not in totals:
                raise ConfigError(
                    f"the run has no score of the {kind} of layer {number}: run it with server.rule = 'loraprune' "
                    "and adapter.targets that go through them, such as 'v_proj,down_proj'"
                )
    return _kept(totals, groups, neurons)


def _role(layer: str) -> tuple[int, str] | None:
    """Return the number of a projection's layer and the projection's letter or word; None: it is no projection."""
    match = _LAYER.search(layer)
    return match and (int(match[1]), match[2])


def _kind(role: str, units: Units) -> tuple[str, int]:
    """Return which units go through a projection, and how many a layer has."""
    return ("neurons", units.neurons) if role in ("gate", "up", "down") else ("groups", units.groups)


def _checked(module: nn.Module, groups: int, neurons: int) -> Units:
    units = units_of(module)
    for name, wanted, most in (("--groups", groups, units.groups), ("--neurons", neurons, units.neurons)):
        if not 1 <= wanted <= most:
            raise ConfigError(f"{name} is {wanted}, and a layer has {most}: name how many of them stay")
    return units


def _kept(totals: Mapping[tuple[int, str], Tensor], groups: int, neurons: int) -> Kept:
    layers = 1 + max(number for number, _ in totals)
    return Kept(
        tuple(_longest(totals[number, "groups"], groups) for number in range(layers)),
        tuple(_longest(totals[number, "neurons"], neurons) for number in range(layers)),
    )


def _longest(scores: Tensor, count: int) -> Index:
    chosen: list[int] = scores.argsort(descending=True, stable=True)[:count].sort().values.tolist()
    return tuple(chosen)


def pruned(module: nn.Module, kept: Kept) -> nn.Module:
    """Return a stock model of the same class with the kept units alone, in the same precision and eval mode.

    Raises:
        ModelError: as in ``units_of``, or layers differ in how many units they keep.
    """
    units = units_of(module)
    counts = {len(index) for index in kept.groups}, {len(index) for index in kept.neurons}
    if any(len(count) != 1 for count in counts):
        raise ModelError("layers keep different numbers of units, for which a stock configuration has no place")
    config: Any = copy.deepcopy(module.config)
    config.num_key_value_heads = counts[0].pop()
    config.num_attention_heads = units.queries * config.num_key_value_heads
    config.head_dim = units.width
    config.intermediate_size = counts[1].pop()
    small: nn.Module = type(module)(config).to(next(module.parameters()).dtype)
    small.load_state_dict({name: _cut(tensor, name, kept, units) for name, tensor in module.state_dict().items()})
    return small.eval().requires_grad_(False)


def _cut(tensor: Tensor, name: str, kept: Kept, units: Units) -> Tensor:
    rows, columns = kept.sides(name, units)
    if rows is not None:
        tensor = tensor[list(rows)]
    if columns is not None and tensor.dim() == 2:  # a bias belongs to the outputs
        tensor = tensor[:, list(columns)]
    return tensor.clone()


def recovered(pair: Mapping[str, Tensor], shape: Sequence[int], rows: Index | None, columns: Index | None) -> Factors:
    """Return LoRA's pair of a small layer in the large one's coordinates; zero wherever something was taken out.

    Args:
        pair: ``A``, shape (rank, kept inputs), and ``B``, shape (kept outputs, rank).
        shape: (out, in) of the large layer.
        rows: its kept outputs. columns: its kept inputs. None: all.
    """
    A, B = pair["A"], pair["B"]
    large_A, large_B = A.new_zeros(A.shape[0], shape[1]), B.new_zeros(shape[0], B.shape[1])
    large_A[:, slice(None) if columns is None else list(columns)] = A
    large_B[slice(None) if rows is None else list(rows)] = B
    return {"A": large_A, "B": large_B}
