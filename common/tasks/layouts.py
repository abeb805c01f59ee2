"""Layouts of records that other programs write, and how each is read here; a row a layout."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """A layout that is known by its columns."""

    name: str
    """Whose it is, and what they call it."""
    columns: frozenset[str]
    """Columns that every file of it has."""
    advice: str
    """How it is read here, for a user who named other columns."""
    alone: bool = False
    """Whether its columns are too common to tell it by, unless a file has no others."""

    def fits(self, columns: frozenset[str]) -> bool:
        """Return whether records of these columns are of this layout."""
        return self.columns == columns if self.alone else self.columns <= columns


LAYOUTS = (
    Layout(
        "TRL's preference layout",
        frozenset({"chosen", "rejected"}),
        "set model.task to 'preference', and data.prompt to '' if there is no prompt",
    ),
    Layout("TRL's conversational layout", frozenset({"messages"}), "set model.task to 'chat'"),
    Layout(
        "TRL's prompt and completion",
        frozenset({"prompt", "completion"}),
        "set model.task to 'causal-lm', or, where both are lists of turns, to 'chat' with data.context 'prompt' and "
        "data.messages 'completion'",
    ),
    Layout(
        "TRL's language modelling layout",
        frozenset({"text"}),
        "set model.task to 'causal-lm', data.prompt to '' and data.completion to 'text'",
        alone=True,
    ),
    Layout(
        "LLaMA-Factory's sharegpt layout",
        frozenset({"conversations"}),
        "set model.task to 'chat' and data.messages to 'conversations'",
    ),
    Layout(
        "LLaMA-Factory's alpaca layout",
        frozenset({"instruction", "output"}),
        "set model.task to 'instruction', data.prompt to 'instruction', data.completion to 'output' and, if it has an "
        "input, data.text-pair to 'input'",
    ),
)
"""The first that fits is meant."""


def known_layout(columns: Collection[str]) -> str:
    """Return how records of these columns are read, to end a message that some column is missing; else nothing.

    >>> known_layout(["conversations", "id"])
    ". It is LLaMA-Factory's sharegpt layout: set model.task to 'chat' and data.messages to 'conversations'"
    """
    known = next((layout for layout in LAYOUTS if layout.fits(frozenset(columns))), None)
    return f". It is {known.name}: {known.advice}" if known else ""
