"""The pages of ``docs`` that are made from the code; a test compares them."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import click
import typer

from docs.make import settings
from docs.make.api import api_page
from docs.make.page import page
from docs.make.systems import row_table, system_table
from docs.make.tables import (
    adapter_table,
    dataset_table,
    markdown,
    pair_table,
    rule_table,
    start_table,
    strategy_table,
    task_table,
)
from fedveil.client.policy import Policy
from fedveil.client.policy_values import UNLIMITED
from fedveil.common.config.fields import kebab
from fedveil.common.config.flat import options_of
from fedveil.common.derived import DerivedFile, EarlierFile, PublicTexts, Source, VotesFile
from fedveil.common.docstrings import fields_said, said_of
from fedveil.common.findings import AUDITS, AuditFile, Finding
from fedveil.common.messages import wire
from fedveil.common.messages.round import (
    PROTOCOL,
    REFUSAL_KINDS,
    KeyReply,
    KeyTask,
    NoisedCount,
    Refusal,
    ShareReply,
    ShareTask,
    SpendingFigures,
    SurvivorReply,
    SurvivorTask,
    TrainResult,
    TrainTask,
    UnmaskReply,
    UnmaskTask,
)
from fedveil.common.other_runs import BesideFile, BesideRow, TuningFile
from fedveil.common.run_lines import (
    Absence,
    AdapterFile,
    BaselineFile,
    ConfigFile,
    CountLine,
    LabelScore,
    PrivacyLine,
    ProgressFile,
    Reached,
    ResultFile,
    RoundLine,
)
from fedveil.common.server_file import CheckLine, OwnCheck, ServerFile, ServerStart
from fedveil.common.tasks import TASKS, roles_of_all
from fedveil.common.words import capital
from fedveil.deploy.advisories import ADVISORIES
from fedveil.experiments.sweep.arms import ARMS
from fedveil.experiments.sweep.rows import Costs, Row
from fedveil.privacy.accountant import Accountant
from fedveil.privacy.events import Event
from fedveil.privacy.secure_sum import Agreement, KeyOffer, Sharing
from fedveil.reports.evaluated import Change, EvaluatedFile, Evaluation
from fedveil.reports.scores import FigureReport, Share


def tables_page() -> str:
    """Return the page of all axes: what each row is, and what goes with what."""
    return page(
        "What there is to choose from",
        "A run is a strategy, an adapter, a start, a task and a data set. Each is a row of a table in the code. "
        "[Strategies](../concepts/strategies.md) says how they work.",
        (
            "Strategies",
            strategy_table(),
            "m outputs, n inputs, r the rank. Bytes are of the plain job (12 layers of 384 × 384, r = 8), without "
            "the head. σ noise multiplier, C clip norm, b expected batch, s the scale, x the noise on a trained "
            "factor.",
        ),
        (
            "Strategies and adapters",
            pair_table(),
            'A strategy takes its own adapter where `adapter.name = "auto"`. It takes another that trains and freezes '
            "what it needs. Bytes are of one site and round of the plain job, without the head.",
        ),
        ("Adapters", adapter_table(), "In brackets the numbers of a factor in one layer."),
        (
            "Starts",
            start_table(),
            "A start whose round 0 asks nobody costs nothing and sends nothing. A paid release is charged to each "
            "site's ledger. Records without privacy are refused in a private run.",
        ),
        (
            "Rules of the server",
            rule_table(),
            "What stands around the server's optimiser. What a rule sees has passed clip and noise: it costs nothing.",
        ),
        (
            "Tasks",
            task_table(),
            "A column is a setting in a job, a pin in a policy, and an option on the command line.",
        ),
        ("Data sets with a name", dataset_table(), "Any file, folder or `hub:NAME` is a data set as well."),
        ("Arms of a sweep", _arm_table(), "`federated`, and the baselines that `fedveil sweep` puts beside it."),
    )


def _arm_table() -> str:
    rows = [[f"`{arm.name}`", arm.about, "yes" if arm.baseline else "no"] for arm in ARMS.values()]
    return markdown(("arm", "what it is", "baseline"), rows)


def run_folder_page() -> str:
    """Return the page of a run's folder: every file, and the fields of each line."""
    files = (
        ConfigFile,
        ServerFile,
        BaselineFile,
        RoundLine,
        PrivacyLine,
        ResultFile,
        ProgressFile,
        BesideFile,
        TuningFile,
        EvaluatedFile,
        VotesFile,
        DerivedFile,
        EarlierFile,
    )
    parts = [(f"`{kind.NAME}`", _fields(kind), _about(kind)) for kind in files]
    parts.append((f"`adapter/{AdapterFile.NAME}`", _fields(AdapterFile), _about(AdapterFile)))
    parts.append((f"`{AUDITS}.json`", _fields(AuditFile), _about(AuditFile)))
    nested: Mapping[type[Any], str] = {
        SpendingFigures: "in `privacy.jsonl`, beside the other keys",
        ServerStart: "in `server.json`",
        OwnCheck: "in `server.json`",
        CheckLine: "in `server.json`",
        Absence: "in `rounds.jsonl`",
        CountLine: "in `rounds.jsonl`",
        LabelScore: "in `baseline.json` and `rounds.jsonl`",
        Reached: "in `result.json`, beside the other keys",
        Finding: "in `audit*.json`",
        BesideRow: "in `beside.json`",
        Evaluation: "in `evaluated.json`",
        Change: "in `evaluated.json`",
        FigureReport: "in `evaluated.json`",
        Share: "in `evaluated.json`",
        Source: "in `derived.json` and `earlier.json`",
        PublicTexts: "in `derived.json`",
        Costs: "in a row of a sweep's table",
    }
    parts += [(f"{kind.__name__}, {where}", _fields(kind), _about(kind)) for kind, where in nested.items()]
    parts.append(("A row of a sweep's table", _fields(Row), "A line of `NAME.jsonl`, and of `NAME.csv` beside it."))
    return page(
        "The folder of a run",
        "A file that ends in `.jsonl` grows by a line for each round (and site). `run.log` is what the terminal "
        "showed, `log.jsonl` the server's log, `adapter/` the result in PEFT's format with the head and a model card "
        "beside it, `report.*` the report. In a simulation `ledgers/` holds the sites' "
        "ledgers, and until the run is complete `replies/` their last noised replies, for a resumed run; "
        "`process.json` names the process of a `fedveil run` that is under way. Of a run whose server is trusted, "
        "`log.jsonl` and `ledgers/` have the times of rounds and are not to be published. A figure of type `Epsilon` "
        "may be the text `inf`, and one of type `Measured`, of a model that may have diverged, also `-inf` or `nan`.",
        *parts,
    )


def systems_page() -> str:
    """Return the page of published systems: the row of each, its paper and what differs."""
    return page(
        "Published systems",
        "A published system is a strategy, an adapter, an initialisation and perhaps a server rule here "
        "([tables](tables.md)). Its accuracy is on the [page of results](../results/systems.md). A module's docstring "
        "has the equations and the reasons for each difference.",
        ("Systems", system_table(), "Paste the settings into a configuration, or run the command."),
        ("Rows that no system names", row_table(), "Each of them can be chosen as well."),
    )


def advisories_page() -> str:
    """Return the page of known advisories of packages."""
    header = ("package", "advisory", "what it is", "mended in", "status here", "rests on")
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header), *(advisory.row() for advisory in ADVISORIES)]
    return page(
        "Known advisories",
        "None of the advisories could be opened where this was written. What the table says of their content, versions "
        "and grades is from other projects' public upgrade notes, and where it says so from the packages' own sources "
        "or from nobody: the last column. Read them before you rely on it. [Packages](packages.md) has what is pinned.",
        (
            "Advisories",
            "\n".join(lines),
            "The lower bounds of `pyproject.toml` leave these versions out, but cryptography's.",
        ),
    )


def policy_page() -> str:
    """Return the page of a site's policy: every key of the file, its default and what it decides."""
    texts = fields_said(Policy)
    rows = []
    for item in dataclasses.fields(Policy):
        if item.name == "columns":
            about = "{}. Pinned with the task: a run that reads another is refused."
            rows += [[f"`{role.setting}`", "none", about.format(capital(role.said))] for role in roles_of_all()]
            options = {key: task for task in TASKS.values() for key in options_of(task)}
            rows += [[f"`{key}`", "none", f"Option of `{task.name}`. Pinned with it."] for key, task in options.items()]
            continue
        rows.append([f"`{kebab(item.name)}`", _written(item.default), _marked(texts[item.name])])
    return page(
        "Policy",
        "A site's steward writes these keys into `policy.toml`. Where a figure can be stricter, the site takes the "
        "stricter one. It refuses everything else before anything is charged, and names the rule and both values. "
        "[Mechanisms and policy](../concepts/mechanisms.md#the-stewards-rules) explains the pins.",
        ("Keys", markdown(("key", "default", "what it decides"), rows), "An unknown key is an error."),
    )


def _written(default: object) -> str:
    """Return a default of the policy in words."""
    if default in ("", 0, math.inf, UNLIMITED) and not isinstance(default, bool):
        return "none"
    return f"`{str(default).lower()}`"


def _marked(text: str) -> str:
    """Return a field's text with settings and keys as they are written in a policy."""
    return re.sub(r"``([^`]+)``", lambda match: f"`{kebab(match[1])}`" if match[1].islower() else f"`{match[1]}`", text)


def wire_page() -> str:
    """Return the page of what server and sites send each other."""
    kinds = (TrainTask, TrainResult, SpendingFigures, Event, Accountant, NoisedCount, Refusal)
    of_sums = (
        *(KeyTask, KeyReply, KeyOffer),
        *(ShareTask, ShareReply, Sharing),
        *(SurvivorTask, SurvivorReply, Agreement),
        *(UnmaskTask, UnmaskReply),
    )
    layout = (wire.__doc__ or "").split("``nonce`` and ``body``::\n\n")[1].split("\n\n")[0]
    return page(
        f"What travels: protocol {PROTOCOL}",
        "The server sends a task. A site answers with a result or a refusal. While privacy is on, `contribution` is "
        "the only field computed from records, and it has passed clip and noise; where the server is trusted, the clip "
        "alone. A noised count may be beside it, which the site's ledger has paid for. An adapter state is one block "
        "in the format of `wire.precision` (`common/messages/formats.py`). Each message has 16 random bytes of its "
        "own, in its header and in every part that Flower makes of its blocks, so that nobody who has not got it can "
        "name it or a part of it. "
        "[Operation](../guides/operate.md#signed-messages) says who signs it.",
        *((kind.__name__, _fields(kind), _about(kind)) for kind in (*kinds, *of_sums)),
        (
            "Bytes of a header",
            f"```text\n{layout}\n```",
            "Little-endian. A text is its length in bytes (u16) and UTF-8. A fingerprint travels as its first 128 "
            "bits; zeros say that there is none. A refusal's kinds are "
            f"{', '.join(f'`{kind}`' for kind in REFUSAL_KINDS)}.",
        ),
    )


def commands_page() -> str:
    """Return the page of the ``fedveil`` command: every command with its options."""
    from fedveil.cli.main import app

    root = typer.main.get_command(app)
    return page(
        "Commands",
        "`fedveil COMMAND --help` prints the same. An error is one line on stderr, and exit code 1; words that are no "
        "command or option are refused with exit code 2.",
        *(_described(words, command) for words, command in _leaves(root, ("fedveil",))),
    )


PAGES: Mapping[str, Callable[[], str]] = {
    "reference/api.md": api_page,
    "reference/tables.md": tables_page,
    "reference/systems.md": systems_page,
    "reference/run-folder.md": run_folder_page,
    "reference/messages.md": wire_page,
    "reference/policy.md": policy_page,
    "reference/advisories.md": advisories_page,
    "reference/commands.md": commands_page,
    "reference/settings.md": settings.page,
}
"""The generated pages by their names in ``docs``."""


def _about(kind: type[Any]) -> str:
    return f"{said_of(kind)}."


def _fields(of: type[Any]) -> str:
    """Return the table of a dataclass: what each field is called in a file, its type, and what the code says of it."""
    texts = fields_said(of)
    rows = [
        [f"`{item.metadata.get('key', item.name)}`", f"`{item.type}`", texts[item.name]]
        for item in dataclasses.fields(of)
        if not item.metadata.get("beside")
    ]
    return markdown(("field", "type", "what it is"), rows)


def _leaves(command: click.Command, words: tuple[str, ...]) -> list[tuple[tuple[str, ...], click.Command]]:
    if not isinstance(command, click.Group):
        return [(words, command)]
    return [leaf for name, inner in sorted(command.commands.items()) for leaf in _leaves(inner, (*words, name))]


def _described(words: tuple[str, ...], command: click.Command) -> tuple[str, str, str]:
    """Return heading, table of options and text of a command."""
    rows, taken = [], []
    for parameter in command.params:
        said = str(getattr(parameter, "help", "") or "")
        if isinstance(parameter, click.Option):
            name = ", ".join([*parameter.opts, *parameter.secondary_opts])
        else:
            name = str(parameter.human_readable_name).upper()
            taken.append(name if parameter.required else f"[{name}]")
        rows.append([f"`{name}`", said, _default(parameter)])
    table = markdown(("argument or option", "what it is", "default"), rows) if rows else ""
    text = " ".join((command.help or "").split())
    return f"`{' '.join(words)}`", table, f"{text} Usage: `{' '.join([*words, *taken, '[OPTIONS]'])}`"


def _default(parameter: click.Parameter) -> str:
    if parameter.required:
        return "must be given"
    value = parameter.default
    return "" if value is None or value == "" or callable(value) else f"`{value}`"
