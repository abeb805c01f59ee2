"""Rows of a sweep, made by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fedveil.experiments.sweep.rows import Row
from fedveil.strategies.job import configure


def row(accuracy: float, **changes: Any) -> Row:
    """Return a row as a run leaves it."""
    plain = Row(
        sweep="made",
        variant="wide",
        arm="federated",
        site=None,
        epsilon_asked=8.0,
        seed=1,
        status="completed",
        accuracy_before=0.5,
        accuracy=accuracy,
        loss_before=0.7,
        loss=0.5,
        test_records=1000,
        epsilon=7.995,
        delta=1e-5,
        rounds=6,
        sites=2,
        bytes_down=1_000_000,
        bytes_up=2_000_000,
        seconds=10.0,
        seconds_in_all=12.0,
        through="one process",
        device="cpu",
        precision="float32",
        threads=1,
        machine="x86_64, 2 cores",
        started="2026-11-26T09:00:00+00:00",
        code="a" * 64,
        commit="",
        versions={"torch": "2.13.0"},
        settings={key: value for key, value in configure({"data.seed": 1}).settings().items() if key != "output"},
    )
    return replace(plain, **changes)


def alone(accuracy: float, site: int, seed: int) -> Row:
    return row(accuracy, arm="local-only", site=site, seed=seed, bytes_down=None, bytes_up=None)


SEEDS = [row(accuracy, seed=seed) for seed, accuracy in enumerate((0.74, 0.75, 0.79), start=1)]

SITES = [alone(0.6, 0, 1), alone(0.7, 1, 1), alone(0.7, 0, 2), alone(0.9, 1, 2)]

OPEN = [row(0.85, epsilon_asked=None, epsilon=None, delta=None)]
