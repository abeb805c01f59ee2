"""The table and the options that most runs need, beside ``-c`` for every setting."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedveil.common.errors import ConfigError
from fedveil.common.setting_names import called

if TYPE_CHECKING:
    from fedveil.common.config.flat import Scalar
    from fedveil.experiments.api.prepared import Division

OPTIONS = {
    "data.text": "--text",
    "data.label": "--label",
    "data.labels": "--labels",
    "data.test": "--test",
    "data.test-size": "--test",
    "data.key": "--site",
    "privacy.epsilon": "--epsilon",
}
"""The option that each of these settings has."""


@dataclass(frozen=True)
class Given:
    """What a command line sets of a run; what the table and its options say wins over ``-c``."""

    table: str
    own: dict[str, Scalar]
    """Settings that the table and its options stand for."""
    config: list[str]
    """As ``-c`` has them."""
    test: str = ""
    """A number of rows, a share of them or a table of its own; empty: as the settings say."""
    site: str = ""
    ledger: Path | None = None

    @cached_property
    def settings(self) -> dict[str, Scalar]:
        """All settings, flat; read on the first use, since a file of settings may keep one waiting."""
        return {**self._others, **self.own}

    @cached_property
    def _others(self) -> dict[str, Scalar]:
        """The settings of ``-c``, without those that the table and its options stand for."""
        from fedveil.common.config.text import files_in, parse_settings

        if self.table and files_in([self.table]):
            raise ConfigError(f"{self.table} holds settings, not records: write -c {self.table}")
        ours = {"data.test", "data.test-size"} if self.test else set[str]()
        ours |= {"data.partition", "data.key"} if self.site else set()
        return {key: value for key, value in parse_settings(self.config).items() if key not in ours}

    @property
    def names(self) -> dict[str, str]:
        """What a line for people calls settings that have an option and were not given by their own names."""
        others = vars(self).get("_others", OPTIONS)  # of what could not be read nothing is known
        return {key: name for key, name in OPTIONS.items() if key not in others}

    def division(self, sites: int | None) -> Division:
        """Return how records come to sites."""
        from fedveil.experiments.api.prepared import Division

        test: str | float | None = self.test or None
        with suppress(ValueError):
            test = int(self.test) if self.test.isdecimal() else float(self.test)
        return Division(None, test, self.site or None, sites, self.ledger)  # the table is the setting data.name

    @property
    def files(self) -> list[Path]:
        """Files of settings that are read."""
        from fedveil.common.config.text import files_in

        return files_in(self.config)


def with_table(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the table, its options and ``-c`` in place of its parameter ``given``, a ``Given``."""
    own = inspect.signature(_given, eval_str=True).parameters.values()

    @wraps(command)
    def wrapped(**arguments: Any) -> None:
        given = _given(**{parameter.name: arguments.pop(parameter.name) for parameter in own})
        with called(lambda: given.names):
            command(**arguments, given=given)

    signature = inspect.signature(command, eval_str=True)
    others = [parameter for parameter in signature.parameters.values() if parameter.name != "given"]
    named = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in (*own, *others)]
    wrapped.__signature__ = signature.replace(parameters=named)  # type: ignore[attr-defined]
    return wrapped


def _given(
    table: Annotated[
        str, typer.Argument(help="Your table (.csv, .tsv, .jsonl, .parquet), a folder of such, or a data set's name.")
    ] = "",
    text: Annotated[str, typer.Option(help="Column of the texts; guessed if one choice is sure.")] = "",
    label: Annotated[str, typer.Option(help="Column of the labels; guessed if one choice is sure.")] = "",
    labels: Annotated[
        list[str] | None,
        typer.Option(help="All labels in order, with commas between; or once for each label, which may have any sign."),
    ] = None,
    site: Annotated[str, typer.Option(help="Column that names the site of each row, in place of --sites.")] = "",
    test: Annotated[
        str, typer.Option(help="Held-out rows: a number, a share such as 0.2, or a table; a tenth if not said.")
    ] = "",
    epsilon: Annotated[float | None, typer.Option(help="Privacy budget of each site; 8 if not said.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Rounds of training; chosen to suit if not said.")] = None,
    ledger: Annotated[
        Path | None, typer.Option(help="Folder of ledgers: runs on these records that name it share one budget.")
    ] = None,
    config: Annotated[
        list[str] | None,
        typer.Option(
            "-c",
            "--config",
            help="Other settings: 'key=value', a TOML file, or a shipped one's name; may be given again.",
        ),
    ] = None,
) -> Given:
    """Return what was given."""
    named = {"data.name": table, "data.text": text, "data.label": label, "data.labels": labels_said(labels)}
    own: dict[str, Scalar] = {key: value for key, value in named.items() if value}
    own |= {"privacy.epsilon": epsilon} if epsilon is not None else {}
    own |= {"rounds": rounds} if rounds is not None else {}
    return Given(table, own, config or [], test, site, ledger)


def labels_said(labels: list[str] | None) -> str:
    """Return labels as ``data.labels`` has them: an option that is given once holds a list, else each holds one.

    >>> labels_said(["bad,good"]), labels_said(["people, names", "places"])
    ('bad,good', '"people, names",places')
    """
    from fedveil.common.labels import labels_text

    return labels[0] if labels and len(labels) == 1 else labels_text(labels or []).strip()
