"""``fedveil settings``: what every setting means, may be and is; and the pages that are made from it.

``python -m cli.settings --write`` (``make settings``) brings ``pyproject.toml`` and ``docs/settings.md`` up to date.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cli.errors import for_people
from cli.notes import print_notes

ROOT = Path(__file__).resolve().parent.parent
console = Console(highlight=False, soft_wrap=True, emoji=False, markup=False)


@for_people
def settings(
    names: Annotated[list[str] | None, typer.Argument(help="Settings or sections; all if none is named.")] = None,
    config: Annotated[list[str] | None, typer.Option("-c", "--config", help="Settings, as of 'fedveil run'.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write them to this file as well.")] = None,
) -> None:
    """Print every setting with its meaning, range, unit and value, as a TOML file that ``-c`` takes."""
    from cli.settings_reference import lines_of, select, values_of
    from common.config.text import files_in, parse_settings
    from common.files import write_output
    from strategies.job import configure, known_settings, with_recipe
    from strategies.renamed import by_new_names

    overrides = parse_settings(config or [])
    resolved, note = with_recipe(overrides)
    job = configure(resolved)
    print_notes(job, note)
    asked, run = by_new_names(overrides, known_settings())[0], job.settings()
    shown = [lines_of(setting, asked.get(setting.key), run.get(setting.key)) for setting in select(names or [])]
    sys.stdout.write("\n".join(shown))
    if json_file is not None:
        content = json.dumps(values_of(asked, run, names or []), indent=2, ensure_ascii=False) + "\n"
        write_output({json_file: content.encode()}, files_in(config or []))


def write() -> list[Path]:
    """Bring the files that are made from the settings up to date; return those that changed."""
    from cli.settings_reference import page, pyproject

    project, reference = ROOT / "pyproject.toml", ROOT / "docs" / "settings.md"
    made = {project: pyproject(project.read_text(encoding="utf-8")), reference: page()}
    changed = [path for path, text in made.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in changed:
        path.write_text(made[path], encoding="utf-8")
    return changed


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python -m cli.settings --write")
    for path in write():
        console.print(f"written: {path.relative_to(ROOT)}")
