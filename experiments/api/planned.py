"""A forecast of a run, as Python and notebooks show it."""

from __future__ import annotations

import html
import io
from typing import Any

from rich.console import Console

from fedveil.experiments.planner.forecast import Forecast
from fedveil.experiments.planner.tables import print_forecast
from fedveil.privacy.figures import epsilon_text

WIDTH = 100
"""Columns of its text."""


class Plan:
    """What a run would cost: privacy, time, memory, traffic. ``fedveil.plan`` returns one.

    Its text is what ``fedveil plan`` prints; ``as_dict()`` has every figure.
    """

    def __init__(self, forecast: Forecast, note: str = "") -> None:
        self._forecast, self._note = forecast, note

    @property
    def epsilon(self) -> float | None:
        """The ε that the whole run would spend at each site; None without privacy."""
        last = self._forecast.priced([self._forecast.job.config.rounds])
        return last[0].epsilon if last else None

    @property
    def seconds(self) -> float | None:
        """How long the rounds would take on this machine; None: nothing was timed."""
        each, ahead = self._forecast.round_seconds, self._forecast.feature_seconds
        if each is None:
            return None
        return each[0] * self._forecast.job.config.rounds + (ahead[0] if ahead else 0.0)

    @property
    def settings(self) -> dict[str, Any]:
        """Every setting of the run with the value that it would have."""
        return dict(self._forecast.job.settings())

    @property
    def warnings(self) -> list[str]:
        """What to know before the run starts, a sentence each."""
        return self._forecast.warnings

    def as_dict(self) -> dict[str, Any]:
        """Return every figure, as ``fedveil plan --json`` writes them."""
        return self._forecast.as_json()

    def __repr__(self) -> str:
        text = io.StringIO()
        # In a notebook Rich would show the tables there, each a second time, and write nothing to the text.
        console = Console(
            file=text, width=WIDTH, force_jupyter=False, highlight=False, emoji=False, markup=False, color_system=None
        )
        print_forecast(console, self._forecast)
        cost = "" if self.epsilon is None else f"in all: ε {epsilon_text(self.epsilon)} at each site"
        seconds = "" if self.seconds is None else f"{'in all: ' * (not cost)}about {self.seconds:.0f} s of rounds here"
        return "\n".join(
            part for part in (self._note, text.getvalue().rstrip(), ", ".join(filter(None, (cost, seconds)))) if part
        )

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(repr(self))}</pre>"
