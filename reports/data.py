"""The report as data: read from a run's folder, and all that Markdown, HTML and JSON are made from.

The same files give the same report, to the last byte: it holds no clock and no random number, so a
signature made today fits the report that is made from the same folder tomorrow.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Literal

from fedveil.common.config.sections import Scalar, method_of
from fedveil.common.data.sources import unprotected_test
from fedveil.common.errors import DataError
from fedveil.common.files import sha256_of
from fedveil.common.run_lines import Absence, AdapterFile, BesideRow, RoundLine, TuningFile, read_file
from fedveil.common.words import counted, names_text, natural, number_text
from fedveil.reports.alike import spread
from fedveil.reports.audits import AuditReport, audit_alarms, audit_cares, audit_reports
from fedveil.reports.claim import Claim, claim_of, server_is_trusted
from fedveil.reports.connection import ConnectionReport, connection_cares, connection_reports
from fedveil.reports.folder import RunFiles, read_run
from fedveil.reports.meaning import NO_BOUND, MeaningReport, meaning_report
from fedveil.reports.scores import LabelReport, label_reports
from fedveil.reports.sharing import Sharing, sharing_of
from fedveil.reports.sites import (
    ReleaseReport,
    SiteReport,
    epsilon_course,
    federation_delta,
    other_releases,
    site_reports,
    worst_site,
)
from fedveil.reports.trials import at_least
from fedveil.reports.trust import Actor, actors_of, unprotected_of
from fedveil.strategies.options import known_settings

ADAPTER = f"adapter/{AdapterFile.NAME}"
ADAPTER_FILES = tuple(
    f"adapter/{name}"
    for name in ("adapter_config.json", "adapter_model.safetensors", "head.safetensors", "fedveil.json")
)
"""All of a saved adapter but its model card, which quotes this report."""
SCHEMA = "fedveil-report/3"
"""Version of the report's JSON; the number rises when a field changes its meaning or goes away."""


@dataclass(frozen=True)
class RoundReport:
    """One round. Bytes are adapter payload of all messages, accuracy a share."""

    round_number: int
    """0: before training, or the statistic that the start is made from."""
    counted: bool
    """Whether enough sites took part; a round that does not count leaves the model as it was."""
    participants: list[str]
    accuracy: float | None
    loss: float | None
    """None, as accuracy, in a round that was not scored."""
    bytes_down: int | None
    bytes_up: int | None
    seconds: float | None
    """Wall time; None with a trusted server, which tells nobody who was drawn."""
    epsilon_worst: float | None
    """Largest total that a site had reported by then; None without a claim."""


@dataclass(frozen=True)
class Setting:
    """One setting, and whether someone chose another value than the default (None: a setting that has none here)."""

    key: str
    value: Any
    default: Any
    changed: bool


@dataclass(frozen=True)
class Headline:
    """The result in figures."""

    accuracy_before: float | None
    accuracy_after: float | None
    epsilon: float | None
    """The federation's figure: the maximum over sites."""
    epsilon_budget: float | None
    """Of the site that has spent most."""
    delta: float | None
    """The largest of the sites' own."""
    worst_site: str
    rounds_done: int
    rounds_planned: int
    sites: int
    """Sites that took part in a round at least; with a trusted server, which tells nobody, those of the cohort."""
    last_sites: int
    """Sites that the last round that counts is of, likewise; 0 where none does."""
    bytes_down: int
    bytes_up: int
    seconds: float | None
    """Of all finished rounds together; None as of a round."""


@dataclass(frozen=True)
class Origin:
    """What the final adapter is made of, by hashes (SHA-256, hexadecimal)."""

    base_model: str
    base: str
    """Of the base model's weights, configuration and processor, as FedVeil computes it."""
    bundle: str
    """Of the server's code."""
    files: dict[str, str]
    """Of each file in the run's folder that the adapter consists of, by its path there."""
    local: bool
    """The base model is a folder of the server's machine: ``base_model`` is the folder's name, and no model's."""


@dataclass(frozen=True)
class ReportData:
    """Everything a report says."""

    schema: str
    run: str
    strategy: str
    method: str
    """What was trained, in one name: the strategy's, or ``head-only`` where there was no adapter."""
    started: str
    status: str
    """``completed``, ``stopped``, ``failed``, or ``unfinished`` (goes on, or was killed)."""
    reason: str
    problems: list[str]
    """What could not be read; figures may then be too low."""
    headline: Headline
    claim: Claim
    sharing: Sharing | None
    """On how many honest sites every ε rests; None where no noise is shared."""
    meaning: MeaningReport | None
    """What ε means for people; None without a claim, or where no bound could be computed."""
    sites: list[SiteReport]
    accuracy: list[LabelReport]
    """On public data, of all records and by label; empty where records have no labels, or no counts were kept."""
    slices: list[LabelReport]
    """On public data, by slice of it; empty where none was asked for."""
    beside: list[BesideRow]
    """What other runs on the same base model and data came to; empty: nobody has said."""
    rounds: list[RoundReport]
    other_releases: list[ReleaseReport]
    refusals: list[Absence]
    """Of every attempt at every round."""
    shortened: str
    """Which updates the server shortened before it averaged them, in one sentence; empty: none."""
    settings: list[Setting]
    versions: dict[str, str]
    origin: Origin | None
    """Of the final adapter; None while none is saved."""
    actors: list[Actor]
    """Who is trusted with what."""
    connections: list[ConnectionReport]
    """How sites were reached, and the server's own check; empty: the folder does not say."""
    unprotected: list[str]
    """Quantities that no noise protects."""
    audits: dict[str, str]
    """Audit files found in the folder, with their SHA-256; empty: not audited."""
    audit_results: list[AuditReport]
    """What they say; empty: nothing was audited, as far as anyone can see."""
    alarms: list[str]
    """Audits that failed; every form of the report says them first and loudly."""
    tuning: TuningFile | None
    """Of which trials the run is one, with the ε of all together; None: of none."""

    @property
    def unbounded(self) -> str:
        """What stands in place of the bounds on attacks where an ε has none; else empty."""
        return NO_BOUND if self.headline.epsilon is not None and self.meaning is None else ""


def report_of(folder: Path) -> ReportData:
    """Return the report of a run, finished or not.

    Raises:
        DataError: ``folder`` is not the folder of a run.
    """
    files = read_run(folder)
    settings, versions, sites = files.config.settings, files.config.versions, site_reports(files)
    problems, connections = list(files.problems), connection_reports(files.server)
    audits = audit_reports(files.findings, problems)
    origin = _origin(folder, problems)
    claim, headline = claim_of(files, sites), _headline(files, sites)
    return ReportData(
        schema=SCHEMA,
        run=files.config.run,
        strategy=str(settings.get("strategy", "")),
        method=method_of(str(settings.get("strategy", "")), str(settings.get("adapter.name", ""))),
        started=files.config.started,
        status=files.result.status if files.result else "unfinished",
        reason=files.result.reason if files.result else "",
        problems=[*problems, *audit_cares(audits, versions), *connection_cares(connections)],
        headline=headline,
        claim=claim,
        sharing=sharing_of(files, sites) if claim.made else None,
        meaning=meaning_report(files, sites),
        sites=sites,
        accuracy=_accuracy(files, "labels"),
        slices=_accuracy(files, "slices")[1:],
        beside=files.beside,
        rounds=_rounds(files),
        other_releases=other_releases(files),
        refusals=[absence for line in files.rounds for absence in line.failures],
        shortened=_shortened(files.rounds),
        settings=_settings(settings, files.config.chosen),
        versions=versions,
        origin=origin,
        actors=actors_of(claim, headline.epsilon),
        connections=connections,
        unprotected=unprotected_of(sites, _cut_test(settings), claim),
        audits=files.audits,
        audit_results=audits,
        alarms=audit_alarms(audits),
        tuning=at_least(files.tuning, headline.epsilon),
    )


def _origin(folder: Path, problems: list[str]) -> Origin | None:
    about = folder / ADAPTER
    if not about.is_file():
        return None
    try:
        told = read_file(AdapterFile, about.parent)
        files = {name: sha256_of(folder / name) for name in ADAPTER_FILES if (folder / name).is_file()}
    except (DataError, OSError) as error:
        problems.append(
            f"{ADAPTER} cannot be read ({type(error).__name__}): what the adapter is made of is missing here"
        )
        return None
    local = told.base_model.startswith(("/", "~"))
    base_model = PurePath(told.base_model).name if local else told.base_model
    return Origin(base_model, told.base_fingerprint, told.bundle, files, local)


def setting_of(data: ReportData, key: str) -> Any:
    """Return the value of a setting of the run, empty text if it has none of that name."""
    return next((setting.value for setting in data.settings if setting.key == key), "")


def cut_test(data: ReportData) -> str:
    """Return the sentence about a public test part that is cut from the sites' source, empty if it is not."""
    return _cut_test({setting.key: setting.value for setting in data.settings})


def _cut_test(settings: Mapping[str, Any]) -> str:
    return unprotected_test(str(settings.get("data.name", "")), str(settings.get("data.test", "")))


def cares_of(data: ReportData) -> list[str]:
    """Return everything that stands against the claim, for others than the coordinator: no sentence names a path."""
    return [text for text in [*data.alarms, *data.problems, *data.claim.gaps] if text != cut_test(data)]


def federation_epsilon(folder: Path) -> float | None:
    """Return the maximum of the sites' ε, or None when no claim is made; errors as in report_of."""
    worst = worst_site(site_reports(read_run(folder)))
    return worst.epsilon_worst if worst else None


def _headline(files: RunFiles, sites: Sequence[SiteReport]) -> Headline:
    worst, planned = worst_site(sites), files.config.settings.get("rounds")
    number = sum(site.rounds_joined > 0 for site in sites)
    if _is_central(files):
        number = sum(site.public_size or 0 for site in sites)  # one line stands for the cohort
    counted = [line for line in files.rounds if line.round_number and line.complete]
    last = len(counted[-1].participants) if counted else 0
    return Headline(
        accuracy_before=files.baseline.accuracy if files.baseline else None,
        accuracy_after=next((line.accuracy for line in reversed(counted) if line.accuracy is not None), None),
        epsilon=worst.epsilon_worst if worst else None,
        epsilon_budget=worst.epsilon_budget if worst else None,
        delta=federation_delta(sites),
        worst_site=worst.site if worst else "",
        rounds_done=len({line.round_number for line in counted}),
        rounds_planned=planned if isinstance(planned, int) else 0,
        sites=number,
        last_sites=min(number, last) if not _is_central(files) else number,
        bytes_down=sum(line.bytes_down for line in files.rounds),
        bytes_up=sum(line.bytes_up for line in files.rounds),
        seconds=None if _is_central(files) else sum(line.seconds or 0.0 for line in files.rounds),
    )


def _is_central(files: RunFiles) -> bool:
    return server_is_trusted(str(files.config.settings.get("privacy.mode", "")))


def _accuracy(files: RunFiles, kind: Literal["labels", "slices"]) -> list[LabelReport]:
    """Return the accuracy on all records, and then by label or slice."""
    lines = [line for line in files.rounds if line.complete and line.round_number]
    scored = [counts for line in lines if (counts := getattr(line, kind))]
    return label_reports(getattr(files.baseline, kind, []), scored[-1] if scored else [])


def _rounds(files: RunFiles) -> list[RoundReport]:
    course = epsilon_course(files)

    def row(line: RoundLine, accuracy: float | None, loss: float | None) -> RoundReport:
        return RoundReport(
            round_number=line.round_number,
            counted=line.complete,
            participants=line.participants,
            accuracy=accuracy,
            loss=loss,
            bytes_down=line.bytes_down,
            bytes_up=line.bytes_up,
            seconds=None if _is_central(files) else line.seconds,
            epsilon_worst=course[line.round_number],
        )

    rows, before = [], files.baseline
    if before:
        # A start from a statistic is round 0, and what was scored before round 1 is its result.
        first = next((line for line in files.rounds if _is_start(line)), None)
        begun = (
            (before.accuracy, before.loss) if before.begun_loss is None else (before.begun_accuracy, before.begun_loss)
        )
        nothing = RoundReport(0, True, [], before.accuracy, before.loss, None, None, None, course.get(0))
        rows.append(row(first, *begun) if first else nothing)
    rows += [row(line, line.accuracy, line.loss) for line in files.rounds if not (before and _is_start(line))]
    return rows


def _is_start(line: RoundLine) -> bool:
    return not line.round_number and line.complete


def _shortened(rounds: Sequence[RoundLine]) -> str:
    lines = [one for line in rounds for one in line.shortened]
    if not lines:
        return ""
    sites = names_text(sorted({one.site for one in lines}, key=natural))
    return (
        f"The server shortened {counted(len(lines), 'update')} that {'was' if len(lines) == 1 else 'were'} longer than "
        f"is likely, to {spread([one.factor for one in lines], number_text)} of the length: of {sites}. A site with "
        "unusual records has longer updates. rounds.jsonl has each."
    )


def _settings(values: Mapping[str, Scalar], chosen: Collection[str]) -> list[Setting]:
    known = known_settings(values)
    return [
        Setting(key, value, known.get(key), key in chosen)
        for key, value in sorted(values.items(), key=lambda item: ("." in item[0], item[0]))
    ]
