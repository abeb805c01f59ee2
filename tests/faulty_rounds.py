"""Federations in one process in which sites do not answer, or come and go."""

from __future__ import annotations

from collections.abc import Collection, Container, Mapping
from typing import Any

from fedveil.common.messages.round import (
    TrainTask,
)
from fedveil.experiments.in_process import InProcessTransport
from fedveil.server.replies import refusal
from fedveil.server.sites import Exchange


def plain(toy_settings: dict[str, Any]) -> dict[str, Any]:
    """Settings under which equal work gives equal bits."""
    return {**toy_settings, "privacy.mode": "none"}


class Faulty(InProcessTransport):
    """A federation in which chosen attempts at asking chosen nodes fail, or nodes come and go."""

    lost: Mapping[int, Collection[int]] = {}
    """Nodes that do not answer, by how many times tasks were sent before."""
    away: Mapping[int, Collection[int]] = {}
    """Nodes that are offline, by how many times nodes were looked up before."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.sent = self.looked = 0
        self.asked: list[tuple[int, list[int]]] = []

    def nodes(self, wanted: int, besides: Container[int]) -> list[int]:
        away = self.away.get(self.looked, ())
        self.looked += 1
        return [node for node in super().nodes(wanted, besides) if node not in away]

    def exchange(self, tasks: Mapping[int, TrainTask], timeout: float) -> Exchange:
        lost = self.lost.get(self.sent, ())
        self.sent += 1
        self.asked.append((next(iter(tasks.values())).round_number, sorted(tasks)))
        got = super().exchange({node: task for node, task in tasks.items() if node not in lost}, timeout)
        silent = {node: refusal(tasks[node], node, "late", "no answer in 1 s") for node in tasks if node in lost}
        return Exchange({**got.replies, **silent}, got.bytes_down, got.bytes_up)


def faulty(**plan: Any) -> tuple[type[Faulty], list[Faulty]]:
    """Return a kind of transport with this plan, and a list that will hold the one that is made."""
    made: list[Faulty] = []

    class Planned(Faulty):
        lost, away = plan.get("lost", {}), plan.get("away", {})

        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(self)

    return Planned, made
