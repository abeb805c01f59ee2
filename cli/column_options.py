"""Command-line options that name columns, one for each role that some task has."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Annotated, Any

import typer

from fedveil.common.config.text import parse_settings
from fedveil.common.tasks import roles_of_all
from fedveil.common.tasks.roles import Role
from fedveil.common.words import capital

OPTION: Mapping[str, Any] = {
    "name": "option",
    "default": None,
    "annotation": Annotated[
        list[str] | None, typer.Option(help="An option of the task, such as 'preference.beta=0.2'; may be repeated.")
    ],
}
"""The option for what a task has beside columns."""


def with_columns(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for each role, such as ``--text-pair``, in place of its parameter ``columns``.

    The command gets the columns that were given, by the roles' settings, and options of the task by their keys.
    """
    roles = {role.setting.replace("-", "_"): role for role in roles_of_all()}

    @wraps(command)
    def wrapped(**given: Any) -> None:
        named = {role.setting: given.pop(name) for name, role in roles.items()}
        columns = {setting: column for setting, column in named.items() if column is not None}
        options = parse_settings(given.pop("option", None) or ())
        command(**given, columns=columns | options)

    signature = inspect.signature(command, eval_str=True)
    parameters: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        own = [*(_option(parameter, name, role) for name, role in roles.items()), parameter.replace(**OPTION)]
        parameters += own if parameter.name == "columns" else [parameter]
    wrapped.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return wrapped


def _option(columns: inspect.Parameter, name: str, role: Role) -> inspect.Parameter:
    end = "; none if left out." if role.optional and not role.usual else "."
    option = typer.Option(help=f"{capital(role.said)}, as the setting data.{role.setting}{end}")
    return columns.replace(name=name, default=None, annotation=Annotated[str | None, option])
