"""What a round of very many simulated sites writes down while they answer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from fedveil.experiments.in_process import SHOWN_OF_ROUND, InProcessTransport


@pytest.mark.parametrize(("sites", "most"), [(3, 3), (SHOWN_OF_ROUND, SHOWN_OF_ROUND), (1057, 1.1 * SHOWN_OF_ROUND)])
def test_progress_is_written_after_each_of_a_few_sites_and_now_and_then_of_many(sites: int, most: float) -> None:
    shown: list[int] = []
    folder = SimpleNamespace(
        progress=shown.append, shown=SimpleNamespace(answered=lambda _, names, asked: len(names) if asked else 0)
    )
    transport = InProcessTransport([], {}, cast(Any, None))
    transport.for_model(cast(Any, SimpleNamespace(reply_layout=None)), cast(Any, folder))
    replies: dict[int, Any] = {}
    for node in range(sites):
        replies[node] = SimpleNamespace(site=f"site-{node}")
        transport._say(cast(Any, SimpleNamespace(round_number=1)), replies, sites)
    assert len(shown) <= most
    assert shown[-1] == sites
    assert sites > SHOWN_OF_ROUND or shown == list(range(1, sites + 1))
