"""Train the head alone, on features of the records under the adapter as it is: phases before it is trained, and after.

An adapter that moved far moved the logits of all records to one side: the model is not linear, and what is left of
order two adds up over all that was noised. So the head is fitted to the features as they are now. They follow from the
record and from what was received, and are computed once, each in its record's fixed shape, after the charge. Steps on
them cost next to nothing. Clip, noise and price are those of any step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from fedveil.client.linearised import Derivatives, Keeping, below_head
from fedveil.common.messages.state import HEAD, AdapterState
from fedveil.common.model.alone import head_alone
from fedveil.common.model.federated import FederatedModel
from fedveil.common.tasks import Record


@contextmanager
def head_on_features(
    model: FederatedModel, records: Sequence[Record], keeping: Keeping
) -> Iterator[tuple[list[Record], Mapping[str, Mapping[str, nn.Parameter]]]]:
    """Let the head alone take a gradient, on features of ``records``; arguments as for ``linearised``.

    The adapter stays in these rounds, so features of the first of them serve all. Under another adapter they are
    computed again.

    Yields:
        The records to train on, as features (none of no records), and what is trained, by layer and factor.
    """
    of, by_site, site, source = keeping.of, keeping.by_site, keeping.site, keeping.source
    features, around = by_site.get(site), below_head(model)
    if features is None or features.of != of or not _same(features.around, around):
        by_site[site] = features = Derivatives(of, around)
    with head_alone(model):
        if records and features.source is not source:
            vectors = model.featurise([dict(record) for record in records], keeping.before_pass)
            by_site[site] = features = Derivatives(of, around, source, tuple(vectors))
        yield list(features.records) if records else [], {HEAD: model.head}


def _same(one: AdapterState, other: AdapterState) -> bool:
    return {(layer, name) for layer in one for name in one[layer]} == {
        (layer, name) for layer in other for name in other[layer]
    } and all(torch.equal(t, other[layer][name]) for layer, factors in one.items() for name, t in factors.items())
