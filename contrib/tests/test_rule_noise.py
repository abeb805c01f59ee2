"""The noise behind a server's rule: that of its row, and never more where a rule only shortens."""

from __future__ import annotations

import pytest
import torch
from weight_layers import RANK, Layer

from fedveil.contrib.nulls import LEVEL
from fedveil.contrib.rules.align_guard import guarded
from fedveil.strategies.rules import RULES
from fedveil.strategies.rules.base import Known


def noise_behind(name: str, layer: Layer, scaling: float) -> float:
    """Return the mean squared norm of what unit noise on every trained number puts on the weights behind a rule.

    The rule is linear in the change, so the mean is the sum over the numbers, one at a time.
    """
    total, trained = 0.0, ("A", "B") if name == "lora-pro" else ("B",)
    rule = RULES[name]()
    for factor in trained:
        for i in range(layer[factor].numel()):
            change = {key: torch.zeros_like(layer[key]) for key in trained}
            change[factor].view(-1)[i] = 1.0
            change = dict(rule.change(change, layer, scaling, noised=True))
            before = {"one": {key: layer[key] for key in trained}}
            after = {"one": {key: layer[key] - change[key] for key in trained}}
            moved = rule.step(before, after, {}, Known())["one"]
            a, b = (layer[key] - moved.get(key, layer[key]) for key in ("A", "B"))
            total += float((scaling * (layer["B"] @ a + b @ layer["A"])).square().sum())
    return total


def behind_lora_pro(layer: Layer, scaling: float) -> float:
    """The row's formula, with every sum written out."""
    (m, r), n = layer["B"].shape, layer["A"].shape[1]
    beta, delta = (torch.linalg.svdvals(layer[key]).square().tolist() for key in ("B", "A"))
    damping = 1 / (scaling * 0.5) ** 2
    both = sum((x + y) / (x + y + damping) ** 2 for x in beta for y in delta)
    right = (n - r) * sum(x / (x + damping) ** 2 for x in beta)
    left = (m - r) * sum(y / (y + damping) ** 2 for y in delta)
    return (both + right + left) / scaling**2


def behind_allora(layer: Layer, _: float) -> float:
    """‖A‖² Σ f_i²."""
    return float(layer["A"].square().sum() * sum(1 / (row.norm() + 0.25) for row in layer["B"]))


@pytest.mark.parametrize("at_start", [False, True], ids=["B moved", "B at 0"])
@pytest.mark.parametrize(("name", "scaling"), [("lora-pro", 1.7), ("allora", 1.0)])
def test_the_noise_behind_a_rule_is_that_of_its_row(name: str, scaling: float, at_start: bool) -> None:
    draw = torch.Generator().manual_seed(3)
    layer = {
        "A": torch.randn(RANK, 7, generator=draw, dtype=torch.float64),
        "B": torch.randn(9, RANK, generator=draw, dtype=torch.float64) * (not at_start),
    }
    wanted = {"lora-pro": behind_lora_pro, "allora": behind_allora}[name](layer, scaling)
    assert noise_behind(name, layer, scaling) == pytest.approx(wanted, rel=1e-10)
    planted = {**layer, "A": 1.02 * layer["A"]}
    assert noise_behind(name, planted, scaling) != pytest.approx(wanted, rel=1e-3), "another A goes unnoticed"
    if name == "allora" and at_start:
        without = float(layer["A"].square().sum() * 9)
        assert noise_behind(name, layer, scaling) == pytest.approx(2.0**2 * without), "η times, as the row says"


def test_every_rule_that_lengthens_has_a_formula_and_the_others_only_shorten() -> None:
    assert {name for name, rule in RULES.items() if rule.lengthens} == {"lora-pro", "allora"}
    for name, rule in RULES.items():
        assert rule.lengthens or rule.noise.startswith(("as without a rule", "at most that without a rule")), name


@pytest.mark.parametrize("name", ["align-guard", "soft-threshold"])
def test_a_rule_that_only_shortens_leaves_no_noise_more_than_there_was(name: str) -> None:
    draw = torch.Generator().manual_seed(4)
    A, zero = torch.linalg.qr(torch.randn(7, RANK, generator=draw, dtype=torch.float64))[0].T, torch.zeros(9, RANK)
    gradients = torch.randn(20, 9 * RANK, generator=draw, dtype=torch.float64)
    measured = {"one": {"B": guarded(gradients, 4, 3.0).view(-1, 9, RANK)}} if name == "align-guard" else {}
    rule, passed = RULES[name](), 0
    for _ in range(200):
        noise = torch.randn(9, RANK, generator=draw, dtype=torch.float64)
        before, known = {"one": {"B": zero.double()}}, Known(frozen={"one": {"A": A}}, noise=1.0)
        moved = rule.step(before, {"one": {"B": noise}}, measured, known)["one"]["B"]
        assert float((moved @ A).norm()) < float((noise @ A).norm())
        passed += bool(moved.any())
    if name == "soft-threshold":
        assert passed < 200 * LEVEL + 4 * (200 * LEVEL) ** 0.5, "noise alone passes its own edge"
