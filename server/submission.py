"""Refuse a wrong setting by its name when ``flwr run`` is called, before the job is sent.

Afterwards that is impossible: Flower's SuperLink refuses a key that the app does not declare as an "invalid run
configuration" and keeps the name to its own log, and a value of the wrong type starts a run that only then
fails. Before it sends a job, ``flwr run`` looks the app's components up, which imports ``server``: that
is where this is called from. In any other process it does nothing. The server itself checks again when
the run starts, so nothing depends on where a job was sent from.
"""

from __future__ import annotations

import os
from pathlib import Path

import click

from fedveil.common.errors import ConfigError

OVERRIDES = "run_config_overrides"
"""What Flower's command line calls its ``-c``."""
CHECKED = "FEDVEIL_SETTINGS_CHECKED"
"""Environment variable of a ``flwr run`` whose caller has checked the settings: to do it again costs seconds."""


def refuse_wrong_settings() -> None:
    """Check the app's settings with those of the command line over them, if this is ``flwr run``.

    Raises:
        click.ClickException: a setting is unknown (the nearest known one is named), ill-typed or out of range,
            or the strategy, adapter and privacy mode do not fit together; one line.
    """
    context = click.get_current_context(silent=True)
    if context is None or OVERRIDES not in context.params or os.environ.get(CHECKED):
        return
    from flwr.common.config import flatten_dict, get_project_config, parse_config_args

    try:
        from fedveil.strategies.job import configure
    except ImportError:
        return  # Sent from a place that has Flower only; the server checks.
    app = get_project_config(Path(context.params["app"]).expanduser())["tool"]["flwr"]["app"]
    try:
        configure({**flatten_dict(app.get("config")), **parse_config_args(context.params[OVERRIDES])})
    except ConfigError as error:
        raise click.ClickException(str(error)) from error
