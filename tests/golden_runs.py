"""The small runs whose results are stored in ``tests/golden``, and what is kept of each.

Private randomness follows from a seed through ``privacy.entropy``, so sampler, grid and law of the noise are the
product's own. A run leaves its final tensors, its ledger rows, the bytes of its messages and its report.
"""

from __future__ import annotations

import hashlib
import json
import math
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from digits import TOKENS, digits, save_vit, write_folder
from safetensors.torch import load_file
from torch import Tensor

from audits.tiny_models import TARGETS, save_tiny_model, toy_run, write_questions, write_reviews
from fedveil.common.messages.round import Refusal, Task, TrainTask
from fedveil.common.messages.wire import encode_reply
from fedveil.common.run_lines import RoundLine, read_lines
from fedveil.experiments.in_process import InProcessTransport, run_in_process
from fedveil.privacy.entropy import replaced_entropy

Settings = dict[str, Any]
PRODUCTS = 3
"""Fixed random directions that each stored tensor is multiplied with."""
UNSTORED = {"seconds", "began", "started", "bundle", "files", "versions", "accuracy", "base", "run", "unprotected"}
"""Keys of a report that follow from the clock, the machine or the code's own hash."""

MODES: dict[str, Settings] = {
    "private": {"privacy.noise-multiplier": 1.5, "privacy.epsilon": 30.0},
    "open": {"privacy.mode": "none"},
}
ADAM: Settings = {
    "server.optimizer": "adam",
    "training.optimizer": "sgd",
    "training.learning-rate": 1.0,
    "training.local-steps": 1,
}
PLAIN_STEP: Settings = {"training.optimizer": "sgd", "training.learning-rate": 0.5, "training.local-steps": 1}
STRATEGY_OPTIONS: dict[str, dict[str, Settings]] = {
    "ffa-lora": {"open average, kaiming": {"adapter.start": "kaiming"}},
    "fed-svd": {
        "open adam, rarely": {**ADAM, "fed-svd.period": 3, "rounds": 3},
    },
    "fed-sb": {
        "open average, svd-of-weights": {"adapter.start": "svd-of-weights"},
        "open average, public-gradient": {"adapter.start": "public-gradient", "start.records": 32},
        "private adam, dp-gradient": {
            **ADAM,
            "adapter.start": "dp-gradient",
            "start.sample-rate": 0.5,
            "start.noise-multiplier": 2.0,
        },
    },
}
OF_ONE_MACHINE = {"fed-sb, open average, public-gradient", "default recipe"}
"""Cases whose tensors are not stored: the sign of a gradient that is nearly 0 differs from processor to processor, and
the initialisation with it (measured: a third of a tensor's norm); a metric of 32 records divides by small eigenvalues
(measured on another processor: a quarter of the head's bias, after five rounds)."""
SUMMED: Settings = {
    **PLAIN_STEP,
    "privacy.mode": "secure-sum",
    "privacy.honest-sites": 2,
    "privacy.noise-multiplier": 2.0,
    "privacy.epsilon": 40.0,
}


class LosesTwo(InProcessTransport):
    """Two of the sites are lost with their vectors in round 1."""

    def deliver(self, node: int, task: Task, content: Any) -> Any:
        """Answer with a refusal in the lost sites' names."""
        if node in (1, 4) and task.round_number == 1 and isinstance(task, TrainTask):
            return encode_reply(Refusal(task.run, 1, f"site-{node}", "failed", "the line is cut"))
        return super().deliver(node, task, content)


@dataclass(frozen=True)
class Case:
    """One small run."""

    settings: Settings
    """Over those of the base."""
    base: str = "reviews"
    """Which tiny model and data: ``reviews``, ``questions`` or ``digits``."""
    sites: int = 3
    transport: type[InProcessTransport] = InProcessTransport
    keeps_report: bool = False


def _strategy_cases() -> dict[str, Case]:
    found: dict[str, Case] = {}
    for strategy in ("fedavg-lora", "ffa-lora", "fed-sb", "fed-svd"):
        servers: dict[str, Settings] = {"average": {}, "adam": ADAM}
        cases = {f"{mode} {name}": {**MODES[mode], **servers[name]} for mode in MODES for name in servers}
        cases |= {name: {**MODES[name.split()[0]], **own} for name, own in STRATEGY_OPTIONS.get(strategy, {}).items()}
        found |= {f"{strategy}, {name}": Case({**own, "strategy": strategy}) for name, own in cases.items()}
    return found


def _kept(settings: Settings, base: str = "reviews", sites: int = 3, **own: Any) -> Case:
    return Case(settings, base, sites, keeps_report=True, **own)


CASES: dict[str, Case] = {
    **_strategy_cases(),
    "default recipe": _kept(
        {
            **{f"training.{key}": "auto" for key in ("optimizer", "learning-rate", "local-steps", "sample-rate")},
            "server.optimizer": "auto",
            "strategy": "fedavg-lora",
            "recipe": "metric",
            "rounds": 5,
            "phases": "1 head on features, 3 adapter on jacobians every 2, 1 head on features",
            "start.records": 32,
        }
    ),
    "head alone": _kept({"strategy": "fedavg-lora", "adapter.name": "none", **PLAIN_STEP, **MODES["private"]}),
    "secure sum": _kept({**SUMMED, "strategy": "fedavg-lora"}),
    "secure sum, two lost": _kept({**SUMMED, "privacy.drop-outs": 2, "round-retries": 0}, sites=6, transport=LosesTwo),
    "person": _kept({**MODES["private"], "privacy.unit": "person", "data.person": "author"}),
    "whole site": _kept(
        {
            "privacy.mode": "client-level",
            "privacy.unit": "site",
            "privacy.noise-multiplier": 2.0,
            "privacy.cohort": 4,
            "privacy.site-rate": 0.5,
            "privacy.clip-norm": 0.5,
            "privacy.epsilon": 60.0,
            "training.sample-rate": "auto",
        },
        sites=4,
    ),
    "language model": _kept({**MODES["private"], **PLAIN_STEP, "strategy": "ffa-lora"}, "questions"),
    "images": _kept({**MODES["private"], "strategy": "fed-svd"}, "digits"),
    "heterogeneous ranks": _kept(
        {
            **MODES["private"],
            **PLAIN_STEP,
            "strategy": "heterogeneous-ranks",
            "adapter.rank": 6,
            "adapter.site-ranks": "6,3,2",
        }
    ),
}


@dataclass(frozen=True)
class Left:
    """What is kept of a run."""

    tensors: dict[str, Tensor]
    ledger: dict[str, list[list[Any]]]
    """By site and table: rows without times, names of runs and keys."""
    sent: list[list[int | None]]
    """Bytes down and up of each round."""
    report: Any = field(default=None)

    def stored(self) -> dict[str, Any]:
        """Return what a JSON file keeps of it."""
        kept = {"tensors": figures(self.tensors), "ledger": self.ledger, "sent": self.sent}
        return kept if self.report is None else {**kept, "report": self.report}

    def digest(self) -> str:
        """Return the SHA-256 of the exact bits of all tensors, with their names and shapes."""
        total = hashlib.sha256()
        for name, tensor in sorted(self.tensors.items()):
            total.update(f"{name}/{tensor.dtype}/{tuple(tensor.shape)};".encode())
            total.update(tensor.contiguous().numpy().tobytes())
        return total.hexdigest()


def base_settings(base: str, folder: Path) -> Settings:
    """Return settings of a tiny model and its data, which are written to ``folder``."""
    reviews = toy_run(save_tiny_model("bert", folder / "bert"), folder)
    if base == "questions":
        return reviews | {
            "model.name": save_tiny_model("llama", folder / "llama"),
            "model.task": "causal-lm",
            "data.name": str(write_questions(folder / "questions.csv", 240)),
            "adapter.targets": TARGETS["llama"],
        }
    if base == "digits":
        return reviews | {
            "model.name": save_vit(folder / "vit"),
            "model.task": "image-classification",
            "model.max-length": TOKENS,
            "model.feature-scale": 8.0,
            "data.name": str(write_folder(folder / "digits", digits(count=240))),
            "data.labels": "0,1",
            "adapter.targets": "q_proj,v_proj,fc1",
            "head.start": "zeros",
        }
    return reviews


@contextmanager
def seeded_entropy() -> Iterator[None]:
    """Draw private randomness from a fixed seed."""
    draws = np.random.default_rng(20)
    with replaced_entropy(lambda count: draws.integers(0, 2**64, count, dtype=np.uint64)):
        yield


def run_case(name: str, folder: Path) -> Left:
    """Run a case in ``folder``, which is empty, and return what it leaves."""
    case = CASES[name]
    settings = {**base_settings(case.base, folder), **case.settings}
    if settings.get("adapter.start") == "public-gradient":
        settings["start.data"] = str(write_reviews(folder / "public.csv", 60, seed=9))
    with seeded_entropy():
        left = run_in_process(settings, case.sites, kind=case.transport)
    tensors = {
        f"{file.stem}/{key}": tensor
        for file in sorted((left / "adapter").glob("*.safetensors"))
        for key, tensor in load_file(file).items()
    }
    sent: list[list[int | None]] = [[line.bytes_down, line.bytes_up] for line in read_lines(RoundLine, left)]
    ledgers = {path.stem: ledger_rows(path) for path in sorted((left / "ledgers").glob("*.sqlite"))}
    if (servers := left / "ledgers" / "server.json").exists():
        charges = json.loads(servers.read_text(encoding="utf-8"))["charges"]
        ledgers["server"] = [[charge["round_number"], charge["event"], charge["delta"]] for charge in charges]
    report = None
    if case.keeps_report:
        text = (left / "report.json").read_text(encoding="utf-8").replace(str(folder), "FOLDER")
        report = timeless(json.loads(text))
    return Left(tensors, ledgers, sent, report)


def ledger_rows(path: Path) -> list[list[Any]]:
    """Return the charges of a site's ledger in order: round, purpose, unit, kind, figures, count, δ."""
    with closing(sqlite3.connect(path)) as ledger:
        columns = "round, purpose, unit, kind, figures, count, delta"
        return [list(row) for row in ledger.execute(f"SELECT {columns} FROM charges ORDER BY id")]


def timeless(report: Any) -> Any:
    """Return a report without what follows from the clock, the machine or the code's hash."""
    if isinstance(report, dict):
        return {key: timeless(value) for key, value in report.items() if key not in UNSTORED}
    return [timeless(value) for value in report] if isinstance(report, list) else report


def figures(tensors: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """Return each tensor's norm and its products with a few fixed random unit vectors."""
    kept = {}
    for name, tensor in sorted(tensors.items()):
        flat = tensor.double().flatten()
        random = torch.randn(PRODUCTS, len(flat), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        products = (random / random.norm(dim=1, keepdim=True)) @ flat
        kept[name] = [float(f"{value:.9g}") for value in (float(flat.norm()), *products.tolist())]
    return kept


def furthest(found: Mapping[str, list[float]], stored: Mapping[str, list[float]]) -> float:
    """Return the largest difference of two cases' figures, over the stored tensor's norm."""
    assert found.keys() == stored.keys(), "the adapter has other tensors than the stored one"
    return max(
        abs(new - old) / (stored[name][0] or 1.0)
        for name in stored
        for new, old in zip(found[name], stored[name], strict=True)
    )


def differences(found: Any, stored: Any, close: Callable[[float, float], bool], at: str = "") -> list[str]:
    """Return where two reports differ; numbers that are ``close`` do not."""
    if isinstance(found, dict) and isinstance(stored, dict):
        names = sorted(found.keys() ^ stored.keys())
        both = found.keys() & stored.keys()
        return [f"{at}.{name}" for name in names] + [
            gap for name in sorted(both) for gap in differences(found[name], stored[name], close, f"{at}.{name}")
        ]
    if isinstance(found, list) and isinstance(stored, list) and len(found) == len(stored):
        pairs = enumerate(zip(found, stored, strict=True))
        return [gap for i, (new, old) in pairs for gap in differences(new, old, close, f"{at}[{i}]")]
    if isinstance(found, float) and isinstance(stored, float) and close(found, stored):
        return []
    return [] if found == stored else [f"{at}: {found!r}, stored {stored!r}"]


def nearly(found: float, stored: float) -> bool:
    """Return whether two figures differ by no more than another processor's rounding."""
    return math.isclose(found, stored, rel_tol=1e-4, abs_tol=1e-6)
