"""``fedveil compose``: one adapter of several, by a rule of the literature; no site and no record has a part in it.

On one basis (every A the same) a weighted sum of changes is the same sum of the B's: exact, and of the same rank. There
TIES (Yadav et al. 2023) and DARE (Yu et al. 2024) act on B. ``cat`` puts factors side by side,
exact at the sum of the ranks, whatever the bases; LoraHub's and CMLoRA's ``merge`` are such sums. ``svd`` cuts that to
a rank, by thin QR of both sides, and says what is lost. PEFT's own ``linear`` adds the A's and the B's apart, which
leaves cross terms: it is not here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fedveil.common.adapters.layers import PEFT_PREFIX
from fedveil.common.bundle import own_digest
from fedveil.common.derived import DerivedFile, derived
from fedveil.common.errors import ConfigError
from fedveil.common.files import replace_file
from fedveil.common.messages.state import AdapterState, Factors
from fedveil.common.paths import check_vacant
from fedveil.common.run_lines import AdapterFile, Figure
from fedveil.common.strict_json import to_json
from fedveil.common.tensor_file import read_tensors
from fedveil.contrib.library.pairs import SUFFIXES, Pairs, equal_norms, filled, norms, read_pairs, same_layers, stacked
from fedveil.experiments.evaluate import about_of, read_peft_config
from fedveil.reports.derived import sources_of, write_folder

RULES = ("linear", "ties", "dare", "cat", "svd")
TRIMMED = (
    "Of a private run most numbers are noise, which TIES keeps where it is large: it trims by size, and no size tells "
    "noise from signal there."
)
EQUALISED = (
    "The inputs' changes were made equally long in each layer. Of a private run a part of that length is its noise's."
)
HEAD_WORDS = "Heads do not add up: this one is the mean of the inputs' by their weights, and no rule makes it exact."


@dataclass(frozen=True)
class Recipe:
    """How adapters become one."""

    rule: str = "linear"
    weights: tuple[float, ...] = ()
    """Of each; empty: equal shares of 1."""
    equal_norms: bool = False
    density: float = 0.5
    """Share of the numbers that TIES and DARE keep."""
    rank: int = 0
    """Of ``svd``; 0: the largest of the inputs'."""
    seed: int = 0
    """Of what DARE drops: public."""

    def check(self, count: int) -> None:
        """Raise ConfigError, saying what to do, unless so many adapters can become one so."""
        if self.rule not in RULES:
            raise ConfigError(f"--rule is {self.rule!r}: choose one of {', '.join(RULES)}")
        if self.weights and len(self.weights) != count:
            raise ConfigError(f"--weights has {len(self.weights)} numbers for {count} adapters: give each one")
        if not all(map(math.isfinite, self.weights)) or (self.weights and not any(self.weights)):
            raise ConfigError("--weights must be finite numbers, and not all 0")
        if not 0 < self.density < 1:
            raise ConfigError(f"--density is {self.density:g}: choose a share between 0 and 1")


def composed(adapters: Sequence[AdapterState], recipe: Recipe) -> tuple[AdapterState, float]:
    """Return the pairs of the composed adapter, float64, and which share of its energy a cut of rank has lost.

    Args:
        adapters: pairs by layer, with their scaling in B.
        recipe: how.

    Raises:
        ConfigError: the rule is for adapters on one basis, and these are on several.
    """
    recipe.check(len(adapters))
    weights = list(recipe.weights) or [1 / len(adapters)] * len(adapters)
    layers = same_layers(adapters, [f"adapter {number}" for number in range(1, len(adapters) + 1)])
    if recipe.equal_norms:
        adapters = equal_norms(adapters)
    if recipe.rule in ("cat", "svd"):
        side = {layer: _side_by_side(adapters, weights, layer) for layer in layers}
        if recipe.rule == "cat":
            return side, 0.0
        most = recipe.rank or max(len(factors["A"]) for pairs in adapters for factors in pairs.values())
        cut = {layer: _cut(factors, most) for layer, factors in side.items()}
        whole, kept = (math.fsum(length**2 for length in norms(pairs).values()) for pairs in (side, cut))
        return cut, max(0.0, 1 - kept / whole) if whole else 0.0
    like: AdapterState = {layer: factors for pairs in adapters for layer, factors in pairs.items()}
    adapters = [filled(pairs, like) for pairs in adapters]
    if any(not torch.equal(pairs[layer]["A"], like[layer]["A"]) for pairs in adapters for layer in layers):
        raise ConfigError(
            f"--rule {recipe.rule} is for adapters on one basis, and these have A's of their own: choose cat or svd"
        )
    drawn = torch.Generator().manual_seed(recipe.seed)
    return {
        layer: {"A": like[layer]["A"], "B": _of_rule(stacked(adapters, layer), weights, recipe, drawn)}
        for layer in layers
    }, 0.0


def _of_rule(B: Tensor, weights: Sequence[float], recipe: Recipe, drawn: torch.Generator) -> Tensor:
    """Return one layer's B, shape (out, rank), from all, shape (adapters, out, rank)."""
    shares = torch.tensor(weights, dtype=B.dtype)
    if recipe.rule == "ties":
        return _elected(B, shares, recipe.density)
    if recipe.rule == "dare":
        B = B * torch.bernoulli(torch.full_like(B, recipe.density), generator=drawn) / recipe.density
    return torch.einsum("j,jor->or", shares, B)


def _elected(B: Tensor, shares: Tensor, density: float) -> Tensor:
    """Return TIES' merge: of the largest numbers of each the weighted mean over those that have the elected sign.

    The sum of the weights' sizes is the paper's λ, by which the mean is multiplied: 1 by default.
    """
    flat = B.flatten(1)
    largest = flat.abs().topk(int(density * flat.shape[1]), dim=1).indices
    weighted = shares[:, None] * torch.zeros_like(flat).scatter(1, largest, flat.gather(1, largest))
    agreeing = weighted.sign() == torch.where(weighted.sum(0) >= 0, 1.0, -1.0)
    sizes = shares.abs()
    over = (sizes[:, None] * agreeing).sum(0)
    merged = sizes.sum() * (weighted * agreeing).sum(0) / over.where(over > 0, 1.0)
    return merged.view(B.shape[1:])


def _side_by_side(adapters: Sequence[AdapterState], weights: Sequence[float], layer: str) -> Factors:
    having = [(pairs[layer], weight) for pairs, weight in zip(adapters, weights, strict=True) if layer in pairs]
    return {
        "A": torch.cat([factors["A"] for factors, _ in having]),
        "B": torch.cat([weight * factors["B"] for factors, weight in having], dim=1),
    }


def _cut(factors: Factors, rank: int) -> Factors:
    """Return the nearest pair of at most a rank, from the singular values of the small core of two thin QRs."""
    left, upper = torch.linalg.qr(factors["B"])
    right, lower = torch.linalg.qr(factors["A"].T)
    U, values, Vt = torch.linalg.svd(upper @ lower.T)
    return {"A": Vt[:rank] @ right.T, "B": (left @ U[:, :rank]) * values[:rank]}


def compose(folders: Sequence[Path], target: Path, recipe: Recipe) -> DerivedFile:
    """Write the adapter that several saved ones make, with ``derived.json`` and a card beside it.

    Args:
        folders: of finished runs, of derived models, or of a library's adapters; each has ``adapter/``.
        target: a new folder.
        recipe: how.

    Raises:
        ConfigError: fewer than two are named, or they are of several base models, tasks, labels or, by the rule, bases.
        DataError: one cannot be read, or ``target`` cannot be written.
    """
    check_vacant(target)
    if len(folders) < 2:
        raise ConfigError("one adapter makes no other: name two or more")
    recipe.check(len(folders))
    abouts = [about_of(folder / "adapter") for folder in folders]
    for folder, about in zip(folders, abouts, strict=True):
        for key in ("base_fingerprint", "task", "label_names", "max_length", "feature_scale"):
            if getattr(about, key) != getattr(abouts[0], key):
                raise ConfigError(f"{folder} has another {key.replace('_', ' ')} than {folders[0]}: name like adapters")
    for folder in folders:
        read_peft_config(folder / "adapter" / "adapter_config.json")  # refuses patterns, which the new one would have
    read = [read_pairs(folder / "adapter") for folder in folders]
    pairs, lost = composed([one.layers for one in read], recipe)
    weights = list(recipe.weights) or [1 / len(folders)] * len(folders)
    sources = [source for f, weight in zip(folders, weights, strict=True) for source in sources_of(f, weight)]
    made = derived(f"compose {recipe.rule}", abouts[0].base_model, sources)
    claimed = any(source.epsilon is not None for source in sources)
    notes = [TRIMMED] * (recipe.rule == "ties" and claimed) + [EQUALISED] * (recipe.equal_norms and claimed)
    notes += [HEAD_WORDS] * bool(abouts[0].label_names)
    figures = [Figure("of the sum's energy that the cut of rank lost", lost)] * (recipe.rule == "svd")
    made = replace(made, notes=notes, figures=figures)
    heads = [folder / "adapter" / "head.safetensors" for folder in folders]
    head = _mean_head(heads, weights) if abouts[0].label_names else {}
    write_folder(target, made, lambda adapter: _write_adapter(adapter, pairs, read[0], abouts[0], head))
    return made


def _mean_head(files: Sequence[Path], weights: Sequence[float]) -> dict[str, Tensor]:
    shares = [weight / math.fsum(weights) if math.fsum(weights) else 1 / len(weights) for weight in weights]
    heads = [read_tensors(file) for file in files]
    return {
        name: torch.stack([share * head[name].double() for share, head in zip(shares, heads, strict=True)]).sum(0)
        for name in heads[0]
    }


def _write_adapter(folder: Path, pairs: AdapterState, like: Pairs, about: AdapterFile, head: Factors) -> None:
    """Write pairs as stock PEFT loads them: every layer at its own rank, and alpha equal to it."""
    ranks = {layer: len(factors["A"]) for layer, factors in pairs.items()}
    rank = max(ranks.values())
    config: dict[str, Any] = {
        **like.config,
        "r": rank,
        "lora_alpha": rank,
        "use_rslora": False,
        "target_modules": sorted(pairs),
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    uneven: Mapping[str, int] = {layer: own for layer, own in ranks.items() if own != rank}
    for key in ("rank_pattern", "alpha_pattern"):
        config[key] = {layer.replace(".", r"\."): own for layer, own in uneven.items()}
    replace_file(folder / "adapter_config.json", (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
    tensors = {
        f"{PEFT_PREFIX}{layer}{SUFFIXES[name]}": tensor.float().contiguous()
        for layer, factors in pairs.items()
        for name, tensor in factors.items()
    }
    save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
    if head:
        content = {name: tensor.float().contiguous() for name, tensor in head.items()}
        save_file(content, str(folder / "head.safetensors"), metadata={"labels": json.dumps(about.label_names)})
    saved = replace(about, bundle=own_digest())
    text = json.dumps(to_json(saved), indent=2, ensure_ascii=False) + "\n"
    replace_file(folder / AdapterFile.NAME, text.encode())
