"""What settings resolve to: every shipped configuration and 500 drawn ones, against results that are stored.

``python tests/strategies/test_resolving.py`` stores them anew.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from fedveil.common.config.flat import Scalar
from fedveil.common.config.text import read_settings_file
from fedveil.common.errors import ConfigError
from fedveil.strategies.job import configure, with_recipe

ROOT = Path(__file__).resolve().parents[2]
STORED = Path(__file__).with_name("resolved.json")
DRAWN = 500
KEYS = (
    *("recipe", "strategy", "rounds", "phases", "evaluate-every", "head-rate", "schedule", "data.partition"),
    *("adapter.name", "adapter.rank", "adapter.alpha", "adapter.scale", "adapter.targets", "adapter.start"),
    *("head.policy", "head.start", "head.pool", "head.metric"),
    *("training.local-steps", "training.sample-rate", "training.optimizer", "training.learning-rate"),
    "training.weight-decay",
    *("server.optimizer", "server.learning-rate", "server.momentum", "server.adam-tau", "server.most-noise"),
    *("start.records", "start.ridge", "start.text", "start.clip-share", "start.share", "start.sums"),
)
"""Settings that a recipe, a strategy or a mechanism may decide."""
CHOICES: Mapping[str, tuple[Scalar, ...]] = {
    "recipe": ("metric", "head-only", "long-steps", "open", "plain"),
    "strategy": ("fedavg-lora", "ffa-lora", "fed-sb", "fed-svd", "fedex-lora", "rolora"),
    "model.task": ("causal-lm", "image-classification", "chat"),
    "model.quantise": ("8bit",),
    "data.labels": ("a,b", "a,b,c", "a,b,c,d"),
    "data.name": ("20-newsgroups", "mine.csv"),
    "data.records": (500, 4000, 100_000),
    "privacy.epsilon": (0.2, 1.0, 3.0),
    "privacy.noise-multiplier": (2.0,),
    "rounds": (6, 12, 30, 50),
    "phases": (
        "4 head on features, 8 adapter+head on examples",
        "5 head on features, 20 adapter on jacobians, 5 head on features",
    ),
    "schedule": ("constant", "cosine"),
    "head-rate": (2.0,),
    "adapter.name": ("lora", "lora-frozen-a", "lora-metric", "none"),
    "adapter.rank": (4, 16),
    "adapter.targets": ("values", "all-linear"),
    "adapter.start": ("orthonormal", "public-metric"),
    "head.start": ("zeros", "random"),
    "head.policy": ("frozen",),
    "training.local-steps": (1, 4),
    "training.sample-rate": (0.1, 1.0),
    "training.optimizer": ("sgd", "adam"),
    "training.learning-rate": (0.02,),
    "server.optimizer": ("none", "adam", "momentum"),
    "server.learning-rate": (0.5,),
    "server.most-noise": (0.2,),
    "min-sites": (3, 8),
}
MODES: tuple[Mapping[str, Scalar], ...] = (
    {},
    {"privacy.mode": "secure-sum", "privacy.honest-sites": 3},
    {"privacy.mode": "none"},
    {"privacy.mode": "client-level", "privacy.unit": "site", "privacy.cohort": 100, "privacy.delta": 1e-3},
)


def drawn() -> Iterator[dict[str, Scalar]]:
    """Yield settings of which about three are written out, the same ones each time."""
    draw = random.Random(46)
    for _ in range(DRAWN):
        mode = draw.choices(MODES, (6, 2, 3, 1))[0]
        keys = [key for key in CHOICES if draw.random() < draw.choice((0.02, 0.1, 0.2))]
        yield {**mode, **{key: draw.choice(CHOICES[key]) for key in keys}}


def shipped() -> Iterator[tuple[str, dict[str, Scalar]]]:
    """Yield the settings of every configuration in ``experiments/configs`` by its name."""
    for path in sorted((ROOT / "experiments" / "configs").rglob("*.toml")):
        yield path.stem, read_settings_file(path)


def resolved(values: Mapping[str, Scalar]) -> str:
    """Return a digest of what settings resolve to with six sites; ``refused`` if they do not fit together."""
    try:
        settings = configure(with_recipe(values, sites=6)[0]).settings()
    except ConfigError:
        return "refused"
    text = json.dumps([settings.get(key) for key in KEYS])
    return f"{settings['recipe']} {hashlib.sha256(text.encode()).hexdigest()[:12]}"


def results() -> dict[str, str | list[str]]:
    return {**{name: resolved(values) for name, values in shipped()}, "drawn": [resolved(one) for one in drawn()]}


@pytest.fixture(scope="module")
def stored() -> dict[str, str | list[str]]:
    return dict(json.loads(STORED.read_text(encoding="utf-8")))


def test_every_shipped_configuration_resolves_to_what_is_stored(stored: Mapping[str, object]) -> None:
    assert {name: resolved(values) for name, values in shipped()} == {
        name: result for name, result in stored.items() if name != "drawn"
    }


def test_drawn_settings_resolve_to_what_is_stored(stored: Mapping[str, list[str]]) -> None:
    wrong = {
        place: (values, found, was)
        for place, (values, was) in enumerate(zip(drawn(), stored["drawn"], strict=True))
        if (found := resolved(values)) != was
    }
    assert not wrong
    assert 100 < stored["drawn"].count("refused") < 350
    assert {result.split()[0] for result in stored["drawn"]} == {*CHOICES["recipe"], "refused"}


if __name__ == "__main__":
    STORED.write_text(json.dumps(results(), indent=1) + "\n", encoding="utf-8")
