"""Steps on the model in its first order around a point: one pass over the records, then many cheap rounds.

A record's logits are replaced by their first order in the trained tensors (``common.tasks.tangent``). Its Jacobian J
and its features, with them all that a step asks of it, are computed once in a phase, or as often as the phase says
(``common.config.phases``), each record in its own fixed shape, and kept in the memory of the process. A step then clips
the record's gradient Jᵀ e, which is the real model's at the point itself, and near it as far as the model is linear.
Clip, noise and price are those of any step: J depends on the record alone and on what was received, so a record still
moves a sum by one clip at most. The head stays as it was received: beside Jacobians of the logits its gradient would
only use up the clip.

Where a small adapter hardly leaves the linear range, this buys many steps on all records for the time of one.
Fine-tuning a linearised model without privacy: Maddox et al. 2021 (arXiv 2103.01439); its steps under DP, for images:
Golatkar et al. 2022 (AdaMix, arXiv 2203.11481).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fedveil.common.config.phases import Schedule
from fedveil.common.errors import MechanismError, ModelError
from fedveil.common.log import place_of
from fedveil.common.messages.round import TrainTask
from fedveil.common.messages.state import AdapterState
from fedveil.common.model.alone import step_alone
from fedveil.common.model.device import autocast
from fedveil.common.model.federated import FederatedModel
from fedveil.common.model.shapes import FixedBatch
from fedveil.common.tasks import Record
from fedveil.common.tasks.base import owner_of
from fedveil.common.tasks.examples import Dataset
from fedveil.common.tasks.featured import FEATURES, SCALES, TANGENTS
from fedveil.privacy.dpsgd import PrivateSteps
from fedveil.privacy.plan import gaussian_plan

log = logging.getLogger("fedveil.site")
BYTES = 2
"""Of one derivative as it is kept."""
MOST_BYTES = 2**32
"""Memory that the derivatives of a site's records may take, by its public size; and those of all sites of a process."""
_PLAN = gaussian_plan(
    clip_norm=1.0, noise_multiplier=1.0, sample_rate=1.0, expected_batch_size=1.0, delta=1e-5, max_epsilon=1.0
)


@dataclass(frozen=True)
class Computation:
    """Which computation of features or Jacobians it is: what is kept of another one serves none."""

    run: str
    phase: int
    """Index of the run's phase."""
    number: int
    """In that phase."""
    start: str
    """Fingerprint of the adapter's start."""
    basis: str
    """Fingerprint of what travels once."""

    @classmethod
    def of_task(cls, task: TrainTask, schedule: Schedule) -> Computation:
        """Return that of a task's round."""
        phase, number = schedule.computation(task.round_number)
        return cls(task.run, phase, number, task.start_fingerprint, task.basis_fingerprint)


@dataclass(frozen=True)
class Derivatives:
    """The adapter as it was when a site's features or Jacobians were computed, and the records as these vectors."""

    of: Computation
    around: AdapterState
    """The trained tensors of every adapted layer, as they were."""
    source: Dataset | None = None
    """What was read of the records that ``records`` are made from; None: there are none yet."""
    records: tuple[Record, ...] = ()
    """One that could not be computed is left out, which is to contribute zero."""


@dataclass(frozen=True)
class Keeping:
    """Where a process keeps what it makes of a site's records, and what that is made from."""

    of: Computation
    by_site: MutableMapping[str, Derivatives]
    """What the process keeps, by site; the latest alone."""
    site: str
    source: Dataset
    """What the site's records were read as."""
    before_pass: Callable[[], None]
    """Called before each pass over records that have no vectors yet, and may raise."""


@contextmanager
def linearised(
    model: FederatedModel, records: Sequence[Record], keeping: Keeping
) -> Iterator[tuple[list[Record], Mapping[str, Mapping[str, nn.Parameter]]]]:
    """Take ``model`` in its first order around where it was when this process first took it so in ``keeping.of``.

    Where that is differs between processes that began in different rounds. It follows from what was received, and from
    no record: it is kept before any is looked at, and serves a round whose records fail as it serves any other.

    Args:
        model: as received, with the run's trained tensors requiring a gradient; afterwards it has made the steps.
        records: as ``FederatedModel.prepare`` makes them; they stay as they are.
        keeping: where their vectors are kept, and for what.

    Yields:
        The records to train on, as vectors (none of no records), and what is trained, by layer and factor.
    """
    of, by_site, site, source = keeping.of, keeping.by_site, keeping.site, keeping.source
    derivatives = by_site.get(site)
    if derivatives is None or derivatives.of != of:
        by_site[site] = derivatives = Derivatives(of, below_head(model))
    if records and derivatives.source is not source:
        by_site[site] = replace(derivatives, source=None, records=())  # before the next ones are made: they are large
        _make_room(by_site, len(records) * bytes_each(model))
        with _at(model, derivatives.around):
            vectors = _vectors(model, records, keeping.before_pass)
        by_site[site] = derivatives = replace(derivatives, source=source, records=tuple(vectors))
    with step_alone(model, derivatives.around) as trained:
        yield list(derivatives.records) if records else [], trained


def below_head(model: FederatedModel) -> AdapterState:
    """Return a copy of what is trained below the head, on the model's device."""
    around: AdapterState = {}
    for (layer, name), p in model.below_head().items():
        around.setdefault(layer, {})[name] = p.detach().clone()
    return around


def forget_records(by_site: MutableMapping[str, Derivatives], site: str) -> None:
    """Drop a site's vectors, which no later round needs; the point stays."""
    if site in by_site:
        by_site[site] = replace(by_site[site], source=None, records=())


@contextmanager
def _at(model: FederatedModel, around: AdapterState) -> Iterator[None]:
    """Put the trained tensors below the head to the point, and back."""
    places = model.below_head()
    received = {place: p.detach().clone() for place, p in places.items()}
    try:
        with torch.no_grad():
            for (layer, name), p in places.items():
                p.copy_(around[layer][name])
        yield
    finally:
        with torch.no_grad():
            for place, p in places.items():
                p.copy_(received[place])


def check_memory(model: FederatedModel, public_size: int) -> None:
    """Raise ModelError if the derivatives of ``public_size`` records are more than a site should hold."""
    numbers = sum(p.numel() for p in model.below_head().values())
    wanted = public_size * bytes_each(model)
    if wanted > MOST_BYTES:
        raise ModelError(
            f"a phase on Jacobians keeps {contrasts(model)} × {numbers} derivatives of each record, for {public_size} "
            f"records {wanted / 2**30:.1f} GiB, above {MOST_BYTES / 2**30:g}: lower adapter.rank, name fewer layers in "
            "adapter.targets, or set recipe to 'head-only'"
        )


def bytes_each(model: FederatedModel) -> int:
    """Return the memory of one record's derivatives."""
    return contrasts(model) * sum(p.numel() for p in model.below_head().values()) * BYTES


def _make_room(by_site: MutableMapping[str, Derivatives], wanted: int) -> None:
    """Drop vectors of sites, the last made first, until ``wanted`` more bytes are within ``MOST_BYTES``.

    A simulation's process plays many sites in turn. One whose vectors are dropped computes them again in its next
    round, and of sites that answer in turn the first keep theirs.
    """
    sizes = {
        site: sum(record[TANGENTS].nbytes for record in derivatives.records if TANGENTS in record)  # features have none
        for site, derivatives in by_site.items()
    }
    for site in reversed(list(by_site)):
        if sum(sizes.values()) + wanted <= MOST_BYTES:
            return
        forget_records(by_site, site)
        sizes[site] = 0


def contrasts(model: FederatedModel) -> int:
    """Return the passes over a record: one for each label after the first."""
    return model.classes - 1


def _vectors(model: FederatedModel, records: Sequence[Record], before_pass: Callable[[], None]) -> list[Record]:
    found: dict[int, Record] = {}
    head = model.head.values()
    for parameter in head:
        parameter.requires_grad_(False)
    try:
        trained = [p for p in model.module.parameters() if p.requires_grad]
        order = order_of(model, trained)
        # Its samples alone are taken: nothing of them is stepped or released here.
        optimizer = torch.optim.SGD(trained, lr=0.0)
        with (
            model.many_passes(),
            model.sharing.opened(model, "derivatives", _PLAN) as share,
            PrivateSteps(model.module, optimizer, _PLAN) as steps,
        ):
            groups = dict[int, list[int]]()
            for batch, parts in share(model.noted_batches(records, model.shapes, groups), before_pass):
                positions = groups.pop(id(batch))
                if parts is None:
                    _compute(model, steps, order, batch, positions, found, before_pass)
                else:
                    _put(found, positions, batch, parts)
    finally:
        for parameter in head:
            parameter.requires_grad_(model.head_trained)
    return [{**found[i], **owner_of(records[i])} for i in sorted(found)]


def order_of(model: FederatedModel, trained: Sequence[nn.Parameter]) -> list[int]:
    """Return the place of each tensor of ``FederatedModel.linearised``'s step among the module's trained ones."""
    places = {id(p): i for i, p in enumerate(trained)}
    return [places[id(p)] for p in model.below_head().values()]


def _compute(
    model: FederatedModel,
    steps: PrivateSteps,
    order: Sequence[int],
    batch: FixedBatch,
    positions: Sequence[int],
    found: dict[int, Record],
    before_pass: Callable[[], None],
) -> None:
    """Put the vectors of a batch's records, at ``positions``, into ``found``; if the pass fails, each passes alone."""
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for label in range(1, model.classes):
        before_pass()
        try:
            parts.append(derivatives(model, steps, order, batch, label))
        except MechanismError:
            raise
        except Exception as error:
            if batch.records == 1:
                log.warning("a record could not be computed and contributes zero: %s", place_of(error))
                return
            for row, position in enumerate(positions):
                _compute(model, steps, order, batch.alone(row), [position], found, before_pass)
            return
    _put(found, positions, batch, parts)


def _put(
    found: dict[int, Record],
    positions: Sequence[int],
    batch: FixedBatch,
    parts: Sequence[tuple[Tensor, Tensor, Tensor]],
) -> None:
    """Put a batch's vectors into ``found`` at its records' positions, from the ``derivatives`` of all labels."""
    labels, features = batch["labels"].tolist(), parts[-1][0]
    tangents, scales = (torch.stack([part[i] for part in parts], dim=1) for i in (1, 2))
    for row, position in enumerate(positions):
        found[position] = {
            FEATURES: features[row].clone(),
            TANGENTS: tangents[row].clone(),
            SCALES: scales[row].clone(),
            "labels": labels[row],
        }


def derivatives(
    model: FederatedModel, steps: PrivateSteps, order: Sequence[int], batch: FixedBatch, label: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a batch's features, shape (records, width), and one label's derivatives, shape (records, numbers), on CPU.

    The derivatives are float16, and the third is what each record's are to be multiplied by, shape (records,).

    Args:
        model: whose head takes no gradient here.
        steps: over what is trained below the head.
        order: of its tensors in the result.
        batch: the records.
        label: whose logit, less the first label's, is derived; at least 1.
    """
    seen: list[Tensor] = []

    def contrast(batch: FixedBatch) -> Tensor:
        with autocast(model.device, model.precision):
            features = model.module.features(batch)
            logits = model.module({**batch, FEATURES: features})
        seen.append(features.detach()[: batch.records])
        return (logits[:, label] - logits[:, 0])[: batch.records]

    samples = steps.samples(batch, contrast)
    part = torch.cat([samples[i].flatten(1).float() for i in order], dim=1)
    scales = _scales(part)
    return seen[0].float().cpu(), (part / scales[:, None]).half().cpu(), scales.cpu()


def _scales(rows: Tensor) -> Tensor:
    """Return for each row the power of two by which its longest number is in [1, 2); 1 for what has none such.

    >>> _scales(torch.tensor([[0.0, -12.0], [0.0, 0.0], [2e-9, 1e-9]])).log2().tolist()
    [3.0, 0.0, -29.0]
    """
    longest = rows.abs().amax(1)
    # At most 2⁻¹⁰⁰: the quotient by it is a number.
    usable = longest.isfinite() & (longest > 2.0**-100)
    return torch.where(usable, longest, torch.ones_like(longest)).log2().floor().exp2()
