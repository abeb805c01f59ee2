"""Read a run's folder, so that a run that still goes on, or was killed, can be reported too.

A file that is absent says nothing; one that is damaged becomes a sentence in ``problems``, which
every form of the report shows first. Only ``config.json`` must be there.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from fedveil.common.derived import DerivedFile, EarlierFile, Source
from fedveil.common.errors import DataError
from fedveil.common.findings import AUDITS, AuditFile
from fedveil.common.other_runs import BesideFile, BesideRow, TuningFile
from fedveil.common.paths import without_paths
from fedveil.common.run_lines import Absence, BaselineFile, ConfigFile, PrivacyLine, ResultFile, RoundLine, RunFile
from fedveil.common.server_file import ServerFile
from fedveil.common.strict_json import from_json, json_of
from fedveil.common.words import pathless
from fedveil.privacy import trusting_the_server

T = TypeVar("T")
F = TypeVar("F", bound=RunFile)


@dataclass(frozen=True)
class SiteLines:
    """What a run's files say of one site, each in the files' order."""

    privacy: list[PrivacyLine] = field(default_factory=list)
    joined: list[RoundLine] = field(default_factory=list)
    """Rounds, complete or not, with a reply of it that counts."""
    refusals: list[Absence] = field(default_factory=list)
    failures: list[Absence] = field(default_factory=list)
    noised: list[float] = field(default_factory=list)
    """The noise of each of its noised counts, in records; of two that are equal in all, one."""


@dataclass(frozen=True)
class RunFiles:
    """The readable part of a run's folder."""

    config: ConfigFile
    baseline: BaselineFile | None
    """None when it is not there yet."""
    rounds: list[RoundLine]
    privacy: list[PrivacyLine]
    """One line per release of a site, each once, in order; also of what did not count, or was cut off by a crash."""
    result: ResultFile | None
    """None while the run goes on, or when it was killed."""
    audits: dict[str, str]
    """Files named ``audit*`` in the folder, with their SHA-256."""
    findings: dict[str, AuditFile] = field(default_factory=dict)
    """Content of those that are JSON."""
    beside: list[BesideRow] = field(default_factory=list)
    """Results of other runs; empty: none were given."""
    problems: list[str] = field(default_factory=list)
    server: ServerFile | None = None
    """What the server knew of itself; None: the folder does not say."""
    tuning: TuningFile | None = None
    """Of which trials the run is one; None: of none."""
    earlier: list[Source] = field(default_factory=list)
    """Runs whose releases it begins with."""

    @property
    def trusts_server(self) -> bool:
        """Whether the server is trusted, which then sees what sites send as it is."""
        return bool(trusting_the_server([str(self.config.settings.get("privacy.mode", "none"))]))

    @cached_property
    def by_site(self) -> Mapping[str, SiteLines]:
        """What the files say of each site that they name, read once: a run may have ten thousand."""
        found: dict[str, SiteLines] = defaultdict(SiteLines)
        for line in self.privacy:
            found[line.site].privacy.append(line)
        counts = [(line.round_number, count) for line in self.rounds for count in line.noised_correct]
        for _, site, noise, _ in dict.fromkeys((number, c.site, c.noise_std, c.value) for number, c in counts):
            found[site].noised.append(noise)
        for round_line in self.rounds:
            for site in dict.fromkeys(round_line.participants):
                found[site].joined.append(round_line)
            for absence in round_line.refusals:
                found[absence.site].refusals.append(absence)
            for absence in round_line.failures:
                found[absence.site].failures.append(absence)
        return dict(found)


def read_run(folder: Path) -> RunFiles:
    """Return what the folder of a run holds.

    Raises:
        DataError: there is no readable ``config.json``, so this is not the folder of a run.
    """
    problems: list[str] = []
    config = _file(ConfigFile, folder / ConfigFile.NAME, problems, "")
    if config is None:
        why = problems[0] if problems else "it has no config.json"
        if (folder / DerivedFile.NAME).is_file():
            why = "its model was derived from finished runs, and its report is report.md there"
        raise DataError(f"{folder} is not the folder of a run: {why}")
    audits = [path for path in sorted(folder.glob(AUDITS)) if path.is_file()]
    read = [(path.name, _file(AuditFile, path, problems, UNSAID)) for path in audits if path.suffix == ".json"]
    config = replace(config, settings=without_paths(config.settings))
    rounds = [
        replace(line, refusals=_pathless(line.refusals), failures=_pathless(line.failures))
        for line in _lines(RoundLine, folder, problems)
    ]
    privacy = _once(_lines(PrivacyLine, folder, problems))
    result = _file(ResultFile, folder / ResultFile.NAME, problems)
    result = replace(result, reason=pathless(result.reason)) if result else None
    if result and result.reached and result.reached.rounds:
        problems += _untold(RoundLine, [line.round_number for line in rounds if line.complete], result.reached.rounds)
        problems += _untold(PrivacyLine, [line.round_number for line in privacy], result.reached.rounds)
    return RunFiles(
        config,
        _file(BaselineFile, folder / BaselineFile.NAME, problems),
        rounds,
        privacy,
        result,
        {path.name: _sha256(path) for path in audits},
        {name: content for name, content in read if content},
        beside.rows if (beside := _file(BesideFile, folder / BesideFile.NAME, problems)) else [],
        problems,
        _file(ServerFile, folder / ServerFile.NAME, problems),
        _file(TuningFile, folder / TuningFile.NAME, problems, UNTOLD_TRIALS),
        earlier.sources if (earlier := _file(EarlierFile, folder / EarlierFile.NAME, problems, UNTOLD_RUNS)) else [],
    )


def _pathless(absences: Sequence[Absence]) -> list[Absence]:
    return [replace(absence, reason=pathless(absence.reason)) for absence in absences]


def _untold(of: type[RunFile], round_numbers: Collection[int], reached: int) -> list[str]:
    """Return the problem of a file that lacks the last round that counts, or an empty list."""
    if reached in round_numbers:
        return []
    return [
        f"{of.NAME} does not reach round {reached}, which {ResultFile.NAME} says was complete: what it held is missing "
        "here"
    ]


LEFT_OUT = ", and is left out"
UNTOLD_TRIALS = ": the run is one of several trials, and what all of them cost is missing here"
UNTOLD_RUNS = ": the run began with what earlier runs released, and what these cost is missing here"
UNSAID = ": it does not say that any audit passed"


def _file(of: type[T], path: Path, problems: list[str], then: str = LEFT_OUT) -> T | None:
    """Return what a file holds, or None with a problem if it is damaged, ``then`` what follows from that."""
    try:
        return from_json(of, json_of(path.read_bytes()), path.name)
    except FileNotFoundError:
        return None
    except OSError as error:
        problems.append(f"{path.name} cannot be read ({error.strerror})")
    except DataError as error:
        problems.append(f"{error}{then}")
    except ValueError:
        problems.append(f"{path.name} is damaged{then}")
    return None


def _lines(of: type[F], folder: Path, problems: list[str]) -> Iterator[F]:
    """Yield the sound lines of a JSON-lines file, and say which are not."""
    path = folder / of.NAME
    try:
        texts = path.read_bytes().decode("utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return
    except OSError as error:
        problems.append(f"{path.name} cannot be read ({error.strerror})")
        return
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            continue
        what = f"line {number} of {path.name}"
        try:
            line = from_json(of, json_of(text), what)
        except (DataError, ValueError) as error:
            fault = str(error) if isinstance(error, DataError) else f"{what} is not whole"
            problems.append(f"{fault}{LEFT_OUT}: what it held is missing here")
        else:
            yield line


def _once(lines: Iterable[PrivacyLine]) -> list[PrivacyLine]:
    """Drop repeated lines: a site answers a repeated round with the release that it paid for before."""
    distinct = {(x.site, x.round_number, *_paid(x)): x for x in lines}
    return list(distinct.values())


def _paid(line: PrivacyLine) -> tuple[str, int, float] | tuple[()]:
    return (line.spent.purpose, line.spent.steps_total, line.spent.epsilon_total) if line.spent else ()


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
