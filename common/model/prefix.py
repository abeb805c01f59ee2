"""The layers before the first adapted one: what leaves them follows from a record and from the base model alone.

A run that adapts the last layers of a model passes each record through the same frozen layers in every step. What
leaves them is kept as it is, in its own precision and in the record's own shape, so that a pass that begins behind them
has the bits of one that begins before (``client.prefixes``; ``client.kept_prefixes`` compares them).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from fedveil.common.adapters.layers import layers_of
from fedveil.common.tasks import Record

if TYPE_CHECKING:
    from fedveil.common.model.federated import FederatedModel

NAME = 32
"""Bytes of a record's name, in front of its values."""
ALIGNMENT = 64
"""Of names and values, in bytes."""


@dataclass(frozen=True)
class Form:
    """What leaves the frozen layers of one record of a length."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: int
    """Of the tuple that a layer returns, whose first is the values and whose others are None; 0: it is no tuple."""

    @property
    def size(self) -> int:
        """Bytes of the values with their name, up to the next one's."""
        numbers = torch.Size(self.shape).numel() * self.dtype.itemsize
        return ALIGNMENT - (-numbers // ALIGNMENT) * ALIGNMENT

    def found(self, values: Tensor) -> Any:
        """Return values as a layer returns them."""
        return (values, *[None] * (self.parts - 1)) if self.parts else values


@dataclass(frozen=True)
class Places:
    """Where the values of a batch's records are kept, or are to be: by each one's first byte and its name."""

    form: Form
    places: tuple[tuple[int, bytes], ...]


@dataclass
class Prefix:
    """The layers before the first adapted one, in their order."""

    layers: tuple[nn.Module, ...]
    name: str
    """Of the last of them."""
    forms: dict[int, Form] = field(default_factory=dict)
    """By length, once a rehearsal has compared what is kept with what is computed; nothing else is kept."""
    memory: Tensor | None = None
    """Bytes in which values are kept, shared with other processes; None: nothing is kept now."""

    def form_of(self, compute: Callable[[], object], rows: int) -> Form | None:
        """Return the form of what leaves the layers in a pass of ``rows`` rows; None if it is none that can be kept."""
        seen: list[Any] = []
        with self._watched(seen.append), torch.no_grad():
            compute()
        if len(seen) != 1:
            return None
        parts = len(seen[0]) if isinstance(seen[0], tuple) else 0
        values, *others = seen[0] if parts else (seen[0],)
        if not isinstance(values, Tensor) or any(other is not None for other in others):
            return None
        return Form(tuple(values.shape[1:]), values.dtype, parts) if len(values) == rows and values.ndim > 1 else None

    def entered(self, places: Places | None, rows: int) -> AbstractContextManager[None]:
        """Return the context of one pass of ``rows`` rows: it begins behind the layers where all records are kept.

        Else it begins before them, and leaves there what it finds.
        """
        if places is None or self.memory is None:
            return nullcontext()
        memory = self.memory
        if all(name_at(memory, offset) == name for offset, name in places.places):
            return self._skipped(_read(memory, places, rows), places.form)
        return self._watched(lambda found: _write(memory, places, found))

    @contextmanager
    def _watched(self, see: Callable[[Any], None]) -> Iterator[None]:
        hook = self.layers[-1].register_forward_hook(lambda layer, given, found: see(found))
        try:
            yield
        finally:
            hook.remove()

    @contextmanager
    def _skipped(self, values: Tensor, form: Form) -> Iterator[None]:
        try:
            for layer in self.layers:
                layer.forward = lambda *given, **named: form.found(values)
            yield
        finally:
            for layer in self.layers:
                vars(layer).pop("forward", None)


def name_at(memory: Tensor, offset: int) -> bytes:
    """Return the name of the values at a place; where none are whole, zeros or another's."""
    return memory[offset : offset + NAME].numpy().tobytes()


def _read(memory: Tensor, places: Places, rows: int) -> Tensor:
    form = places.form
    size = torch.Size(form.shape).numel() * form.dtype.itemsize
    starts = [offset + ALIGNMENT for offset, _ in places.places]
    starts += starts[:1] * (rows - len(starts))  # filler counts for nothing, whatever enters
    return torch.stack([memory[start : start + size].view(form.dtype).view(form.shape) for start in starts])


def _write(memory: Tensor, places: Places, found: Any) -> None:
    """Keep what left the layers; a name comes last, and is there once all of its values are."""
    values = (found[0] if places.form.parts else found).detach()
    for row, (offset, name) in enumerate(places.places):
        raw = values[row].contiguous().view(-1).view(torch.uint8)
        memory[offset : offset + NAME] = 0
        memory[offset + ALIGNMENT : offset + ALIGNMENT + len(raw)] = raw
        memory[offset : offset + NAME] = torch.frombuffer(bytearray(name), dtype=torch.uint8)


def prefix_of(model: nn.Module, device: torch.device) -> Prefix | None:
    """Return the layers before the first adapted one of a model's list of layers.

    None: an adapted layer is outside that list or in its first; those before it are called elsewhere in the list, or
    otherwise than torch calls layers; or they are on a GPU, where nothing was compared.
    """
    adapted = {id(layer) for layer in layers_of(model).values()}
    if not adapted or device.type != "cpu":
        return None
    for name, blocks in model.named_modules():
        if not isinstance(blocks, nn.ModuleList):
            continue
        inside = [{id(module) for module in block.modules()} for block in blocks]
        if not adapted <= set().union(*inside):
            continue
        first = next(number for number, modules in enumerate(inside) if modules & adapted)
        shared = set().union(*inside[:first]) & set().union(*inside[first:])
        if not first or shared or any("forward" in vars(block) for block in blocks):
            return None
        return Prefix(tuple(blocks)[:first], f"{name}.{first - 1}")
    return None


class Keeper(Protocol):
    """Where the values of one site's records are kept while a context lasts."""

    def order(self, model: FederatedModel, records: Sequence[Record], lengths: Sequence[tuple[int, int]]) -> list[int]:
        """Return the positions of records of these lengths and rows, those that are kept first."""

    def places(self, model: FederatedModel, records: Sequence[Record], length: int, rows: int) -> Places | None:
        """Return where the values of records are kept, or are to be; None if that is not for all of them."""

    def descriptors(self) -> tuple[int, ...]:
        """Return descriptors of the memory, for workers."""

    def aside(self, model: FederatedModel) -> AbstractContextManager[None]:
        """Return the context in which records are no one's: what is kept of them goes at its end."""


class Keeping(Protocol):
    """What may keep the values of sites' records from pass to pass."""

    def opened(self, model: FederatedModel, site: str, run: str) -> AbstractContextManager[None]:
        """Return the context in which a model's passes begin behind its frozen layers where they can."""


class NothingKept:
    """Keeps nothing."""

    def opened(self, model: FederatedModel, site: str, run: str) -> AbstractContextManager[None]:
        """Return the context in which every pass begins where the model does."""
        del model, site, run
        return nullcontext()
