"""Figures that others have published, of other models and data: a TOML file with a table each."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from fedveil.common.errors import DataError
from fedveil.common.strict_json import from_json
from fedveil.common.toml import read_toml

SHIPPED = Path(__file__).resolve().parent.parent / "published.toml"


@dataclass(frozen=True)
class Published:
    """One figure of a publication."""

    method: str
    model: str
    data: str
    source: str
    """The publication, and the table in it."""
    accuracy: float
    """Share of right labels."""
    epsilon: float | None = None
    """As stated there; None: no privacy."""
    note: str = ""
    """By the one who copied the figure."""

    @property
    def kind(self) -> str:
        """Its method, model and data set."""
        return f"{self.method}, {self.model}, {self.data}"


def read_published(path: Path) -> list[Published]:
    """Return the figures of a file of ``[[published]]`` tables.

    Raises:
        ConfigError: it cannot be read.
        DataError: a table lacks a field or has an unknown one, or an accuracy is no share.
    """
    tables = read_toml(path, "the published figures")
    if list(tables) != ["published"] or not isinstance(tables["published"], list):
        raise DataError(
            f"{path} must hold [[published]] tables with {', '.join(item.name for item in fields(Published))}"
        )
    figures = []
    for number, table in enumerate(tables["published"], start=1):
        figure = from_json(Published, table, f"figure {number} of {path}")
        if not 0 <= figure.accuracy <= 1:
            raise DataError(f"figure {number} of {path} has the accuracy {figure.accuracy}: write a share, such as 0.9")
        figures.append(figure)
    return figures
