"""One deployed site with records of its own, asked by hand: audits attack it, and tests play with its rules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from audits.tiny_models import save_tiny_model, toy_run, write_reviews
from fedveil.client.app import answer
from fedveil.client.ledger.ledger import Ledger
from fedveil.common.config.flat import Scalar
from fedveil.common.config.text import to_toml
from fedveil.common.data.sources import load_dataset
from fedveil.common.messages.round import Refusal, Reply, TrainResult, TrainTask
from fedveil.common.messages.state import AdapterState
from fedveil.common.messages.tensors import fingerprint, start_fingerprint
from fedveil.common.messages.wire import encode_task
from fedveil.common.model.base import load_base_model
from fedveil.common.model.federated import FederatedModel
from fedveil.deploy.policy_file import mechanisms_of_job, models_of, pins_of_job
from fedveil.strategies.job import configure

AMPLE = 1e6
"""Budget of a site that a test does not ask for one."""


@dataclass
class OneSite:
    """A deployed site called ``clinic``, and a server that asks it whatever a test wants."""

    settings: dict[str, Scalar]
    node: dict[str, Scalar]
    memory: dict[str, bytes] = field(default_factory=dict)

    @property
    def ledger(self) -> Path:
        """The file of its ledger."""
        return Path(str(self.node["ledger"]))

    def rule(self, **rules: Any) -> None:
        """Write the steward's policy: these rules over the pins of the site's settings and their base model.

        A rule's name is its key with underscores; None leaves a key out.
        """
        path = self.ledger.with_name("policy.toml")
        written = {**pins(self.settings), **{key.replace("_", "-"): value for key, value in rules.items()}}
        path.write_text(to_toml({key: value for key, value in written.items() if value is not None}), encoding="utf-8")
        self.node["policy"] = str(path)

    def model(self) -> FederatedModel:
        """Return the model that the site builds for these settings."""
        job = configure(self.settings)
        config = job.config
        data = load_dataset(config.data, config.model.task, str(self.node["data"]))
        return job.model(data.label_names, data.label_phrases)

    def task(
        self, round_number: int = 1, run: str = "1", change: Callable[[AdapterState], AdapterState] | None = None
    ) -> TrainTask:
        """Return the server's task for a round, from the adapter's start (or what ``change`` makes of it)."""
        job, model = configure(self.settings), self.model()
        strategy, state = job.strategy, job.start(model.start)
        basis, down = job.brought(state, round_number), strategy.downlink(state) if round_number else {}
        return TrainTask(
            run=run,
            round_number=round_number,
            state=change(down) if change else down,
            basis=basis,
            basis_fingerprint=fingerprint(basis) if basis else "",
            base_fingerprint=model.base.fingerprint,
            start_fingerprint=start_fingerprint(model.start),
        )

    def ask(self, task: TrainTask) -> Reply:
        """Send a task through the wire format and return the site's reply."""
        reply = answer(encode_task(task), self.node, self.settings, task.run, self.memory)
        assert isinstance(reply, TrainResult | Refusal)
        return reply

    def train(self, round_number: int = 1, run: str = "1") -> TrainResult:
        """Ask for a round that must succeed."""
        reply = self.ask(self.task(round_number, run))
        assert isinstance(reply, TrainResult), f"the site refuses: {reply}"
        return reply

    def refuse(self, round_number: int = 1, run: str = "1") -> Refusal:
        """Ask for a round that must be refused, with nothing charged and one line said."""
        before = self.charges()
        reply = self.ask(self.task(round_number, run))
        assert isinstance(reply, Refusal), "the site took part"
        assert "\n" not in reply.reason
        assert self.charges() == before, "a refused round was charged"
        return reply

    def charges(self) -> list[tuple[str, int, str]]:
        """Return run, round and purpose of everything in the ledger."""
        if not self.ledger.exists():
            return []
        with Ledger(self.ledger) as ledger:
            return [(entry.run, entry.round_number, entry.purpose) for entry in ledger.entries()]


def clinic(settings: dict[str, Any], folder: Path, records: int = 40, seed: int = 0) -> OneSite:
    """Return a site with so many made-up reviews, for a run of ``settings`` at a noise that is quick to price."""
    data = write_reviews(folder / f"own-{records}-{seed}.csv", records, seed)
    node: dict[str, Scalar] = {
        "site": "clinic",
        "data": str(data),
        "public-size": 50,
        "ledger": str(folder / f"clinic-{seed}.sqlite"),
    }
    site = OneSite({**settings, "data.labels": "bad,good", "privacy.noise-multiplier": 2.0, "rounds": 4}, node)
    site.rule()
    return site


def pins(settings: dict[str, Any]) -> dict[str, Any]:
    """Return a policy's keys that let a site's own records into a run of ``settings``, whatever it has and costs."""
    job = configure(settings)
    config = job.config
    models = models_of(config.model.name, _fingerprint(config.model.name, config.model.task))
    budget = {"epsilon": AMPLE, "delta": config.privacy.delta}
    return {**pins_of_job(job), **budget, "models": models, "mechanisms": mechanisms_of_job(config)}


@lru_cache
def _fingerprint(model: str, task: str) -> str:
    return load_base_model(model, task).pin


def tiny_run(folder: Path) -> dict[str, Any]:
    """Return settings of a run on the tiny BERT; model and data are in ``folder``, which must exist."""
    model = folder / "model"
    if not model.exists():
        model.mkdir()
        save_tiny_model("bert", model)
    return toy_run(str(model), folder)


def tiny_site(folder: Path, records: int = 40, **settings: Any) -> OneSite:
    """Return a site in ``folder`` (which must exist); a round there is two private steps at noise 2 and rate 1/4.

    Args:
        folder: where model, records and ledger go.
        records: how many it has; it declares 50.
        settings: of the run, with underscores for dots and dashes left out of it: ``{"rounds": 3}``.
    """
    return clinic({**tiny_run(folder), **settings}, folder, records)
