"""The rounds of a report: the model before training, round 0, and every round after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedveil.common.run_lines import RoundLine
from fedveil.common.words import counted, names_text, natural, number_text
from fedveil.reports.alike import spread
from fedveil.reports.course import epsilon_course
from fedveil.reports.folder import RunFiles


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
    """Wall time; None with a trusted server, whose times would reveal who was drawn."""
    epsilon_worst: float | None
    """Largest total that a site had reported by then; None without a claim."""


def round_reports(files: RunFiles) -> list[RoundReport]:
    """Return every round in order; those of a trusted server have no seconds."""
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
            seconds=None if files.trusts_server else line.seconds,
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


def shortened_text(rounds: Sequence[RoundLine]) -> str:
    """Return which updates the server shortened in one sentence; empty if none."""
    lines = [one for line in rounds for one in line.shortened]
    if not lines:
        return ""
    sites = names_text(sorted({one.site for one in lines}, key=natural))
    return (
        f"The server shortened {counted(len(lines), 'unusually long update')}, to "
        f"{spread([one.factor for one in lines], number_text)} of the length: from {sites}. A site with unusual "
        "records sends longer updates. rounds.jsonl lists each."
    )
