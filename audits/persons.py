"""Persons as the unit: how far one moves the sum with all of their records, and how much the model tells of who was in.

    .venv/bin/python -m audits.persons

In the first audit each person is taken away in turn, one with a single record and others with up to four of several
lengths. In the second every person is a canary with records that all point one way, each longer than the clip: clipped
apart they would move their weight by several clips. Draws, sums, clip, noise and ledger are those of a site.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from audits.canary import DELTA, LENGTH, NOISE, ROUNDS, STEPS, compared
from audits.dirac import Dirac
from audits.faults import DOUBLED, HALVED, PERSON_DIVIDED, ROW_CLIPPED, SOUND, Fault
from audits.finding import judged
from audits.sensitivity import MOST
from audits.shell import run_alone, with_each
from audits.worlds import Gradient, Recorder, World, alone, minus, norm, plan
from fedveil.client.ledger.ledger import Ledger
from fedveil.client.ledger.rows import Charge
from fedveil.common.findings import Finding
from fedveil.common.tasks import Record
from fedveil.common.tasks.base import OWNER
from fedveil.privacy.dpsgd import PrivateSteps
from fedveil.privacy.plan import PrivacyPlan, gaussian_plan
from fedveil.privacy.units import PERSON

CANARIES, RECORDS = 3000, 3
"""Persons, and the records of each."""
PART = 1500
"""Records of one forward pass."""
OWNERS = (0, 1, 1, 2, 1, 2, 1)
"""Whose each record of a world is."""
FAULTS = (HALVED, DOUBLED, ROW_CLIPPED, PERSON_DIVIDED)


def owned(world: World, owners: Sequence[int] = OWNERS) -> list[Record]:
    """Return a world's records, each with whose it is."""
    return [{**record, OWNER: owner} for record, owner in zip(world.records, owners, strict=True)]


def by_person(clip: float) -> PrivacyPlan:
    """Return a plan almost without noise whose unit is a person."""
    return replace(plan(clip), unit=PERSON)


def summed(world: World, records: Sequence[Record], figures: PrivacyPlan) -> Gradient:
    """Return what one step on all ``records`` hands to the optimiser."""
    optimizer = Recorder(world.trained)
    with PrivateSteps(world.model.module, optimizer, figures) as steps:
        steps.step(figures.parts(world.model, records), world.model.losses)
    return optimizer.given[0]


def persons_gradient(world: World, records: Sequence[Record]) -> Gradient:
    """Return the sum of one person's gradients the slow and obvious way, each record by itself and without hooks."""
    each = [alone(world, record) for record in records]
    return [torch.stack(parts).sum(0) for parts in zip(*each, strict=True)]


def audit_persons(world: World, fault: Fault = SOUND) -> Finding:
    """Take each person away in turn, at a clip that each record exceeds by itself, and at one that no person does."""
    records, worst = owned(world), 0.0
    held = [[r for r in records if r[OWNER] == owner] for owner in dict.fromkeys(OWNERS)]
    least = min(norm(alone(world, record)) for record in records)
    most = max(norm(persons_gradient(world, own)) for own in held)
    for clip in (least, most):
        with fault.plant():
            everyone = summed(world, records, by_person(clip))
            for own in held:
                others = [record for record in records if record[OWNER] != own[0][OWNER]]
                worst = max(worst, norm(minus(everyone, summed(world, others, by_person(clip)))) / clip)
    return judged(
        "sensitivity by person",
        fault.name,
        not worst <= MOST,
        {"model": type(world.model.base.module).__name__, "clips moved by one person, at most": worst},
    )


class _Canaries:
    """What a plan asks of a model, of records that are axes."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def fixed_groups(self, records: Sequence[Record], shapes: None = None) -> Iterator[tuple[Tensor, list[int]]]:
        """Yield the records' axes in parts; a person may lie in several."""
        del shapes
        for start in range(0, len(records), PART):
            chosen = range(start, min(start + PART, len(records)))
            yield torch.tensor([records[i]["axis"] for i in chosen]), list(chosen)


def probe_persons(folder: Path, fault: Fault = SOUND, canaries: int = CANARIES) -> Finding:
    """Train on persons who are canaries, with ``fault`` built in; as ``audits.canary.probe``."""
    made = gaussian_plan(1.0, NOISE, 1.0, expected_batch_size=canaries, delta=DELTA, max_epsilon=100.0)
    figures = replace(made, unit=PERSON)
    present = torch.rand(canaries) < 0.5
    records: list[Record] = [
        {"axis": axis, OWNER: axis} for _ in range(RECORDS) for axis in present.nonzero().flatten().tolist()
    ]
    module = nn.Linear(canaries, 1, bias=False)
    nn.init.zeros_(module.weight)
    model, losses = _Canaries(module), Dirac(module, LENGTH * figures.event.clip_norm)
    with fault.plant():
        draws = figures.draws(records)
        for number in range(1, ROUNDS + 1):
            with Ledger(folder / "ledger.sqlite") as ledger:
                charge = Charge("canaries", "1", number, (figures.release(STEPS),), DELTA, 100.0, PERSON.name)
                receipt = ledger.charge(charge)
            with PrivateSteps(module, torch.optim.SGD(module.parameters(), lr=1.0), figures) as steps:
                for _ in range(STEPS):
                    drawn = [records[i] for i in next(draws)]
                    steps.step(figures.parts(model, drawn), losses)  # type: ignore[arg-type]
    scores = module.weight.detach().flatten().double().numpy() * canaries / (ROUNDS * STEPS)
    return compared("canaries by person", fault, scores, present.numpy(), receipt.epsilon_after)


def probe_persons_all(folder: Path, canaries: int = CANARIES) -> list[Finding]:
    """Probe the code as it is, then with each fault."""
    return with_each(FAULTS, folder, lambda own, fault: probe_persons(own, fault, canaries))


if __name__ == "__main__":
    run_alone(__doc__, "canaries", CANARIES, probe_persons_all)
