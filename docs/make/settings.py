"""Pages made from the settings: ``docs/reference/settings.md``, and Flower's table of them in ``pyproject.toml``."""

from __future__ import annotations

import re
from collections.abc import Sequence

from docs.make.page import MADE
from fedveil.cli.settings_reference import Setting, all_settings, options_of
from fedveil.common.config.fields import kinds_of
from fedveil.common.config.flat import Scalar, prefix_of
from fedveil.common.config.run import RunConfig
from fedveil.common.config.text import toml_value
from fedveil.common.docstrings import said_of
from fedveil.common.errors import ConfigError
from fedveil.common.starts import STARTS
from fedveil.common.tasks import TASKS
from fedveil.strategies import ROWS
from fedveil.strategies.options import START, known_settings, rows_with_options
from fedveil.strategies.rules import RULES

FLOWER = "[tool.flwr.app.config]"
"""The table of ``pyproject.toml`` that lists every setting, so that Flower lets it be overridden."""
MADE_TABLE = "# This table and those in it are made from the code: python -m docs.make"


def pyproject(text: str) -> str:
    """Return the text of ``pyproject.toml`` with Flower's table of settings as the code has it.

    Raises:
        ConfigError: the text has no such table.
    """
    match = re.search(r"^\[tool\.flwr\.app\.config\]\n.*?(?=^\[(?!tool\.flwr\.app\.config))", text, flags=re.M | re.S)
    if match is None:
        raise ConfigError(f"pyproject.toml has no table {FLOWER} before another one")
    return text[: match.start()] + flower_table() + text[match.end() :]


def flower_table() -> str:
    """Return the tables of ``pyproject.toml`` that list every setting with its default."""
    tables_of: dict[str, dict[str, Scalar]] = {"": {}}
    for key, value in known_settings().items():
        section, _, name = key.rpartition(".")
        tables_of.setdefault(section, {})[name] = value
    blocks = []
    for section, values in tables_of.items():
        header = f"[tool.flwr.app.config.{section}]" if section else f"{FLOWER}\n{MADE_TABLE}"
        blocks.append("\n".join([header, *(f"{name} = {toml_value(value)}" for name, value in values.items()), ""]))
    return "\n".join(blocks) + "\n"


def page() -> str:
    """Return ``docs/reference/settings.md``."""
    sections: dict[str, list[Setting]] = {}
    for setting in all_settings().values():
        sections.setdefault(setting.key.rpartition(".")[0], []).append(setting)
    parts = [PAGE_HEAD]
    for section, settings in sections.items():
        parts.append(f"## `{section}`" if section else "## The run")
        parts.append(_about(section))
        parts.append(_table(settings, owners=section == START[:-1]))
    core = {row for _, row in rows_with_options()}
    tasks = [type(task) for task in TASKS.values() if prefix_of(task)]
    rows = [*(row for table in (STARTS, ROWS, RULES) for row in table.values()), *tasks]
    beside = [row for row in rows if row not in core]
    parts += [BESIDE, _table([option for row in beside for option in options_of(row)], owners=True)]
    return "\n\n".join(parts) + "\n"


def _table(settings: Sequence[Setting], *, owners: bool) -> str:
    rows = ["| setting | default | what it may be | unit | meaning |", "|---|---|---|---|---|"]
    for setting in settings:
        of = f" ({', '.join(f'`{owner}`' for owner in setting.owners)})" if owners else ""
        meaning = setting.meaning.replace("|", "\\|")
        rows.append(
            f"| `{setting.key}` | `{toml_value(setting.default)}` | {setting.range} | {setting.unit or '–'} "
            f"| {meaning}{of} |"
        )
    return "\n".join(rows)


BESIDE = """\
## Rows of `contrib`

An option of a row of `contrib` exists in a run that names the row. `flwr run` takes it in the setting `options`."""
PAGE_HEAD = f"""\
# Settings

{MADE}

`fedveil settings` prints the same for a run of yours, with the value that the run fills in wherever one is left open.
`fedveil settings training` and `fedveil settings adapter.rank` print a part. Give a setting with `-c 'adapter.rank=4'`
or in a TOML file. All settings are public: the server and every site know them."""


def _about(section: str) -> str:
    """Return the first sentence on a section: that of its class."""
    if not section:
        return "What concerns the run as a whole."
    if section in ROWS:
        return f"Options of the strategy `{section}`. {said_of(ROWS[section])}."
    if section in RULES:
        return f"Options of the server's rule `{section}`. {said_of(RULES[section])}."
    if section == START[:-1]:
        return "Options of the adapter's start (`adapter.start`), each of the starts that are named behind it."
    return f"{said_of(kinds_of(RunConfig)[section])}."
