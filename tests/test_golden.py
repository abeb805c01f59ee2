"""The adapters that small federations end with, as first computed: an algorithm does not change unnoticed.

    PYTHONPATH=. .venv/bin/python tests/test_golden.py           # print the digest of every case's exact bits
    PYTHONPATH=. .venv/bin/python tests/test_golden.py --write   # store the figures anew

Noise and Poisson samples come from a seed here, and nowhere else. Figures are compared with room for another
processor's float32; digests are not stored, because they hold for one machine only.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import client.app
from audits.tiny_models import save_tiny_model, toy_run, write_reviews
from common import randomness
from common.privacy import dpsgd
from experiments.in_process import run_in_process
from strategies import STRATEGIES

GOLDEN = Path(__file__).with_name("golden")
RELATIVE = 1e-5
"""Of a tensor's norm: what a figure may differ by from the stored one."""
SITES, FIGURES = 3, 3

MODES: dict[str, dict[str, Any]] = {
    "private": {"privacy.noise-multiplier": 1.5, "privacy.epsilon": 30.0},
    "open": {"privacy.mode": "none"},
}
SERVERS: dict[str, dict[str, Any]] = {
    "average": {},
    "adam": {
        "server.optimizer": "adam",
        "training.optimizer": "sgd",
        "training.learning-rate": 1.0,
        "training.local-steps": 1,
    },
}
OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "ffa-lora": {"open average, kaiming": {"adapter.init": "kaiming"}},
    "fed-svd": {
        "open adam, rarely": {**SERVERS["adam"], "fed-svd.period": 2, "fed-svd.warmup": 1, "rounds": 3},
        "open average, square-root": {"fed-svd.split": "square-root"},
    },
    "fed-sb": {
        "open average, svd-of-weights": {"fed-sb.init": "svd-of-weights"},
        "open average, public-gradient": {"fed-sb.init": "public-gradient", "fed-sb.init-records": 32},
        "private adam, dp-gradient": {
            **SERVERS["adam"],
            "fed-sb.init": "dp-gradient",
            "fed-sb.init-sample-rate": 0.5,
            "fed-sb.init-noise-multiplier": 2.0,
        },
    },
}
"""Further cases of a strategy: the first word of a name says the mode."""
OF_ONE_MACHINE = {("fed-sb", "open average, public-gradient")}
"""Cases with a digest and no stored figures: the sign of a gradient that is nearly 0 differs from processor to
processor, and the start with it (measured: a third of a tensor's norm)."""


REHEARSALS = [name for name in vars(client.app) if name.startswith("rehearse")]


def cases(strategy: str) -> dict[str, dict[str, Any]]:
    """Return the settings of every case of a strategy, over those of a toy run."""
    plain = {f"{mode} {server}": {**MODES[mode], **SERVERS[server]} for mode in MODES for server in SERVERS}
    return plain | {name: {**MODES[name.split()[0]], **more} for name, more in OPTIONS.get(strategy, {}).items()}


CASES = [(strategy, case) for strategy in ("fedavg-lora", "ffa-lora", "fed-sb", "fed-svd") for case in cases(strategy)]


@contextmanager
def chance_from_a_seed() -> Iterator[None]:
    """Draw noise and Poisson samples from a fixed seed; the noise is on no grid, which would enlarge last bits.

    A rehearsal draws noise too, but once in a process for each model, so what it draws is put back: else a case's
    figures would depend on the cases before it.
    """
    drawn = torch.Generator().manual_seed(20)

    def noised(total: Tensor, std: float) -> Tensor:
        noise = torch.randn(total.shape, generator=drawn, dtype=torch.float64)
        return total.detach().cpu().double() + std * noise

    def sampled(size: int, rate: float) -> Tensor:
        return (torch.rand(size, generator=drawn, dtype=torch.float64) < rate).nonzero()[:, 0]

    def put_back(rehearsal: Callable[..., Any]) -> Callable[..., Any]:
        def rehearsed(*terms: Any) -> Any:
            before = drawn.get_state()
            try:
                return rehearsal(*terms)
            finally:
                drawn.set_state(before)

        return rehearsed

    with pytest.MonkeyPatch.context() as patch:
        for name in REHEARSALS:
            patch.setattr(client.app, name, put_back(getattr(client.app, name)))
        patch.setattr(dpsgd, "add_private_noise", noised)
        patch.setattr(randomness, "private_poisson_sample", sampled)
        yield


def final_adapter(strategy: str, case: str, model: str, folder: Path) -> dict[str, Tensor]:
    """Return every tensor that the case's run exports, adapter and head."""
    settings = {**toy_run(model, folder), "strategy": strategy, **cases(strategy)[case]}
    if settings.get("fed-sb.init") == "public-gradient":
        settings["fed-sb.init-data"] = str(write_reviews(folder / "public.csv", 60, seed=9))
    with chance_from_a_seed():
        left = run_in_process(settings, SITES) / "adapter"
    return {
        f"{file.stem}/{name}": tensor
        for file in sorted(left.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def figures(tensors: dict[str, Tensor]) -> dict[str, list[float]]:
    """Return each tensor's norm and its products with a few fixed random unit vectors."""
    kept = {}
    for name, tensor in sorted(tensors.items()):
        flat = tensor.double().flatten()
        random = torch.randn(FIGURES, len(flat), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        products = (random / random.norm(dim=1, keepdim=True)) @ flat
        kept[name] = [float(f"{value:.9g}") for value in (float(flat.norm()), *products.tolist())]
    return kept


def digest(tensors: dict[str, Tensor]) -> str:
    """Return the SHA-256 of the exact bits of all tensors, with their names and shapes."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name}/{tensor.dtype}/{tuple(tensor.shape)};".encode())
        total.update(tensor.contiguous().numpy().tobytes())
    return total.hexdigest()


def furthest(found: dict[str, list[float]], stored: dict[str, list[float]]) -> float:
    """Return the largest difference of two cases' figures, over the stored tensor's norm."""
    assert found.keys() == stored.keys(), "the adapter has other tensors than the stored one"
    return max(
        abs(new - old) / (stored[name][0] or 1.0)
        for name in stored
        for new, old in zip(found[name], stored[name], strict=True)
    )


def stored(strategy: str, case: str) -> dict[str, list[float]]:
    kept: dict[str, dict[str, list[float]]] = json.loads((GOLDEN / f"{strategy}.json").read_text(encoding="utf-8"))
    return kept[case]


@pytest.mark.parametrize(("strategy", "case"), [case for case in CASES if case not in OF_ONE_MACHINE])
def test_a_small_federation_ends_with_the_stored_adapter(
    strategy: str, case: str, toy_settings: dict[str, Any], tmp_path: Path
) -> None:
    found = figures(final_adapter(strategy, case, toy_settings["model.name"], tmp_path))
    gap = furthest(found, stored(strategy, case))
    assert gap < RELATIVE, f"{strategy}, {case}: the final adapter is {gap:.1e} of its norm from the stored one"


def test_a_planted_change_of_a_run_is_seen(toy_settings: dict[str, Any], tmp_path: Path) -> None:
    tensors = final_adapter("ffa-lora", "open average", toy_settings["model.name"], tmp_path)
    before = figures(tensors)
    name = max(tensors, key=lambda name: tensors[name].numel())
    tensors[name] = tensors[name] * (1 + 3e-5)
    assert furthest(figures(tensors), before) > RELATIVE
    for case in ("private average", "private adam", "open adam"):
        assert furthest(stored("ffa-lora", case), stored("ffa-lora", "open average")) > 100 * RELATIVE


def test_a_rehearsal_leaves_no_draw_behind(toy_settings: dict[str, Any], tmp_path: Path) -> None:
    """A process that has rehearsed the model, and one that has not, end with the same adapter, bit for bit."""
    model, ends = toy_settings["model.name"], []
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        if not number:
            client.app._process.rehearsed = {}
        ends.append(digest(final_adapter("ffa-lora", "private average", model, tmp_path / str(number))))
    assert ends[0] == ends[1]


def test_every_case_has_stored_figures_and_is_of_a_strategy() -> None:
    # Rows that came later are held to slow sums in float64 (test_columns, test_column_rules, test_neighbours).
    assert {path.stem for path in GOLDEN.glob("*.json")} == {strategy for strategy, _ in CASES} <= set(STRATEGIES)


def main(write: bool) -> None:
    """Run every case; print digests, and store the figures if asked to."""
    kept: dict[str, dict[str, dict[str, list[float]]]] = {}
    with tempfile.TemporaryDirectory() as place:
        model = save_tiny_model("bert", Path(place) / "model")
        for number, (strategy, case) in enumerate(CASES):
            folder = Path(place) / str(number)
            folder.mkdir()
            tensors = final_adapter(strategy, case, model, folder)
            if (strategy, case) not in OF_ONE_MACHINE:
                kept.setdefault(strategy, {})[case] = figures(tensors)
            print(f"{digest(tensors)}  {strategy}, {case}")
    for strategy, found in kept.items() if write else ():
        GOLDEN.mkdir(exist_ok=True)
        (GOLDEN / f"{strategy}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main("--write" in sys.argv[1:])
