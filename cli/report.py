"""``fedveil report``, ``watch``, ``verify`` and ``keygen``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fedveil.cli.errors import for_people
from fedveil.cli.summary import print_summary
from fedveil.common.errors import DataError
from fedveil.common.words import counted

console = Console(highlight=False, soft_wrap=True, emoji=False, markup=False)


@for_people
def report(
    folder: Annotated[Path, typer.Argument(help="A run's folder, its id, or 'latest'; it may go on.")],
    sign: Annotated[Path | None, typer.Option(help="Private key (Ed25519, PEM) to sign the result with.")] = None,
    declared: Annotated[
        list[str] | None,
        typer.Option(
            "--declare", help="Answer a question that no file can: 'license=\"apache-2.0\"'; may be given again."
        ),
    ] = None,
    beside: Annotated[
        Path | None,
        typer.Option(help="Table of a sweep (.jsonl), whose runs on the same base model and data are shown beside."),
    ] = None,
) -> None:
    """Write a run's report as a page, Markdown and JSON, and its adapter's model card, from the files in its folder."""
    from fedveil.common.config.text import parse_settings
    from fedveil.common.paths import given_run
    from fedveil.reports import write_reports
    from fedveil.reports.declared import declare

    folder = given_run(folder)
    if declared:
        declare(folder, parse_settings(declared))
    if beside is not None:
        _keep_beside(folder, beside)
    written = write_reports(folder, sign)
    print_summary(folder)
    console.print("\n".join(str(path) for path in written))


def _keep_beside(folder: Path, table: Path) -> None:
    from fedveil.common.files import replace_file
    from fedveil.common.other_runs import BesideFile
    from fedveil.common.run_lines import ConfigFile, read_file
    from fedveil.common.strict_json import to_json
    from fedveil.experiments.sweep import groups
    from fedveil.experiments.sweep.rows import read_rows

    if not table.is_file():
        raise DataError(f"there is no table {table}: name the .jsonl file of a sweep's results")
    found = groups.beside(read_rows(table), read_file(ConfigFile, folder).settings)
    replace_file(folder / BesideFile.NAME, (json.dumps(to_json(found), indent=1) + "\n").encode())


@for_people
def watch(
    folder: Annotated[Path, typer.Argument(help="A run's folder, its id, or 'latest'; it may be finished.")],
    port: Annotated[int, typer.Option(help="Port on this machine alone; 0: a free one.")] = 0,
) -> None:
    """Serve a run's report on this machine alone, updated while the run goes on, until Ctrl-C."""
    from fedveil.common.paths import given_run
    from fedveil.reports.watch import Watched

    with Watched(given_run(folder), port) as watched:
        console.print(f"{watched.address} (Ctrl-C ends it)")
        try:
            watched.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            console.print("ended")


@for_people
def verify(
    folder: Annotated[Path, typer.Argument(help="A run's folder, its id, 'latest', or its report.json.")],
    key: Annotated[Path, typer.Option(help="The signer's public key (Ed25519, PEM).")],
) -> None:
    """Say which run was signed by a key, when and with which figures: exit code 0, or 1 if a file is not genuine."""
    from fedveil.common.other_runs import TuningFile
    from fedveil.common.paths import given_run
    from fedveil.common.words import visible
    from fedveil.privacy.figures import epsilon_text
    from fedveil.reports.signature import NotGenuine, verified
    from fedveil.reports.trials import trials_figure

    folder = given_run(folder)
    folder = folder if folder.is_dir() else folder.parent
    try:
        signed = verified(folder, key)
    except NotGenuine as error:
        console.print(f"invalid: {error}")
        raise typer.Exit(1) from None
    epsilon, delta = signed["epsilon"], signed["delta"]
    claim = "no privacy claim" if epsilon is None else f"ε {epsilon_text(float(epsilon))} at δ {delta:g}"
    if epsilon is not None:
        claim += _signed_condition(folder)
    if signed["trials"]:
        trials = TuningFile(signed["trials"], None, float(signed["epsilon_trials"]), signed["delta_trials"])
        claim += f" ({trials_figure(trials)})"
    rounds = f"after {signed['rounds_done']} of {counted(signed['rounds_planned'], 'round')}"
    files = ", ".join(sorted(signed["files"])) + _evidence_words(folder, signed["evidence"])
    console.print(
        f"valid: run {visible(signed['run'])} ({visible(signed['method'])}), {visible(signed['status'])} {rounds}, "
        f"{claim}; signed {signed['signed']} by the owner of {key}; {files}",
    )


def _signed_condition(folder: Path) -> str:
    """Return the honest sites that the ε of a genuine report counts on; empty: none."""
    from fedveil.common.strict_json import from_json
    from fedveil.reports.files import REPORT_JSON
    from fedveil.reports.sharing import Sharing, beside

    sharing = json.loads((folder / REPORT_JSON).read_bytes()).get("sharing")
    return beside(from_json(Sharing, sharing, REPORT_JSON)) if sharing else ""


def _evidence_words(folder: Path, signed: Mapping[str, str]) -> str:
    """Return which of the lines behind a report were compared as well."""
    absent = [name for name in sorted(signed) if not (folder / name).is_file()]
    here = [name for name in sorted(signed) if name not in absent]
    computed = f"; computed from {', '.join(here)}" if here else ""
    return computed + (f"; not here, so not compared: {', '.join(absent)}" if absent else "")


@for_people
def keygen(path: Annotated[Path, typer.Argument(help="Where the private key goes, such as server.pem.")]) -> None:
    """Make a pair of keys: the private one signs reports, the public one goes to those who verify them."""
    from fedveil.reports.signature import make_key

    public = make_key(path)
    console.print(f"private key: {path} (keep it to yourself)\npublic key: {public} (give it away)")
