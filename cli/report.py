"""``fedveil report``, ``verify`` and ``keygen``, and the summary that a run ends with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedveil.cli.errors import for_people
from fedveil.common.errors import DataError
from fedveil.common.words import counted
from fedveil.privacy.figures import epsilon_text

if TYPE_CHECKING:
    from fedveil.reports.data import ReportData

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
    folder: Annotated[Path, typer.Argument(help="A run's folder, of a run that goes on or of a finished one.")],
    port: Annotated[int, typer.Option(help="Port on this machine alone; 0: a free one.")] = 0,
) -> None:
    """Serve a run's report on this machine alone, updated while the run goes on, until Ctrl-C."""
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
    from fedveil.common.other_runs import TuningFile
    from fedveil.common.words import visible
    from fedveil.reports.signature import NotGenuine, verified
    from fedveil.reports.trials import trials_figure

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
        f"valid: run {visible(signed['run'])} ({visible(signed['strategy'])}), {visible(signed['status'])} {rounds}, "
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


def print_summary(folder: Path) -> None:
    """Print the table by site, the federation's figure and accuracy before and after."""
    from fedveil.common.words import visible
    from fedveil.reports import report_of
    from fedveil.reports.connection import connection_sentences
    from fedveil.reports.meaning import attack_sentence, several_sentence

    data = report_of(folder)
    console.print(_spent_table(data))
    for line in _federation_lines(data):
        console.print(line)
    if data.meaning is not None:
        sentences = (attack_sentence(data.meaning), several_sentence(data.meaning), data.meaning.caution)
        console.print(visible(" ".join(text for text in sentences if text)))
    for text in connection_sentences(data.connections):
        console.print(visible(text))
    for text in data.alarms:
        console.print(Text(f"AUDIT FAILED: {visible(text)}", style="bold red"))
    for text in [*data.problems, *data.claim.gaps]:
        console.print(f"take care: {visible(text)}")
    for line in _accuracy_lines(data):
        console.print(line)
    if data.status != "completed":
        console.print(visible(f"{data.status}: {data.reason or 'no result yet'}"))


def _spent_table(data: ReportData) -> Table:
    from fedveil.common.words import visible
    from fedveil.reports.alike import alike_sites
    from fedveil.reports.sharing import at_h

    central = data.claim.trusts_server
    table = Table(title="privacy spent, by " + ("the server's ledger" if central else f"site{at_h(data.sharing)}"))
    rows = alike_sites(data.sites)
    longest = max((len(word) for row in rows for word in visible(row.names).split()), default=0)
    # A name is never cut: a narrow terminal breaks figures at their spaces first, then a very long name anywhere.
    table.add_column("whose" if central else "site", overflow="fold", min_width=min(longest, MOST_NAME))
    alone = ("ε alone",) if data.sharing and data.sharing.on_others else ()
    for column in ("rounds", "steps", "sample rate", "noise", "clip", "ε spent", "ε budget", "ε left", *alone):
        table.add_column(column, justify="right")
    for row in rows:
        figures = (row.joined, row.steps, row.rates, row.noises, row.clips, row.spent, row.budgets, row.left)
        table.add_row(Text(visible(row.names)), *figures, *((row.alone,) if alone else ()))
    return table


def _federation_lines(data: ReportData) -> list[str]:
    """Return the federation's ε with its conditions and bounds, or why it has none."""
    from fedveil.reports.audits import bound_note
    from fedveil.reports.sharing import THIS_RUN, others_of, rests_on
    from fedveil.reports.trials import trials_figure

    head, condition = data.headline, rests_on(data.sharing)
    if head.epsilon is None:
        return [f"federation: {data.claim.sentence}"]
    whose = "of the cohort" if data.claim.trusts_server else "the maximum over sites"
    lines = [
        f"federation: (ε, δ) = ({epsilon_text(head.epsilon)}, {head.delta:g}) per {data.claim.per}, "
        f"{whose}{condition and f', {condition}'}" + (f"; {trials_figure(data.tuning)}" if data.tuning else "")
    ]
    lines += [f"{THIS_RUN}, {other}" for other in (others_of(data.sharing) if data.sharing else ())]
    return lines + [note for note in (bound_note(data.audit_results), data.unbounded) if note]


def _accuracy_lines(data: ReportData) -> list[str]:
    from fedveil.common.words import percent_text
    from fedveil.reports.scores import share_text

    head = data.headline
    last = f", the last of {counted(head.last_sites, 'site')}"
    lines = [
        f"accuracy on public data: {percent_text(head.accuracy_before)} before, "
        f"{percent_text(head.accuracy_after)} after {counted(head.rounds_done, 'round')}"
        + last
        * (head.rounds_done > 0 and not data.claim.trusts_server)
    ]
    if data.accuracy:
        score = data.accuracy[0]
        lines.append(
            f"with 95 % intervals, on {counted(score.records, 'public record')}: {share_text(score.before)} before, "
            f"{share_text(score.after)} after"
        )
    return lines
