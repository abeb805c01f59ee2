"""Folders of runs made by hand: the files that a server writes, with ε from the accountant, without any training."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedveil.common.findings import AuditFile
from fedveil.common.messages.round import Spending, SpendingFigures
from fedveil.common.run_lines import (
    Absence,
    BaselineFile,
    ConfigFile,
    PrivacyLine,
    Reached,
    ResultFile,
    RoundLine,
    RunFile,
    Status,
)
from fedveil.common.strict_json import to_json
from fedveil.privacy import MECHANISMS
from fedveil.privacy.accountant import TRAINING
from fedveil.privacy.accounting import Release, gaussian_release
from fedveil.privacy.claim import NO_CLAIM
from fedveil.privacy.events import Event, SummedGaussian, sampled_gaussian
from fedveil.privacy.privacy_filter import promised
from fedveil.strategies.job import configure

DELTA = 1e-5
HEAD = "trained and averaged, inside the clip"


def spent(line: PrivacyLine) -> SpendingFigures:
    """Return the figures of a line that makes a claim."""
    assert line.spent is not None, "the line makes no claim"
    return line.spent


def told(spending: Spending, **changes: Any) -> Spending:
    """Return a spending that states other figures, its own or its event's."""
    own = {name: changes.pop(name) for name in list(changes) if name in spending.event.figures}
    return replace(spending, **changes, event=spending.event.having(**own))


@dataclass
class MadeRun:
    """A run's folder in the making; ``settings`` are overrides, ``sites`` names with their public sizes."""

    folder: Path
    settings: dict[str, Any] = field(default_factory=dict)
    sites: dict[str, int] = field(default_factory=lambda: {"north": 2000, "south": 1500})
    noise: dict[str, float] = field(default_factory=dict)
    delta: dict[str, float] = field(default_factory=dict)
    """Of sites whose policy asks for another one than DELTA."""
    honest: int = 0
    """Sites that a sum's noise counts on; 0: each site noises for itself."""
    earlier: dict[str, list[Release]] = field(default_factory=dict)
    """What a site's ledger held before the run."""
    _history: dict[str, list[Release]] = field(default_factory=dict)

    def start(self) -> MadeRun:
        self.folder.mkdir(parents=True, exist_ok=True)
        job = configure(self.settings)
        versions = {"python": "3.11.7", "fedveil": "0.1.0", "flwr": "1.39.0", "torch": "2.13.0", "opacus": "1.6.0"}
        versions |= {"transformers": "5.24.0", "peft": "0.21.2", "dp-accounting": "0.6.0"}
        self.write(ConfigFile("7", "2026-11-24T10:00:00+00:00", job.settings(), versions, job.chosen()))
        self.write(BaselineFile(accuracy=0.695, loss=0.581))
        return self

    def round(self, number: int, accuracy: float, *, refusals: dict[str, tuple[str, str]] | None = None) -> MadeRun:
        """Append a finished round in which every site that is not in ``refusals`` (kind, reason) took part."""
        refusals = refusals or {}
        joined = [site for site in self.sites if site not in refusals]
        for site in joined:
            self.release(number, site, self._of_a_round(self.noise.get(site, 1.2)))
        absent = [Absence(number, 1, site, kind, why) for site, (kind, why) in refusals.items()]
        line = RoundLine(
            round_number=number,
            complete=True,
            strategy="ffa-lora",
            participants=joined,
            accuracy=accuracy,
            loss=0.58 - 0.01 * number,
            bytes_down=150_528 * len(joined),
            bytes_up=150_400 * len(joined),
            seconds=31.25,
            privacy=str(self.settings.get("privacy.mode", "dp-sgd")),
            head=HEAD,
            noised_correct=[],
            refusals=absent,
            attempts=1,
            failures=absent,
        )
        self.append(RoundLine.NAME, to_json(line))
        return self

    def _of_a_round(self, noise: float) -> Release:
        if not self.honest:
            return gaussian_release(noise, 0.05, 5)
        figures = {**sampled_gaussian(noise, 0.05).figures, "honest_sites": self.honest}
        return Release(Event(SummedGaussian.name, figures), 1)

    def release(self, number: int, site: str, release: Release) -> MadeRun:
        """Append what one site released, priced on top of all that it had spent."""
        training = release.purpose == TRAINING
        before = self._history.setdefault(site, list(self.earlier.get(site, [])))
        delta = self.delta.get(site, DELTA)
        held, _ = promised(before, delta)
        after, accountant = promised([*before, release], delta)
        before.append(release)
        figures = SpendingFigures(
            purpose=release.purpose,
            event=release.event,
            steps_round=release.count if training else 0,
            steps_total=sum(r.count for r in before if r.purpose == TRAINING),
            delta=delta,
            epsilon_round=after - held,
            epsilon_total=after,
            epsilon_budget=8.0,
            epsilon_remaining=max(0.0, 8.0 - after),
        )
        private = self.settings.get("privacy.mode") != "none"
        claim = MECHANISMS["dp-sgd"].claim
        line = PrivacyLine(
            round_number=number,
            site=site,
            public_size=self.sites.get(site, 1000),
            unit=claim.unit,
            adjacency=claim.adjacency,
            adversary=claim.adversary,
            sampler=claim.sampler,
            spent=figures if private else None,
            accountant=str(accountant) if private else NO_CLAIM,
            head=HEAD,
        )
        self.append(PrivacyLine.NAME, to_json(line))
        return self

    def end(self, status: Status = "completed", reason: str = "", reached: Reached | None = None) -> MadeRun:
        self.write(ResultFile(status, reason, reached))
        return self

    def write(self, file: RunFile) -> None:
        (self.folder / file.NAME).write_text(json.dumps(to_json(file)), encoding="utf-8")

    def audited(self, name: str, content: AuditFile) -> MadeRun:
        """Leave the file of an audit."""
        (self.folder / name).write_text(json.dumps(to_json(content)), encoding="utf-8")
        return self

    def append(self, name: str, value: Any) -> None:
        with (self.folder / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(value) + "\n")

    def lines(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / name).read_text(encoding="utf-8").splitlines()]


def adapter_told(**changes: Any) -> dict[str, Any]:
    """Return what ``adapter/fedveil.json`` of a run holds, but for ``changes``."""
    usual: dict[str, Any] = {
        "base_model": "m",
        "base_fingerprint": "ab" * 32,
        "base_files": "ac" * 32,
        "bundle": "",
        "task": "classification",
    }
    scored = {"label_names": [], "max_length": 128, "feature_scale": 1.0, "precision": "float32", "settings": {}}
    return {**usual, **scored, **changes}
