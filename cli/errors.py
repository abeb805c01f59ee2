"""Command-line errors: one line on stderr, and an exit code that is not zero."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from typing import Any

import click
import typer
from rich.console import Console
from typer.core import TyperGroup

from fedveil.common.check import nearest
from fedveil.common.errors import FedVeilError


class Commands(TyperGroup):
    """A group of commands that names the nearest one once: click and Typer each do in some versions."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command that the first word names; UsageError for an unknown one."""
        if self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            raise click.UsageError(f"No such command {args[0]!r}{nearest(args[0], self.commands)}", ctx)
        return super().resolve_command(ctx, args)


def for_people(command: Callable[..., None]) -> Callable[..., None]:
    """Turn an error that is meant for people into one line and exit code 1."""

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except FedVeilError as error:
            _say(error, error)
            raise typer.Exit(1) from error
        except OSError as error:
            # Of the disk or of a port, as the machine says it: no fault of the program, whose trace would say nothing.
            _say(f"{error.filename}: {error.strerror}" if error.filename else error.strerror or error, error)
            raise typer.Exit(1) from error
        except KeyboardInterrupt as stop:
            _say(str(stop) or "Interrupted. Privacy already spent stays spent.", stop)
            raise typer.Exit(130) from None

    return wrapped


def _say(what: object, error: BaseException) -> None:
    """Print a line, and below it the notes on the error: where what was begun lies, and how to go on."""
    console = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False, markup=False)
    with suppress(OSError):  # of a terminal that is gone
        console.print("\n".join([f"fedveil: {what}", *getattr(error, "__notes__", [])]))
