"""Adapter states that no honest server would send: how far one record then moves the sum, others included.

Any finite state is installed. With large factors the layers of a deep model blow rounding up until another
rounding is another answer. What must hold all the same is that a record moves nothing but its own gradient.

A mask of trained columns is the one part of a state that chooses what is trained: a site refuses one that has other
numbers than 0 and 1, before it prepares a record and before it writes a charge.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.optim import SGD

from audits.faults import SOUND, Fault
from audits.finding import judged
from audits.tiny_site import tiny_site
from audits.worlds import minus, norm, plan
from fedveil.client.cache import RecordCache
from fedveil.client.ledger.ledger import Ledger
from fedveil.client.rehearsal import rehearse
from fedveil.common.data.sources import train_and_test
from fedveil.common.findings import Finding
from fedveil.common.messages.columns import positions_of
from fedveil.common.messages.round import Refusal
from fedveil.common.messages.state import AdapterState
from fedveil.common.model.base import load_base_model
from fedveil.common.model.batching import length_batches
from fedveil.common.model.federated import FederatedModel
from fedveil.common.tasks import TASKS, Record
from fedveil.contrib.strategies.columns import MASK
from fedveil.privacy.dpsgd import PrivateSteps
from fedveil.strategies.job import configure

CLIP = 1e-3
MOST = 1 + 1e-5
"""Clips that one record may move the sum by: float64 sums, and a release in float32."""
SIZES = {"query": 30.0, "value": 3.0}
"""Of B in layers by their names: the state whose rounding grows most, of those that were tried."""


def by_neighbours(model: FederatedModel, records: Sequence[Record]) -> Iterable[Any]:
    """Cut a batch into as few tokens as fit, so that a record's shape depends on who is beside it (a fault)."""
    for group in length_batches([model.collator.size(record) for record in records], 64):
        yield model.batch([records[i] for i in group])


def install(model: FederatedModel, sizes: dict[str, float]) -> None:
    """Write a random B into each layer: of the size of the first key of ``sizes`` that is in the layer's name."""
    draw = torch.Generator().manual_seed(5)
    model.write(model.start)
    with torch.no_grad():
        for layer, factors in sorted(model.places().items()):
            if "B" in factors:
                size = next((size for word, size in sizes.items() if word in layer), 1.0)
                factors["B"].copy_(size * torch.randn(factors["B"].shape, generator=draw))


def neighbours() -> AbstractContextManager[Any]:
    """Shapes that follow from who is beside a record."""
    return patch.object(FederatedModel, "fixed_batches", by_neighbours)


NEIGHBOURS = Fault("shapes by neighbours", neighbours)


def clips_moved(model: FederatedModel, records: Sequence[Record], leave_out: Iterable[int]) -> float:
    """Return how far, in clips, the noiseless sum moves at most when one of ``leave_out`` is taken away."""
    trained = [p for p in model.module.parameters() if p.requires_grad]

    def total(chosen: Sequence[Record]) -> list[Tensor]:
        with PrivateSteps(model.module, SGD(trained, lr=0.0), plan(CLIP)) as steps:
            return [gradient.double() for gradient in steps.release(model.fixed_batches(chosen), model.losses)]

    whole = total(records)
    return max(norm(minus(whole, total([*records[:i], *records[i + 1 :]]))) for i in leave_out) / CLIP


def default_model(precision: str) -> tuple[FederatedModel, list[Record]]:
    """Return the plain job's model, rehearsed and then in a hostile state, and 24 of its reviews, tokenised."""
    job = configure({"recipe": "plain"})
    config, (train, _) = job.config, train_and_test(job.config.data, job.config.model.task)
    model = FederatedModel(
        load_base_model(config.model.name, config.model.task),
        job.adapter,
        TASKS[config.model.task],
        config.head,
        seed=config.seed,
        label_names=train.label_names,
        label_phrases=train.label_phrases,
        feature_scale=config.model.feature_scale,
        max_length=config.model.max_length,
        device="cpu",
        precision=precision,
    )
    rehearse(model)
    install(model, SIZES)
    return model, model.prepare(train.examples[:24])


def audit_state(model: FederatedModel, records: Sequence[Record], fault: Fault = SOUND) -> Finding:
    """Return how far single records move the default model's sum under a hostile state.

    Args:
        model: from ``default_model``.
        records: its records, of which those in the middle by length are left out in turn: they have most neighbours.
        fault: what is built in.
    """
    middle = sorted(range(len(records)), key=lambda i: model.collator.size(records[i]))[8:17:4]
    with fault.plant():
        moved = clips_moved(model, records, middle)
    figures: dict[str, int | float | str] = {
        "clips": f"{moved:.7f}",
        "precision": str(model.precision),
        "threads": torch.get_num_threads(),
    }
    return judged("hostile state", fault.name, moved > MOST, figures)


POSITIONS = "fedveil.contrib.strategies.columns.positions_of"
"""Where a strategy checks the masks that it was sent."""
BAD_MASKS = (0.5, -1.0, 2.0, float("nan"))
"""Numbers that a lying server puts into the first place of every mask."""


def any_columns(mask: Tensor, what: str) -> Tensor:
    """Return the columns whose number in a mask is not 0, unchecked."""
    del what
    return mask.nonzero()[:, 0]


def unchecked() -> AbstractContextManager[Any]:
    """A mask may have any numbers."""
    return patch(POSITIONS, any_columns)


@contextmanager
def checked_behind_charge() -> Iterator[None]:
    """A mask may have any numbers until the round is charged."""
    charge, charged = Ledger.charge, list[bool]()

    def noting(ledger: Ledger, *words: Any, **terms: Any) -> Any:
        receipt = charge(ledger, *words, **terms)
        charged.append(True)
        return receipt

    def late(mask: Tensor, what: str) -> Tensor:
        return (positions_of if charged else any_columns)(mask, what)

    with patch.object(Ledger, "charge", noting), patch(POSITIONS, late):
        yield


UNCHECKED = Fault("masks of any numbers", unchecked)
BEHIND_CHARGE = Fault("masks checked behind the charge", checked_behind_charge)


def audit_masks(folder: Path, fault: Fault = SOUND) -> Finding:
    """Return what a server gets that sends masks of trained columns with other numbers than 0 and 1.

    Args:
        folder: empty; model, records and ledger go there.
        fault: SOUND, UNCHECKED or BEHIND_CHARGE.
    """
    prepare, prepared, wrong = RecordCache.prepare, list[bool](), list[str]()
    site = tiny_site(folder, strategy="switchlora")

    def noting(cache: RecordCache, *words: Any) -> Any:
        prepared.append(True)
        return prepare(cache, *words)

    if isinstance(site.ask(site.task()), Refusal):
        wrong.append("an honest mask is refused")
    for number, lie in enumerate(BAD_MASKS):
        task = site.task(run=f"lie-{number}", change=partial(_with_mask, lie))
        charges = site.charges()
        prepared.clear()
        with fault.plant(), patch.object(RecordCache, "prepare", noting):
            reply = site.ask(task)
        if not isinstance(reply, Refusal) or reply.kind != "task":
            wrong.append(f"{lie}: is not refused as a wrong task")
        if prepared:
            wrong.append(f"{lie}: records are prepared")
        if site.charges() != charges:
            wrong.append(f"{lie}: the round is charged")
    figures: dict[str, int | float | str] = {"masks": len(BAD_MASKS), "wrong": "; ".join(wrong) or "nothing"}
    return judged("masks of columns", fault.name, bool(wrong), figures)


def _with_mask(number: float, state: AdapterState) -> AdapterState:
    """Return a state with this number in the first place of every mask."""
    return {
        layer: {
            name: torch.cat([torch.tensor([number]), tensor[1:]]) if name == MASK else tensor
            for name, tensor in factors.items()
        }
        for layer, factors in state.items()
    }
