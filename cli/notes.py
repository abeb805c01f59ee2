"""Notes on the settings that a command was given, on stderr."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedveil.strategies.job import Job


def print_notes(job: Job, recipe: str = "") -> None:
    """Say each of the job's notes, such as on a setting that has another name now, and the one on its recipe."""
    for note in (*job.notes, *([recipe] if recipe else [])):
        print(note, file=sys.stderr)
