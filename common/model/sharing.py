"""Interface by which a model's passes are shared among cores; without it a process makes all of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

if TYPE_CHECKING:
    from fedveil.common.model.federated import FederatedModel
    from fedveil.common.model.shapes import FixedBatch
    from fedveil.privacy.plan import PrivacyPlan

Kind = Literal["sums", "features", "derivatives"]
"""What is computed of a batch: a step's clipped sums (its rows' gradients where a unit has several rows), features, or
features with derivatives of each label's logit."""
T = TypeVar("T")
Share = Callable[[Iterable["FixedBatch"], Callable[[], None]], Iterator[tuple["FixedBatch", Any]]]
"""Computes batches and yields each with what was found, in any order; None: the caller computes it itself. Before each
pass it calls its second argument, which may raise."""


def unshared(batches: Iterable[T], before_pass: Callable[[], None]) -> Iterator[tuple[T, None]]:
    """Leave every batch to the caller, who then calls ``before_pass`` himself."""
    del before_pass
    return ((batch, None) for batch in batches)


def in_order(
    share: Share, noted: Iterable[tuple[FixedBatch, T]], before_pass: Callable[[], None]
) -> Iterator[tuple[FixedBatch, T, Any]]:
    """Yield shared batches, each with its note and what was found, in their own order, whichever is found first."""
    waiting, found = deque[tuple["FixedBatch", T]](), dict[int, Any]()

    def dealt() -> Iterator[FixedBatch]:
        for batch, note in noted:
            waiting.append((batch, note))
            yield batch

    for batch, answer in share(dealt(), before_pass):
        found[id(batch)] = answer
        while waiting and id(waiting[0][0]) in found:
            first, note = waiting.popleft()
            yield first, note, found.pop(id(first))


class Sharing(Protocol):
    """What may compute passes of a model elsewhere."""

    def opened(
        self, model: FederatedModel, kind: Kind, plan: PrivacyPlan | None = None
    ) -> AbstractContextManager[Share]:
        """Return the context in which a model's passes of one kind are shared.

        Args:
            model: as it is while the context lasts, but for the values of what is trained.
            kind: what is computed.
            plan: of the steps, whose clip and noise a sum follows from.
        """


class Unshared:
    """Shares nothing."""

    def opened(
        self, model: FederatedModel, kind: Kind, plan: PrivacyPlan | None = None
    ) -> AbstractContextManager[Share]:
        """Return the context in which the caller computes every batch."""
        del model, kind, plan
        return nullcontext(unshared)
