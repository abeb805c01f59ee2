"""``fedveil report``, ``verify`` and ``keygen``, and the summary that a run ends with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedveil.cli.errors import for_people
from fedveil.common.errors import DataError
from fedveil.common.words import counted
from fedveil.privacy.figures import epsilon_text

MOST_NAME = 20
"""Columns that a narrow terminal keeps for the name of a site."""
console = Console(highlight=False, soft_wrap=True, emoji=False, markup=False)


@for_people
def report(
    folder: Annotated[Path, typer.Argument(help="A run's folder, of a finished run or of one that goes on.")],
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
    from fedveil.reports import write_reports
    from fedveil.reports.declared import declare

    if declared:
        declare(folder, parse_settings(declared))
    if beside is not None:
        _keep_beside(folder, beside)
    written = write_reports(folder, sign)
    print_summary(folder)
    console.print("\n".join(str(path) for path in written))


def _keep_beside(folder: Path, table: Path) -> None:
    from fedveil.common.files import replace_file
    from fedveil.common.run_lines import BesideFile, ConfigFile, read_file
    from fedveil.common.strict_json import to_json
    from fedveil.experiments.sweep import summary
    from fedveil.experiments.sweep.rows import read_rows

    if not table.is_file():
        raise DataError(f"there is no table {table}: name the .jsonl file of a sweep's results")
    found = summary.beside(read_rows(table), read_file(ConfigFile, folder).settings)
    replace_file(folder / BesideFile.NAME, (json.dumps(to_json(found), indent=1) + "\n").encode())


@for_people
def watch(
    folder: Annotated[Path, typer.Argument(help="A run's folder, of a run that goes on or of a finished one.")],
    port: Annotated[int, typer.Option(help="Port on this machine alone; 0: a free one.")] = 0,
) -> None:
    """Serve a run's report on this machine alone, made anew while the run goes on, until Ctrl-C."""
    from fedveil.reports.watch import Watched

    with Watched(folder, port) as watched:
        console.print(f"{watched.address} (Ctrl-C ends it)")
        try:
            watched.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            console.print("ended")


@for_people
def verify(
    folder: Annotated[Path, typer.Argument(help="A run's folder, or its report.json; the signature lies beside it.")],
    key: Annotated[Path, typer.Option(help="The signer's public key (Ed25519, PEM).")],
) -> None:
    """Say which run was signed by a key, when and with which figures: exit code 0, or 1 if a file is not genuine."""
    from fedveil.common.run_lines import TuningFile
    from fedveil.common.words import visible
    from fedveil.reports.signature import NotGenuine, verified
    from fedveil.reports.trials import trials_figure

    try:
        signed = verified(folder if folder.is_dir() else folder.parent, key)
    except NotGenuine as error:
        console.print(f"invalid: {error}")
        raise typer.Exit(1) from None
    epsilon, delta = signed["epsilon"], signed["delta"]
    claim = "no privacy claim" if epsilon is None else f"ε {epsilon_text(float(epsilon))} at δ {delta:g}"
    if epsilon is not None:
        claim += _signed_condition(folder if folder.is_dir() else folder.parent)
    if signed["trials"]:
        told = TuningFile(signed["trials"], None, float(signed["epsilon_trials"]), signed["delta_trials"])
        claim += f" ({trials_figure(told)})"
    rounds = f"after {signed['rounds_done']} of {counted(signed['rounds_planned'], 'round')}"
    files = ", ".join(sorted(signed["files"])) + _evidence_words(
        folder if folder.is_dir() else folder.parent, signed["evidence"]
    )
    console.print(
        f"valid: run {visible(signed['run'])} ({visible(signed['strategy'])}), {visible(signed['status'])} {rounds}, "
        f"{claim}; signed {signed['signed']} by the owner of {key}; {files}",
    )


def _signed_condition(folder: Path) -> str:
    """Return on how many honest sites the ε of a genuine report rests; empty: on none."""
    from fedveil.common.strict_json import from_json
    from fedveil.reports.files import REPORT_JSON
    from fedveil.reports.sharing import Sharing, beside

    told = json.loads((folder / REPORT_JSON).read_bytes()).get("sharing")
    return beside(from_json(Sharing, told, REPORT_JSON)) if told else ""


def _evidence_words(folder: Path, signed: Mapping[str, str]) -> str:
    """Return which of the lines behind a report were compared as well."""
    absent = [name for name in sorted(signed) if not (folder / name).is_file()]
    here = [name for name in sorted(signed) if name not in absent]
    told = f"; computed from {', '.join(here)}" if here else ""
    return told + (f"; not here, so not compared: {', '.join(absent)}" if absent else "")


@for_people
def keygen(path: Annotated[Path, typer.Argument(help="Where the private key goes, such as server.pem.")]) -> None:
    """Make a pair of keys: the private one signs reports, the public one goes to whoever verifies them."""
    from fedveil.reports.signature import make_key

    public = make_key(path)
    console.print(f"private key: {path} (keep it to yourself)\npublic key: {public} (give it away)")


def print_summary(folder: Path) -> None:
    """Print the table by site, the federation's figure and accuracy before and after."""
    from fedveil.common.words import percent_text, visible
    from fedveil.reports import report_of
    from fedveil.reports.alike import alike_sites
    from fedveil.reports.audits import bound_note
    from fedveil.reports.claim import server_is_trusted
    from fedveil.reports.connection import connection_sentences
    from fedveil.reports.meaning import attack_sentence, several_sentence
    from fedveil.reports.scores import share_text
    from fedveil.reports.sharing import THIS_RUN, at_h, others_of, rests_on
    from fedveil.reports.trials import trials_figure

    data = report_of(folder)
    central = server_is_trusted(data.claim.privacy_mode)
    at, rests = at_h(data.sharing), rests_on(data.sharing)
    table = Table(title="privacy spent, by the server's ledger" if central else f"privacy spent, by site{at}")
    rows = alike_sites(data.sites)
    longest = max((len(word) for row in rows for word in visible(row.names).split()), default=0)
    # A name is never cut: a narrow terminal breaks figures at their spaces first, then a very long name anywhere.
    table.add_column("whose" if central else "site", overflow="fold", min_width=min(longest, MOST_NAME))
    bare = ("ε alone",) if data.sharing and data.sharing.on_others else ()
    for column in ("rounds", "steps", "sample rate", "noise", "clip", "ε spent", "ε budget", "ε left", *bare):
        table.add_column(column, justify="right")
    for row in rows:
        figures = (row.joined, row.steps, row.rates, row.noises, row.clips, row.spent, row.budgets, row.left)
        table.add_row(Text(visible(row.names)), *figures, *((row.alone,) if bare else ()))
    console.print(table)
    head = data.headline
    if head.epsilon is not None:
        console.print(
            f"federation: (ε, δ) = ({epsilon_text(head.epsilon)}, {head.delta:g}) per {data.claim.per}, "
            f"{'of the cohort' if central else 'the maximum over sites'}{rests and f', {rests}'}"
            + (f"; {trials_figure(data.tuning)}" if data.tuning else "")
        )
        for other in others_of(data.sharing) if data.sharing else ():
            console.print(f"{THIS_RUN}, {other}")
    else:
        console.print(f"federation: {data.claim.sentence}")
    if head.epsilon is not None and (note := bound_note(data.audit_results)):
        console.print(note)
    if data.unbounded:
        console.print(data.unbounded)
    if data.meaning is not None:
        said = (attack_sentence(data.meaning), several_sentence(data.meaning), data.meaning.caution)
        console.print(visible(" ".join(text for text in said if text)))
    for text in connection_sentences(data.connections):
        console.print(visible(text))
    for text in data.alarms:
        console.print(Text(f"AUDIT FAILED: {visible(text)}", style="bold red"))
    for text in [*data.problems, *data.claim.gaps]:
        console.print(f"take care: {visible(text)}")
    console.print(
        f"accuracy on public data: {percent_text(head.accuracy_before)} before, "
        f"{percent_text(head.accuracy_after)} after {counted(head.rounds_done, 'round')}"
        + ("" if central or not head.rounds_done else f", the last of {counted(head.last_sites, 'site')}")
    )
    if data.accuracy:
        whole = data.accuracy[0]
        console.print(
            f"with 95 % intervals, on {counted(whole.records, 'public record')}: {share_text(whole.before)} before, "
            f"{share_text(whole.after)} after",
        )
    if data.status != "completed":
        console.print(visible(f"{data.status}: {data.reason or 'no result yet'}"))
