"""Outputs of the frozen layers for the records of a process's sites, kept in memory without a name.

A record's values are found by a name that hashes the base model, its last frozen layer, how that computes, the record's
shape and the record itself. Workers (``client.cores``) read and write the same memory, of which they get the descriptor
with the model. Names are in that memory, each in front of its values and written last: what is not whole has none.
Within ``MOST_BYTES`` the first records keep theirs, and all others are computed in each pass. Neither moves a bit.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fedveil.client.made_up import inventor
from fedveil.common.model.federated import FederatedModel
from fedveil.common.model.prefix import NAME, Form, Places, name_at
from fedveil.common.tasks import Record
from fedveil.common.tasks.base import OWNER
from fedveil.strategies.job import Job

MOST_BYTES = 2**30
"""Memory for the values of all sites of a process."""
MADE_UP = ""
"""Whose made-up records are."""


@dataclass
class SharedMemory:
    """Memory without a name, which other processes can have as well; pages that nothing was written to take none."""

    descriptor: int
    bytes: Tensor

    @classmethod
    def new(cls, size: int) -> SharedMemory:
        """Return new memory; it goes with its last user."""
        descriptor = os.memfd_create("", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, size)
        return cls(descriptor, mapped(descriptor))

    def __del__(self) -> None:
        os.close(self.descriptor)


def mapped(descriptor: int) -> Tensor:
    """Return the bytes of memory, as all that have its descriptor see them."""
    return torch.frombuffer(mmap.mmap(descriptor, 0), dtype=torch.uint8)


@dataclass
class Prefixes:
    """The values of a process's sites, by site."""

    most: int = MOST_BYTES
    memory: SharedMemory | None = None
    runs: dict[str, str] = field(default_factory=dict)
    """The run that kept last, by site."""
    _places: dict[str, dict[bytes, tuple[int, int]]] = field(default_factory=dict)
    """First byte and bytes of every name, by site."""
    _free: dict[int, list[int]] = field(default_factory=dict)
    """First bytes of places of a size that were given back."""
    _end: int = 0

    @contextmanager
    def opened(self, model: FederatedModel, site: str, run: str) -> Iterator[None]:
        """Let passes begin behind a model's frozen layers where its records are kept; see ``Keeping``."""
        prefix = model.prefix
        if prefix is None or not prefix.forms:
            yield
            return
        self.memory = self.memory or SharedMemory.new(self.most)
        before = model.keeper, prefix.memory
        model.keeper, prefix.memory = _Keeper(self, site), self.memory.bytes
        self.runs[site] = run
        self._places.setdefault(site, {})
        try:
            yield
        finally:
            model.keeper, prefix.memory = before

    def place(self, site: str, name: bytes, size: int) -> int | None:
        """Return the first byte of a name's place, a new one if need be; None: there is no room."""
        places = self._places[site]
        if name not in places:
            if free := self._free.get(size):
                places[name] = free.pop(), size
            elif self._end + size > self.most:
                return None
            else:
                places[name] = self._end, size
                self._end += size
        return places[name][0]

    def has(self, site: str, name: bytes) -> bool:
        """Return whether the values of a name are there."""
        where = self._places[site].get(name)
        return where is not None and self.memory is not None and name_at(self.memory.bytes, where[0]) == name

    def names(self, site: str) -> list[bytes]:
        """Return the names that a site has places for."""
        return list(self._places[site])

    def forget_site(self, site: str) -> None:
        """Drop the values of a site's records."""
        self.runs.pop(site, None)
        places = self._places.pop(site, {})
        if not self._places or self.memory is None:
            self.forget()
            return
        for offset, size in places.values():
            self.memory.bytes[offset : offset + size] = 0
            self._free.setdefault(size, []).append(offset)

    def forget(self) -> None:
        """Drop all."""
        self.runs, self._places, self._free = {}, {}, {}
        self.memory, self._end = None, 0


@dataclass(frozen=True)
class _Keeper:
    """Keeps the values of one site's records; see ``common.model.prefix.Keeper``."""

    prefixes: Prefixes
    site: str

    def order(self, model: FederatedModel, records: Sequence[Record], lengths: Sequence[tuple[int, int]]) -> list[int]:
        """Return the positions of records, those that are kept first: batches are then whole of one or the other."""
        names = [name_of(model, record, *shape) for record, shape in zip(records, lengths, strict=True)]
        return sorted(range(len(names)), key=lambda i: not self.prefixes.has(self.site, names[i]))

    def places(self, model: FederatedModel, records: Sequence[Record], length: int, rows: int) -> Places | None:
        """Return where the values of records of one length are kept, or are to be; None if not all have room."""
        form: Form | None = model.prefix.forms.get(length) if model.prefix else None
        if form is None:
            return None
        found = []
        for record in records:
            name = name_of(model, record, length, rows)
            place = self.prefixes.place(self.site, name, form.size)
            if place is None:
                return None
            found.append((place, name))
        return Places(form, tuple(found))

    def descriptors(self) -> tuple[int, ...]:
        """Return the descriptor of the memory."""
        return () if self.prefixes.memory is None else (self.prefixes.memory.descriptor,)

    @contextmanager
    def aside(self, model: FederatedModel) -> Iterator[None]:
        """Keep made-up records inside it, and drop them at its end."""
        with self.prefixes.opened(model, MADE_UP, MADE_UP):
            try:
                yield
            finally:
                self.prefixes.forget_site(MADE_UP)


def pays(job: Job) -> bool:
    """Return whether a run passes its records through the model more than once, by public figures alone."""
    steps = job.config.training.local_steps * job.sample_rate
    return sum(phase.computations() or phase.rounds * steps for phase in job.config.timeline.phases) > 1


def most_bytes(job: Job, model: FederatedModel, records: int) -> int:
    """Return the most memory that the values of so many records take; 0 where a run keeps none."""
    if model.prefix is None or job.unit.grouped or not job.mechanism.rehearsed or not pays(job):
        return 0
    length = model.shapes.lengths[-1]
    batch = model.fixed_batch([inventor(model, model.task)(max(1, length - 1), 0)], length, 1)
    form = model.prefix.form_of(lambda: model.features(batch), 1)
    return min(MOST_BYTES, records * form.size) if form else 0


def name_of(model: FederatedModel, record: Record, length: int, rows: int) -> bytes:
    """Return the name of a record's values: a hash of all that they follow from, ``NAME`` bytes."""
    layer = model.prefix.name if model.prefix else ""
    ways = str(model.precision), model.lowers, model.attention, torch.get_num_threads()
    digest = hashlib.sha256(repr((model.base.fingerprint, layer, *ways, length, rows)).encode())
    for key in sorted(record):
        if key == OWNER:
            continue
        value = record[key]
        if isinstance(value, Tensor):
            value = value.numpy()
        if isinstance(value, np.ndarray):
            content = repr((value.dtype, value.shape)).encode() + value.tobytes()
        else:
            content = json.dumps(value).encode()
        digest.update(f"{key} {len(content)};".encode() + content)
    return digest.digest()[:NAME]
