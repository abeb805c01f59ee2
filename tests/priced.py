"""What happens while a ledger prices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fedveil.client.ledger.rows import Receipt, price


def during_prices(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """Let ``act`` happen while a charge is being priced."""

    def watched(*terms: Any) -> Receipt:
        act()
        return price(*terms)

    monkeypatch.setattr("fedveil.client.ledger.ledger.price", watched)
