"""The table and the four options that most runs need, beside ``-c`` for every setting."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedveil.common.errors import ConfigError

if TYPE_CHECKING:
    from fedveil.common.config.flat import Scalar


@dataclass(frozen=True)
class Given:
    """What a command line sets of a run; what the table and its options say wins over ``-c``."""

    table: str
    own: dict[str, Scalar]
    """Settings that the table and its options stand for."""
    config: list[str]
    """As ``-c`` has them."""

    @cached_property
    def settings(self) -> dict[str, Scalar]:
        """All settings, flat; read on the first use, since a file of settings may keep one waiting."""
        from fedveil.common.config.text import files_in, parse_settings

        if self.table and files_in([self.table]):
            raise ConfigError(f"{self.table} holds settings, not records: write -c {self.table}")
        return {**parse_settings(self.config), **self.own}

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
        ours = {parameter.name: arguments.pop(parameter.name) for parameter in own}
        command(**arguments, given=_given(**ours))

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
    epsilon: Annotated[float | None, typer.Option(help="Privacy budget of each site; 8 if not said.")] = None,
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
    if epsilon is not None:
        own["privacy.epsilon"] = epsilon
    return Given(table, own, config or [])


def labels_said(labels: list[str] | None) -> str:
    """Return labels as ``data.labels`` has them: an option that is given once holds a list, else each holds one.

    >>> labels_said(["bad,good"]), labels_said(["people, names", "places"])
    ('bad,good', '"people, names",places')
    """
    from fedveil.common.labels import labels_text

    return labels[0] if labels and len(labels) == 1 else labels_text(labels or []).strip()
