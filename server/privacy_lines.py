"""The lines of ``privacy.jsonl``: one a charge of a site."""

from __future__ import annotations

import json
from pathlib import Path

from fedveil.common.errors import DataError
from fedveil.common.files import replace_file
from fedveil.common.messages.round import TrainResult
from fedveil.common.run_lines import PrivacyLine
from fedveil.common.strict_json import from_json
from fedveil.common.tasks import TASKS
from fedveil.privacy.claim import NO_CLAIM, NOTHING
from fedveil.strategies.job import Job


def head_words(job: Job) -> str:
    """Return the head policy as reports print it."""
    if not TASKS[job.config.model.task].labelled:
        return "none (the base model's own)"
    if job.config.head.policy == "frozen":
        return "frozen at its start"
    return f"trained and averaged{job.mechanism.head}"


def privacy_line(job: Job, result: TrainResult) -> PrivacyLine:
    """Return the line of ``privacy.jsonl`` for one result."""
    spent = result.spending
    said = job.claim if spent else NOTHING
    return PrivacyLine(
        round_number=result.round_number,
        site=result.site,
        public_size=result.public_size,
        unit=said.unit,
        adjacency=said.adjacency,
        adversary=said.adversary,
        sampler=said.sampler,
        spent=spent.figures() if spent else None,
        accountant=str(spent.accountant) if spent else NO_CLAIM,
        head=head_words(job),
        rank=result.rank,
    )


def keep_charges(path: Path, size: int) -> None:
    """Cut a file back to ``size`` bytes and the whole lines of charges after them, in one step."""
    if not path.is_file():
        return
    content = path.read_bytes()
    charges = [text + b"\n" for text in content[size:].splitlines() if _is_charge(text)]
    if (whole := content[:size] + b"".join(charges)) != content:
        replace_file(path, whole)


def _is_charge(text: bytes) -> bool:
    try:
        return from_json(PrivacyLine, json.loads(text), PrivacyLine.NAME).spent is not None
    except (ValueError, DataError):  # what a crash has cut off
        return False
