"""The records of its sites that one process keeps from task to task, and the one way to forget them.

By site it keeps the records as the model takes them (tokens, or features where the head alone is trained), and the
vectors of phases on features or Jacobians (``client.linearised``). The records as they were read are ``client.site``'s,
and ``RecordCache.forget`` drops them too.

When something is dropped follows from tasks and from the clock, and from no record. How long it takes to free memory
follows from the records' number and lengths. So what is dropped while the time of an answer is stopped is kept aside
until that time runs (``RecordCache.free``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from fedveil.client.linearised import Derivatives, forget_records
from fedveil.client.own_records import prepared
from fedveil.client.site import Site, forget_readings
from fedveil.common.model.federated import FederatedModel
from fedveil.common.tasks import Record
from fedveil.common.tasks.base import KEPT
from fedveil.common.tasks.examples import Dataset
from fedveil.common.tasks.featured import FEATURES
from fedveil.strategies.job import Job


@dataclass(frozen=True)
class Prepared:
    """A site's records as the current model takes them."""

    run: str
    """The run that asked last."""
    source: Dataset
    """What they were read as."""
    unit: tuple[str, int]
    """The run's unit, and the most records of one."""
    records: list[Record] | None
    """Their features where the head alone is trained. None: these were dropped, and a round makes them once it is paid.
    """


@dataclass
class RecordCache:
    """What is kept of every site's records, by the site's name; a simulation's process has several sites."""

    records: dict[str, Prepared] = field(default_factory=dict)
    vectors: dict[str, Derivatives] = field(default_factory=dict)
    """The records as the steps on features or Jacobians take them."""
    dropped: list[object] = field(default_factory=list)
    """What ``free`` frees."""

    def prepare(
        self, model: FederatedModel, site: Site, job: Job, run: str
    ) -> Sequence[Record] | Callable[[], Sequence[Record]]:
        """Return the site's records as the model takes them, made once for all settings that read them the same way.

        Where features of them were dropped, it returns what makes them once the round is paid for: a server that asks
        in the name of ever another run is to get nothing of a record computed for free.
        """
        unit, most = job.unit, job.config.privacy.rows_of_unit

        def make() -> Sequence[Record]:
            records = prepared(model, site.data.examples, unit, most)
            self.records[site.name] = Prepared(run, site.data, (unit.name, most), records)
            return records

        known = self.records.get(site.name)
        if known is None or known.source is not site.data or known.unit != (unit.name, most):
            forget_records(self.vectors, site.name)  # vectors say whose a record is by the old numbers
            return make()
        self.records[site.name] = replace(known, run=run)
        return make if known.records is None else known.records

    def forget(self) -> None:
        """Drop all that this process holds of records: as read, as the model takes them, features and Jacobians.

        The point of a linearisation stays: it is of what was received.
        """
        self.records.clear()
        self.free()
        for name in list(self.vectors):
            forget_records(self.vectors, name)
        forget_readings()

    def forget_computed(self, site: str) -> None:
        """Drop all that was computed of a site's records; other sites of a simulation's process keep theirs.

        Records that are as they were read stay: to tokenise them again before a round is paid for would show in time.
        """
        known = self.records.get(site)
        if known and any(FEATURES in record or KEPT in record for record in known.records or ()):
            self.records[site] = replace(known, records=None)
        forget_records(self.vectors, site)

    def forget_other_runs(self, run: str) -> None:
        """Drop what was computed of any site's records for another run, which may have been abandoned."""
        stale = {name for name, known in self.records.items() if known.run != run}
        stale |= {name for name, known in self.vectors.items() if known.of.run != run}
        for name in stale:
            self.forget_computed(name)

    def set_aside(self, *, vectors: bool) -> None:
        """Drop the records as a model took them, to be freed by ``free``; ``vectors``: all that was computed too."""
        self.dropped.append(self.records)
        self.records = {}
        if vectors:
            self.dropped.append(self.vectors)
            self.vectors = {}

    def free(self) -> None:
        """Free what was set aside."""
        self.dropped.clear()
