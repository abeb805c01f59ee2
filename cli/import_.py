"""``fedveil import``: settings from the training files of other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fedveil.cli.errors import for_people
from fedveil.common.errors import ConfigError
from fedveil.common.words import visible

console = Console(highlight=False, soft_wrap=True, emoji=False, markup=False)


@for_people
def import_(
    file: Annotated[Path, typer.Argument(help="A YAML or JSON file of TRL, axolotl, LLaMA-Factory or PEFT.")],
    output: Annotated[Path, typer.Option(help="The TOML file to write, which -c takes.")] = Path("job.toml"),
    leave_out: Annotated[
        list[str] | None, typer.Option(help="A key that is not to be used; may be given again.")
    ] = None,
) -> None:
    """Make settings from a training file of TRL, axolotl or LLaMA-Factory, or from PEFT's adapter_config.json.

    Each key becomes a setting, is refused with its reason, or is listed as not used. Nothing is written while a key is
    refused.
    """
    from fedveil.common.files import write_output
    from fedveil.experiments.imported import as_toml, by_reason, import_file

    imported = import_file(file, leave_out or [])
    lines = [f"{file} is a file of {imported.source}"]
    lines += [f"  {theirs}  →  {ours or 'as FedVeil does it'}" for theirs, ours in imported.mapped]
    lines += [f"  not used: {keys} ({why})" for why, keys in by_reason(imported.unused)]
    lines += [f"  refused: {keys} ({why})" for why, keys in by_reason(imported.refused)]
    for line in lines:
        console.print(visible(line))
    if imported.refused:
        keys = [key.split(" = ")[0] for key, _ in imported.refused]
        raise ConfigError(
            f"{file}: {', '.join(keys)} refused, and nothing written: change the file, or go on without a key by "
            f"--leave-out {keys[0]}"
        )
    if output.exists():
        raise ConfigError(f"{output} is there already: name another file with --output")
    write_output({output: as_toml(imported, file).encode()}, [file])
    console.print(f"written: {output}. It says nothing on privacy, so ε is at most 8: set privacy.epsilon")
    console.print(f"next: fedveil plan -c {output}")
