"""The layers that ``adapter.targets`` names: what its words stand for in a model, and which names would fit.

A name is the last part of a layer's, as PEFT's ``target_modules`` has it: ``query`` is every layer called
``...attention.self.query``. It has more parts where the last one alone would be another layer's as well.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from torch import nn

from fedveil.common.check import nearest
from fedveil.common.errors import ModelError

AUTO = "auto"
"""What ``adapter.targets`` calls the projections to queries and values, however the model names them."""
VALUES = "values"
"""What it calls those to values alone."""
ALL_LINEAR = "all-linear"
"""What it calls the linear layers of all blocks, as PEFT does."""
STOCK = ("pooler.dense",)
"""Layers that a stock model has and ours may have been loaded without: an export names none of them."""
QUERY, KEY, VALUE = ({"q", "query", "wq"}, {"k", "key", "wk"}, {"v", "value", "wv"})
"""Words of which the name of a layer has one that makes a token's query, key or value."""
FUSED = {"qkv", "wqkv", "c_attn", "in_proj", "query_key_value"}
"""Of a layer that makes all three at once: a word of its name, or the whole of it."""
MOST_NAMES = 12
"""Names that a message lists."""


def targets_in(base: nn.Module, names: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the layers to adapt in a model: ``names``, or what a word means there.

    Raises:
        ModelError: no layer has such a name, or no attention or block is found; the message names what would fit.
    """
    if len(names) == 1 and names[0] in KINDS:
        return KINDS[names[0]](base)
    if not any(is_named(name, names) for name, _ in base.named_modules()):
        try:
            stands = f"'{AUTO}', which is {','.join(auto_targets(base))!r} there, or to "
        except ModelError:
            stands = ""
        raise ModelError(
            f"adapter.targets {','.join(names)!r} fit no layer of {type(base).__name__}"
            f"{nearest(names[0], [*_linear_names(base), *KINDS])}: set it to {stands}some of {_listed(base)}"
        )
    return tuple(names)


def is_named(layer: str, names: Collection[str]) -> bool:
    """Return whether a layer is one of ``names`` as PEFT reads them: its whole name, or the end of it after a dot."""
    return any(f".{layer}".endswith(f".{name}") for name in names)


def auto_targets(base: nn.Module) -> tuple[str, ...]:
    """Return the names of the layers that make queries and values, or queries, keys and values at once.

    They are those of PEFT's own table of model types; where it lacks the type, or names layers that the model does
    not have, they are found by structure: linear layers of one module and one width of input, named for query, key
    and value; else a layer named for all three.

    Raises:
        ModelError: there are none.
    """
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    linear = _linear_names(base)
    listed = KNOWN.get(str(getattr(getattr(base, "config", None), "model_type", "")), ())
    if not isinstance(listed, str) and (there := tuple(name for name in listed if name in linear)):
        return there
    if names := _by_structure(base):
        return names
    raise ModelError(
        f"adapter.targets {AUTO!r} finds no layer of {type(base).__name__} that makes queries and values: "
        f"name some of {_listed(base)}"
    )


def value_targets(base: nn.Module) -> tuple[str, ...]:
    """Return the names of those layers of ``auto_targets`` that make values; it raises the same errors.

    Where one layer makes queries, keys and values at once, it is that.
    """
    names = auto_targets(base)
    apart = tuple(name for name in names if _words(name) & VALUE)
    return apart or tuple(name for name in names if _words(name) & FUSED or name.lower() in FUSED) or names


def linear_targets(base: nn.Module) -> tuple[str, ...]:
    """Return the shortest names that are of every linear layer in a model's blocks and of no other module.

    Blocks are what a model numbers: ``encoder.layer.0``. A pooler, a head and outputs over a vocabulary are in none.

    Raises:
        ModelError: no linear layer is in a block.
    """
    names = [name for name, _ in base.named_modules() if name]
    inside = [name for name in _linear(base) if any(part.isdigit() for part in name.split(".")[:-1])]
    if not inside:
        raise ModelError(
            f"adapter.targets {ALL_LINEAR!r} finds no block with linear layers in {type(base).__name__}: "
            f"name some of {_listed(base)}"
        )
    others = {*names, *STOCK} - set(inside)
    return tuple(dict.fromkeys(_shortest(name, others) for name in inside))


def _shortest(name: str, others: Collection[str]) -> str:
    parts = name.split(".")
    ends = (".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1))
    return next((end for end in ends if not any(is_named(other, (end,)) for other in others)), name)


def _by_structure(base: nn.Module) -> tuple[str, ...]:
    apart: dict[str, None] = {}
    fused: dict[str, None] = {}
    for module in base.modules():
        inputs = {name: _inputs(child) for name, child in module.named_children() if _is_linear(child)}
        threes = {name for name in inputs if _words(name) & FUSED or name.lower() in FUSED}
        fused.update(dict.fromkeys(sorted(threes)))
        roles = [
            # The shortest of several: others, such as query_global, are for what only some tokens do.
            min((n for n in inputs if n not in threes and _words(n) & role), key=lambda n: (len(n), n), default="")
            for role in (QUERY, KEY, VALUE)
        ]
        if all(roles) and len({inputs[name] for name in roles}) == 1:
            apart.update(dict.fromkeys((roles[0], roles[2])))
    return tuple(apart or fused)


def _linear_names(base: nn.Module) -> dict[str, int]:
    """Return the last part of the name of every linear layer, and how many layers have it; the most frequent first."""
    counts: dict[str, int] = {}
    for name in _linear(base):
        last = name.rpartition(".")[2]
        counts[last] = counts.get(last, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _linear(base: nn.Module) -> list[str]:
    return [name for name, module in base.named_modules() if name and _is_linear(module)]


def _listed(base: nn.Module) -> str:
    return ", ".join([*_linear_names(base)][:MOST_NAMES]) or "its linear layers, of which it has none"


def _words(name: str) -> set[str]:
    return set(name.lower().split("_"))


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _inputs(module: nn.Module) -> int:
    # A Conv1D keeps its weight as (in, out).
    return int(module.in_features if isinstance(module, nn.Linear) else module.weight.shape[0])  # type: ignore[index]


KINDS: Mapping[str, Callable[[nn.Module], tuple[str, ...]]] = {
    AUTO: auto_targets,
    VALUES: value_targets,
    ALL_LINEAR: linear_targets,
}
"""What each word finds (``common.config.fields.TARGET_KINDS``)."""
