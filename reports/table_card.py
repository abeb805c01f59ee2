"""The card (Markdown) of a table that a run's model wrote: how it was made, and what the run claims."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

import yaml

from fedveil.common.tasks.finished import Sampling
from fedveil.common.words import counted, number_text, percent_text
from fedveil.reports.card import UNKNOWN_LICENSE, claimed, privacy_section, shown_base
from fedveil.reports.data import ReportData
from fedveil.reports.markdown import plain

NO_CLAIM = "THIS TABLE HAS NO PRIVACY CLAIM."
NOT_READ = "No private row was read: neither to write a row, nor to choose, filter or count."


@dataclass(frozen=True)
class Drawn:
    """How a table was drawn from a model."""

    columns: tuple[str, ...]
    rows: int
    wanted: int
    texts: int
    """That were sampled, of at most ``most``."""
    most: int
    lost: Mapping[str, int]
    """Texts that are no rows, by their reason."""
    repeated: int
    """Rows that are equal to an earlier one."""
    shares: Mapping[str, float]
    """Of the labels, which were given and never counted; one without a name: there are none."""
    kept: Mapping[str, int]
    """Rows of each label: fewer than its share where texts were lost."""
    template: str
    sampling: Sampling
    seeded: bool
    """Whether a seed was given, as in a test."""

    @property
    def sentence(self) -> str:
        """What became of the texts."""
        lost = ", ".join(f"{number_text(count)} {reason}" for reason, count in self.lost.items()) or "none was lost"
        by_label = ", ".join(f"{label} {number_text(count)}" for label, count in self.kept.items() if label)
        return (
            f"{number_text(self.rows)} of {counted(self.wanted, 'row')}, from {number_text(self.texts)} texts of at "
            f"most {number_text(self.most)}: {lost}; {counted(self.repeated, 'row')} equal to an earlier one"
            f"{f'; by label: {by_label}' if by_label else ''}"
        )


def table_card(data: ReportData, name: str, drawn: Drawn, written: bytes) -> str:
    """Return the card's text.

    Args:
        data: the report of the run.
        name: of the table's file.
        drawn: how the table was made.
        written: the file's bytes, which the card names by their hash.
    """
    meta = {
        "license": UNKNOWN_LICENSE,
        "tags": ["synthetic", "federated-learning", "differential-privacy", "fedveil"],
        "differential_privacy": claimed(data),
    }
    base = plain(shown_base(data))
    shares = ", ".join(f"{plain(label)} {percent_text(share)}" for label, share in drawn.shares.items() if label)
    how = drawn.sampling
    ends = f"{how.new_tokens} new tokens" if how.new_tokens else "as many new tokens as records may have"
    facts = {
        "Base model": base,
        "Columns": plain(", ".join(drawn.columns)),
        "Template": plain(json.dumps(drawn.template, ensure_ascii=False)) if drawn.template else "",
        "Shares, as given": shares,
        "Sampling": f"temperature {how.temperature:g}, top-p {how.top_p:g}, at most {ends}",
        "Random numbers": "of a given seed" if drawn.seeded else "the operating system's",
        "Rows": plain(drawn.sentence),
        "SHA-256": f"`{hashlib.sha256(written).hexdigest()}`",
    }
    parts = [
        f"---\n{yaml.safe_dump(meta, sort_keys=False, allow_unicode=True, width=100)}---",
        f"# {plain(name)}: synthetic records",
        "" if data.claim.made else f"**{NO_CLAIM}**",
        f"{base}, fine-tuned by {plain(data.method)} in FedVeil's run {plain(data.run)}, wrote these records. "
        f"{NOT_READ} A row describes nobody, and may be wrong in any way: try on real records what is built on it.",
        "\n".join(f"- {term}: {text}" for term, text in facts.items() if text),
        privacy_section(data),
    ]
    return "\n\n".join(part.rstrip() for part in parts if part) + "\n"
