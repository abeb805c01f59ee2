"""Instructions: one exchange, in LLaMA-Factory's alpaca layout, through the base model's chat template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from common.tasks.cells import is_missing, read_text
from common.tasks.chat import ASSISTANT, USER, Chat, Turn
from common.tasks.examples import Example
from common.tasks.roles import Role


def read_input(value: object, folder: Path | None = None) -> str:
    """Return a cell as text, empty where it is blank; Misfit as of read_text."""
    return "" if is_missing(value) else read_text(value)


@dataclass(frozen=True, slots=True)
class Exchange(Example):
    """One record: what is asked, what that is about, and the answer."""

    instruction: str
    output: str = ""
    input: str = ""

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The user's turn, instruction and input on lines of their own, and the assistant's, if there is an answer."""
        asked = "\n".join(part for part in (self.instruction, self.input) if part)
        return ((USER, asked), *([(ASSISTANT, self.output)] if self.output else []))

    def canonical(self, label: str | None) -> str:
        """Return the turns as JSON, as those of a conversation."""
        return json.dumps({"turns": self.turns, "label": label})

    def likeness(self) -> str:
        """Return what was asked, but for case and blanks."""
        return " ".join(self.turns[0][1].split()).casefold()


class Instruction(Chat):
    """Instruction, input and output; the loss is the mean negative log-likelihood of the output's tokens."""

    name: ClassVar[str] = "instruction"
    roles: ClassVar[tuple[Role, ...]] = (
        Role("instruction", "instruction", "the instruction"),
        Role("input", "input", "what the instruction is about", optional=True, usual=True, read=read_input),
        Role("output", "output", "the answer"),
    )
    example: ClassVar[type[Example]] = Exchange
    answered: ClassVar[frozenset[str]] = frozenset({"output"})

    def asked(self, words: Sequence[str]) -> Example:
        """Return the instruction, and its input if there is one, without an answer."""
        return Exchange(instruction=words[0], input="".join(words[1:]))
