"""The report as data: read from a run's folder, and all that Markdown, HTML and JSON are made from.

The same files give the same report, to the last byte: it holds no clock and no random number, so a
signature made today fits the report that is made from the same folder tomorrow.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, Literal

from fedveil.common.config.flat import Scalar
from fedveil.common.config.run import method_of
from fedveil.common.data.sources import unprotected_test
from fedveil.common.errors import DataError
from fedveil.common.files import sha256_of
from fedveil.common.model.score import control_words
from fedveil.common.other_runs import BesideRow, TuningFile
from fedveil.common.paths import is_path
from fedveil.common.run_lines import Absence, AdapterFile, read_file
from fedveil.common.tasks import headline_of
from fedveil.reports.audits import AuditReport, audit_alarms, audit_cares, audit_reports
from fedveil.reports.claim import Claim, claim_of
from fedveil.reports.connection import ConnectionReport, connection_cares, connection_reports
from fedveil.reports.folder import RunFiles, read_run
from fedveil.reports.meaning import NO_BOUND, MeaningReport, meaning_report
from fedveil.reports.releases import ReleaseReport, other_releases
from fedveil.reports.rounds import RoundReport, round_reports, shortened_text
from fedveil.reports.scores import (
    Confusion,
    FigureReport,
    LabelReport,
    PartReport,
    confusion_of,
    figure_reports,
    label_reports,
    macro_f1,
    part_reports,
)
from fedveil.reports.sharing import Sharing, sharing_of
from fedveil.reports.sites import SiteReport, federation_delta, site_reports, worst_site
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
class Setting:
    """One setting, and whether someone chose another value than the default (None: a setting that has none here)."""

    key: str
    value: str | int | float | bool | None
    default: str | int | float | bool | None
    changed: bool


@dataclass(frozen=True)
class Headline:
    """The result in figures."""

    accuracy_before: float | None
    """Or what the task is judged by in its place (``ReportData.judged_by``), as after."""
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
    macro_f1_before: float | None
    macro_f1_after: float | None
    """Of the last round that was scored; None, as before, where records have no labels, or this was not counted."""
    sites: int
    """Sites that took part in at least one round; with a trusted server, the cohort."""
    last_sites: int
    """Sites that the last round that counts is of, likewise; 0 where none does."""
    bytes_down: int
    bytes_up: int
    seconds: float | None
    """Of all finished rounds together; None as for a round."""


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
    """Whether the base model is a folder of the server's machine, whose name ``base_model`` is."""


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
    """The honest sites that every ε counts on; None where sites share no noise."""
    meaning: MeaningReport | None
    """What ε means for people; None without a claim, or where no bound could be computed."""
    sites: list[SiteReport]
    accuracy: list[LabelReport]
    """On public data, of all records and by label; empty where records have no labels, or no counts were kept."""
    confusion: Confusion | None
    """Which labels the final model takes for which, of up to 20; None: not counted."""
    slices: list[LabelReport]
    """On public data, by slice of it; empty without ``data.slice``."""
    beside: list[BesideRow]
    """Results of other runs on the same base model and data; empty: none were given."""
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
    """Their results; empty: no audit is known."""
    alarms: list[str]
    """Audits that failed; every form of the report says them first and loudly."""
    tuning: TuningFile | None
    """Of which trials the run is one, with the ε of all together; None: of none."""
    figures: list[FigureReport] = field(default_factory=list)
    """The headline and what the task's score has beside it; of most tasks, which have nothing beside, none."""
    parts: list[PartReport] = field(default_factory=list)
    """By kind of part, where an answer has several."""

    @property
    def control(self) -> str:
        """What the score must beat without a model, in words; empty where labels are not counted."""
        return control_words(self.judged_by, [row.records for row in self.accuracy[1:]])

    @property
    def judged_by(self) -> str:
        """The name of the task's headline figure."""
        return headline_of({"model.task": setting_of(self, "model.task")})

    @property
    def unbounded(self) -> str:
        """The text in place of the bounds on attacks where an ε has none; else empty."""
        return NO_BOUND if self.headline.epsilon is not None and self.meaning is None else ""


def report_of(folder: Path) -> ReportData:
    """Return the report of a run, finished or not; DataError if ``folder`` is not the folder of a run."""
    files = read_run(folder)
    settings, versions, sites = files.config.settings, files.config.versions, site_reports(files)
    problems, connections = list(files.problems), connection_reports(files.server)
    audits, origin = audit_reports(files.findings, problems), _origin(folder, problems)
    claim, headline = claim_of(files, sites), _headline(files, sites)
    return ReportData(
        schema=SCHEMA,
        run=files.config.run,
        strategy=(strategy := str(settings.get("strategy", ""))),
        method=method_of(strategy, str(settings.get("adapter.name", ""))),
        started=files.config.started,
        status=files.result.status if files.result else "unfinished",
        reason=files.result.reason if files.result else "",
        problems=[*problems, *audit_cares(audits, versions), *connection_cares(connections)],
        headline=headline,
        claim=claim,
        sharing=sharing_of(files, sites) if claim.made else None,
        meaning=meaning_report(files, sites),
        sites=sites,
        **_score_reports(files),
        beside=files.beside,
        rounds=round_reports(files),
        other_releases=other_releases(files),
        refusals=[absence for line in files.rounds for absence in line.failures],
        shortened=shortened_text(files.rounds),
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
        about_adapter = read_file(AdapterFile, about.parent)
        files = {name: sha256_of(folder / name) for name in ADAPTER_FILES if (folder / name).is_file()}
    except (DataError, OSError) as error:
        problems.append(
            f"{ADAPTER} cannot be read ({type(error).__name__}): what the adapter is made of is missing here"
        )
        return None
    local = is_path(about_adapter.base_model)
    base_model = PurePath(about_adapter.base_model).name if local else about_adapter.base_model
    return Origin(base_model, about_adapter.base_fingerprint, about_adapter.bundle, files, local)


def setting_of(data: ReportData, key: str) -> Any:
    """Return the value of a setting of the run, empty text if it has none of that name."""
    return next((setting.value for setting in data.settings if setting.key == key), "")


def cut_test(data: ReportData) -> str:
    """Return the sentence on a public test part that was cut from the sites' source; empty if it was not."""
    return _cut_test({setting.key: setting.value for setting in data.settings})


def _cut_test(settings: Mapping[str, Any]) -> str:
    name, test = (str(settings.get(f"data.{key}", "")) for key in ("name", "test"))
    return unprotected_test(name, test, int(settings.get("data.test-size", 0)))


def cares_of(data: ReportData) -> list[str]:
    """Return every objection to the claim for readers outside the federation, without paths."""
    return [text for text in [*data.alarms, *data.problems, *data.claim.gaps] if text != cut_test(data)]


def federation_epsilon(folder: Path) -> float | None:
    """Return the maximum of the sites' ε, None without a claim; raises as ``report_of``."""
    worst = worst_site(site_reports(read_run(folder)))
    return worst.epsilon_worst if worst else None


def _headline(files: RunFiles, sites: Sequence[SiteReport]) -> Headline:
    worst, planned = worst_site(sites), files.config.settings.get("rounds")
    number = sum(site.rounds_joined > 0 for site in sites)
    if files.trusts_server:
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
        macro_f1_before=macro_f1(_scores(files, "labels")[0]),
        macro_f1_after=macro_f1(_scores(files, "labels")[1]),
        sites=number,
        last_sites=min(number, last) if not files.trusts_server else number,
        bytes_down=sum(line.bytes_down for line in files.rounds),
        bytes_up=sum(line.bytes_up for line in files.rounds),
        seconds=None if files.trusts_server else sum(line.seconds or 0.0 for line in files.rounds),
    )


def _score_reports(files: RunFiles) -> dict[str, Any]:
    """Return every field of the report that is a score, by its name."""
    labels = _scores(files, "labels")
    return {
        "accuracy": label_reports(*labels),
        "confusion": confusion_of(labels[1]),
        "slices": label_reports(*_scores(files, "slices"))[1:],
        "figures": figure_reports(*_scores(files, "figures")),
        "parts": part_reports(*_scores(files, "parts")),
    }


def _scores(
    files: RunFiles, kind: Literal["labels", "slices", "figures", "parts"]
) -> tuple[Sequence[Any], Sequence[Any]]:
    """Return the scores by label, slice, name or part before training, and after the last round that was scored."""
    lines = [line for line in files.rounds if line.complete and line.round_number]
    scored = [counts for line in lines if (counts := getattr(line, kind))]
    return getattr(files.baseline, kind, []), scored[-1] if scored else []


def _settings(values: Mapping[str, Scalar], chosen: Collection[str]) -> list[Setting]:
    known = known_settings(values)
    return [
        Setting(key, value, known.get(key), key in chosen)
        for key, value in sorted(values.items(), key=lambda item: ("." in item[0], item[0]))
    ]
