"""Folders of runs made by hand: the files that a server writes, with ε from the accountant, without any training."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.privacy import claim
from common.privacy.accounting import Release, epsilon_with_method
from strategies import configure

DELTA = 1e-5


@dataclass
class MadeRun:
    """A run's folder in the making; ``settings`` are overrides, ``sites`` names with their public sizes."""

    folder: Path
    settings: dict[str, Any] = field(default_factory=dict)
    sites: dict[str, int] = field(default_factory=lambda: {"north": 2000, "south": 1500})
    noise: dict[str, float] = field(default_factory=dict)
    delta: dict[str, float] = field(default_factory=dict)
    """Of sites whose policy asks for another one than DELTA."""
    earlier: dict[str, list[Release]] = field(default_factory=dict)
    """What a site's ledger held before the run."""
    _history: dict[str, list[Release]] = field(default_factory=dict)

    def start(self) -> MadeRun:
        self.folder.mkdir(parents=True, exist_ok=True)
        settings = configure(self.settings).settings()
        versions = {"python": "3.11.7", "fedveil": "0.1.0", "flwr": "1.39.0", "torch": "2.13.0", "opacus": "1.6.0"}
        versions |= {"transformers": "5.24.0", "peft": "0.21.2", "dp-accounting": "0.6.0"}
        config = {"run": "7", "started": "2026-11-24T10:00:00+00:00", "settings": settings, "versions": versions}
        self.write("config.json", config)
        self.write("baseline.json", {"accuracy": 0.695, "loss": 0.581})
        return self

    def round(self, number: int, accuracy: float, *, refusals: dict[str, tuple[str, str]] | None = None) -> MadeRun:
        """Append a finished round in which every site that is not in ``refusals`` (kind, reason) took part."""
        refusals = refusals or {}
        joined = [site for site in self.sites if site not in refusals]
        for site in joined:
            self.release(number, site, Release(self.noise.get(site, 1.2), 0.05, 5))
        self.append(
            "rounds.jsonl",
            {
                "round": number,
                "strategy": "ffa-lora",
                "participants": joined,
                "accuracy": accuracy,
                "loss": 0.58 - 0.01 * number,
                "bytes_down": 150_528 * len(joined),
                "bytes_up": 150_400 * len(joined),
                "seconds": 31.25,
                "privacy": self.settings.get("privacy.mode", "dp-sgd"),
                "head": "trained and averaged, inside the clip",
                "refusals": [{"site": s, "kind": kind, "reason": why} for s, (kind, why) in refusals.items()],
            },
        )
        return self

    def release(self, number: int, site: str, release: Release) -> MadeRun:
        """Append what one site released, priced on top of all that it had spent."""
        line: dict[str, Any] = {"round": number, "site": site, "head": "trained and averaged, inside the clip"}
        line |= {"unit": claim.UNIT, "sampler": claim.SAMPLER, "public_size": self.sites.get(site, 1000)}
        training = release.kind == "training"
        before = self._history.setdefault(site, list(self.earlier.get(site, [])))
        delta = self.delta.get(site, DELTA)
        spent, after = epsilon_with_method(before, delta)[0], epsilon_with_method([*before, release], delta)
        before.append(release)
        line |= {
            "kind": release.kind,
            "sample_rate": release.sample_rate,
            "noise_multiplier": release.noise_multiplier,
            "clip_norm": 1.0,
            "steps_round": release.count if training else 0,
            "steps_total": sum(r.count for r in before if r.kind == "training"),
            "delta": delta,
            "epsilon_round": after[0] - spent,
            "epsilon_total": after[0],
            "epsilon_budget": 8.0,
            "epsilon_remaining": max(0.0, 8.0 - after[0]),
            "accountant": str(after[1]),
        }
        if self.settings.get("privacy.mode") == "none":
            spending = ("kind", "sample_rate", "noise_multiplier", "clip_norm", "steps_round", "steps_total", "delta")
            spending += ("epsilon_round", "epsilon_total", "epsilon_budget", "epsilon_remaining")
            line |= dict.fromkeys(spending) | {"accountant": claim.NO_CLAIM}
        self.append("privacy.jsonl", line)
        return self

    def end(self, status: str = "completed", reason: str = "") -> MadeRun:
        self.write("result.json", {"status": status, "reason": reason})
        return self

    def write(self, name: str, value: Any) -> None:
        (self.folder / name).write_text(json.dumps(value), encoding="utf-8")

    def append(self, name: str, value: Any) -> None:
        with (self.folder / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(value) + "\n")

    def lines(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / name).read_text(encoding="utf-8").splitlines()]
