"""``fedveil settings``: what every setting means, may be and is."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from fedveil.cli.errors import for_people


@for_people
def settings(
    names: Annotated[list[str] | None, typer.Argument(help="Settings or sections; all if none is named.")] = None,
    config: Annotated[list[str] | None, typer.Option("-c", "--config", help="Settings, as in 'fedveil run'.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write them to this file as well.")] = None,
) -> None:
    """Print every setting with its meaning, range, unit and value, as a TOML file that ``-c`` takes."""
    from fedveil.cli.settings_reference import lines_of, select, values_of
    from fedveil.common.config.text import files_in, parse_settings
    from fedveil.common.files import write_output
    from fedveil.strategies.job import configure, with_recipe
    from fedveil.strategies.options import with_options

    overrides = parse_settings(config or [])
    resolved, note = with_recipe(overrides)
    job = configure(resolved)
    typer.echo(note, err=True, nl=bool(note))
    overrides = with_options(overrides)
    given, run = overrides, job.settings()
    shown = [lines_of(setting, given.get(setting.key), run.get(setting.key)) for setting in select(names or [], given)]
    sys.stdout.write("\n".join(shown))
    if json_file is not None:
        content = json.dumps(values_of(given, run, names or []), indent=2, ensure_ascii=False) + "\n"
        write_output({json_file: content.encode()}, files_in(config or []))
