"""The files of a run's folder: one frozen class for each, and one for each line of those that grow.

The server writes them and every reader reads them through these classes, whose fields are the keys of the JSON.
``run.log`` (what the terminal shows), ``log.jsonl`` (the server's log), the checkpoint and ``adapter/`` are not of this
kind.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from fedveil.common.errors import DataError
from fedveil.common.files import ABOUT_ADAPTER, ABOUT_RUN, FileState, state_of
from fedveil.common.messages.round import SpendingFigures
from fedveil.common.strict_json import BESIDE, SPARSE, Epsilon, Measured, called, from_json, json_of

COHORT = "the cohort"
"""What all sites of a trusted server together are called, in whose place no site has a line."""


Status = Literal["completed", "stopped", "failed"]


class RunFile:
    """A file of a run's folder, or a line of one."""

    NAME: ClassVar[str]
    """Of the file."""


F = TypeVar("F", bound=RunFile)


@dataclass(frozen=True)
class ConfigFile(RunFile):
    """Every setting of a run with the value that it has, and versions of what computed it."""

    NAME: ClassVar[str] = ABOUT_RUN
    run: str
    """What messages, records and ledgers call it."""
    started: str
    """UTC, ISO 8601."""
    settings: dict[str, str | int | float | bool]
    versions: dict[str, str]
    """Of Python and of packages, by name."""
    chosen: list[str] = field(default_factory=list)
    """The settings that the user set."""
    resumed: list[str] = field(default_factory=list)
    """When the run went on, as ``started``."""
    resumed_after: list[int] = field(default_factory=list)
    """After which round each time."""


@dataclass(frozen=True)
class LabelScore:
    """How the model does on the public records of one label."""

    label: str
    right: int
    """Records that it gets right."""
    records: int
    predicted: int | None = None
    """Records to which it gives this label; None: not counted."""
    confused: list[int] = field(default_factory=list)
    """Records of this label by the label that it gives them, in the order of the labels; empty: not counted."""


@dataclass(frozen=True)
class Figure:
    """A named figure of a score, from 0 to 1."""

    name: str
    value: float
    half: float | None = None
    """Half of its 95 % interval over the test records as a sample; None: it has none."""


@dataclass(frozen=True)
class BaselineFile(RunFile):
    """The score on public data before any record was used."""

    NAME: ClassVar[str] = "baseline.json"
    accuracy: float
    """Or what the task is judged by in its place (``figures``)."""
    loss: Measured
    labels: list[LabelScore] = field(default_factory=list)
    """Empty where records have no label."""
    slices: list[LabelScore] = field(default_factory=list)
    """By slice of the test data (``data.slice``), or by site."""
    begun_accuracy: float | None = None
    """After round 0, if the run's start was made from the sites' records there."""
    begun_loss: Measured | None = None
    figures: list[Figure] = field(default_factory=list, metadata=SPARSE)
    """The headline and what a task's score has beside it; of most tasks, which have nothing beside, none."""
    parts: list[LabelScore] = field(default_factory=list, metadata=SPARSE)
    """By kind of part, where an answer has several: right ones, those there are, and those that the model gives."""


@dataclass(frozen=True)
class ProgressFile(RunFile):
    """What goes on right now, for ``fedveil watch``."""

    NAME: ClassVar[str] = "progress.json"
    phase: str
    online: int | None = None
    """Sites, while the server waits for ``wanted`` of them."""
    wanted: int | None = None
    round_number: int | None = field(default=None, metadata=called("round"))
    """While sites train."""
    rounds: int | None = None
    answered: list[str] = field(default_factory=list)
    """Sites that have answered, of ``asked``."""
    asked: int | None = None


@dataclass(frozen=True)
class Reached:
    """What a run has come to with its last complete round."""

    accuracy_before: float
    """On public data, before round 1."""
    accuracy: float
    epsilon: Epsilon | None
    """The federation's; None without a claim."""
    rounds: int
    honest_sites: int = 0
    """Of each sum, that ``epsilon`` counts on; 0: it counts on no other site."""


@dataclass(frozen=True)
class ResultFile(RunFile):
    """How a run ended."""

    NAME: ClassVar[str] = "result.json"
    status: Status
    """``stopped``: before its last round, and well."""
    reason: str
    """Empty when it completed."""
    reached: Reached | None = field(metadata=BESIDE)
    """None if no round was complete, or nothing could be saved."""
    engine: str = ""
    """What conducted the run, in words; empty: not recorded."""


@dataclass(frozen=True, kw_only=True)
class AdapterFile(RunFile):
    """What the adapter beside it, in ``adapter/``, was trained on, and what scoring it needs."""

    NAME: ClassVar[str] = ABOUT_ADAPTER
    base_model: str
    base_fingerprint: str
    """SHA-256 of what the base model computes (``common.model.base.model_fingerprint``)."""
    base_files: str
    """SHA-256 of the base model's files (``common.model.files``), which is compared before one of them is opened."""
    bundle: str
    """SHA-256 of the server's code."""
    task: str
    label_names: list[str]
    """In the order of the head's rows; empty without labels."""
    max_length: int
    """As ``model.max-length``."""
    feature_scale: float
    precision: str
    """Of the forward pass, as torch calls its dtype."""
    settings: dict[str, str | int | float | bool]


@dataclass(frozen=True)
class Absence:
    """A site that did not take part in one attempt at a round, and why; or a whole attempt that reached no site."""

    round_number: int = field(metadata=called("round"))
    attempt: int
    """1-based."""
    site: str
    """Its name as far as it can be trusted, else its node's name in this run; empty where too few sites were
    online to ask any."""
    kind: str
    """What the site refuses by (``REFUSAL_KINDS``), or what the server found: ``late``, ``failed``, ``reply`` (what it
    sent is not acceptable) or ``quorum``."""
    reason: str
    """One line for people; says nothing about records."""


@dataclass(frozen=True)
class CountLine:
    """A site's noised count of its own records that the model of a round gets right."""

    site: str
    value: float
    noise_std: float
    """Standard deviation, in records."""


@dataclass(frozen=True)
class ShortenedLine:
    """An update that was longer than is likely, so that the server made it shorter."""

    site: str
    factor: float
    """What its change was multiplied by."""


@dataclass(frozen=True)
class RoundLine(RunFile):
    """One round that the server began, whether or not it counts."""

    NAME: ClassVar[str] = "rounds.jsonl"
    round_number: int = field(metadata=called("round"))
    """0: the statistic that the run's start is made from."""
    complete: bool
    """Whether the quorum was reached; if not, nothing was averaged."""
    strategy: str
    participants: list[str]
    """Sites whose result counts; with a trusted server, which keeps them secret, the cohort."""
    accuracy: float | None
    """On public data, or the figure in its place; None, as ``loss``, in a round that was not scored."""
    loss: Measured | None
    bytes_down: int
    """Adapter payload of all tasks; with a trusted server, of the usual draw."""
    bytes_up: int
    """Adapter payload of all replies, likewise."""
    seconds: float | None
    """None with a trusted server, which keeps the draw secret: how long a round takes follows from that."""
    privacy: str
    """The setting ``privacy.mode``."""
    head: str
    """The head's policy in words."""
    noised_correct: list[CountLine]
    refusals: list[Absence]
    """The last word of each site that got a task and did not take part; with a trusted server, of none."""
    attempts: int
    failures: list[Absence]
    """Everything that went wrong, in every attempt, also where a later one mended it."""
    labels: list[LabelScore] = field(default_factory=list)
    """The score by label; empty in a round that was not scored."""
    slices: list[LabelScore] = field(default_factory=list)
    """The score by slice of the test data (``data.slice``), or by site."""
    shortened: list[ShortenedLine] = field(default_factory=list)
    """Updates that were made shorter."""
    figures: list[Figure] = field(default_factory=list, metadata=SPARSE)
    """As those of the baseline."""
    parts: list[LabelScore] = field(default_factory=list, metadata=SPARSE)
    """As those of the baseline."""


@dataclass(frozen=True)
class PrivacyLine(RunFile):
    """What one site released in one attempt at a round, or a trusted server for all: the basis of the claim for it.

    Also of attempts that were thrown away, of replies that do not count, and of rounds that were cut off by a crash and
    repeated: a round that counts has of each site its last line.
    """

    NAME: ClassVar[str] = "privacy.jsonl"
    round_number: int = field(metadata=called("round"))
    site: str
    public_size: int
    """Declared by the site's steward; of the cohort, its sites."""
    unit: str
    adjacency: str
    adversary: str
    sampler: str
    spent: SpendingFigures | None = field(metadata=BESIDE)
    """None where no claim is made."""
    accountant: str
    """In words."""
    head: str
    """The head's policy in words."""
    rank: int = 0
    """How many columns the site trains, declared as public; 0: the strategy does not ask."""


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON file of a run's folder.

    Raises:
        DataError: the file is missing, cannot be read, or is no JSON object.
    """
    try:
        value = json_of(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing: {path.parent} is not the folder of a finished run") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): check permissions and files") from error
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} is not an object")
    return value


def read_file(of: type[F], folder: Path) -> F:
    """Return a file of a run's folder; DataError if it is missing, or not as it is written."""
    return from_json(of, read_json(folder / of.NAME), str(folder / of.NAME))


def read_if_there(of: type[F], folder: Path) -> F | None:
    """Return a file of a run's folder as ``read_file``, or None if it is not there."""
    return read_file(of, folder) if (folder / of.NAME).is_file() else None


def result_state(folder: Path) -> FileState:
    """Return what tells one result of a run from another's that replaces it; None if the run has none."""
    return state_of(folder / ResultFile.NAME)


def new_result(folder: Path, old: FileState) -> ResultFile | None:
    """Return how a run ended; None if it has not, or its result is the ``old`` one, of the attempt before.

    No clock is asked: a file has the time of the kernel's last tick, or of another machine, and that may be behind.

    Raises:
        DataError: the result is not as it is written.
    """
    return None if result_state(folder) in (None, old) else read_if_there(ResultFile, folder)


def read_lines(of: type[F], folder: Path) -> list[F]:
    """Return the lines of a file of a run's folder, none of an absent one.

    Raises:
        DataError: a line is not as it is written.
    """
    path = folder / of.NAME
    if not path.is_file():
        return []
    lines: list[F] = []
    for number, text in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            lines.append(from_json(of, json_of(text), f"line {number} of {path}"))
        except ValueError as error:
            raise DataError(f"line {number} of {path} is not JSON: {error}") from error
    return lines
