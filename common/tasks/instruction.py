"""Instructions: one exchange, in LLaMA-Factory's alpaca layout, through the base model's chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

from fedveil.common.tasks.causal_lm import complete
from fedveil.common.tasks.cells import CELL_CHARACTERS, Misfit, is_missing, read_optional, read_text
from fedveil.common.tasks.chat import (
    ASSISTANT,
    LEFT_OUT,
    MOST_TURNS,
    SYSTEM,
    SYSTEM_ROLE,
    USER,
    Chat,
    Turn,
    prompt_tokens,
)
from fedveil.common.tasks.examples import Example
from fedveil.common.tasks.finished import Questions
from fedveil.common.tasks.roles import Role


def read_history(value: object, folder: Path | None = None) -> tuple[Turn, ...]:
    """Return the turns of earlier exchanges, none of a blank cell.

    Args:
        value: a list of pairs of question and answer, or its JSON.
        folder: of the file; no cell names another.

    Raises:
        Misfit: it is no such list, has too many turns or characters, or words are missing.
    """
    if value is None or (not isinstance(value, list) and is_missing(value)):
        return ()
    if isinstance(value, str):
        if len(value) > CELL_CHARACTERS:
            raise Misfit(f"has more than {CELL_CHARACTERS} characters")
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise Misfit("has no list of exchanges", PAIRS) from None
    if not isinstance(value, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        raise Misfit("has no list of exchanges", PAIRS)
    if 2 * len(value) > MOST_TURNS - 3:
        raise Misfit(f"has more than {(MOST_TURNS - 3) // 2} exchanges")
    if not all(isinstance(text, str) for pair in value for text in pair):
        raise Misfit("has an exchange whose words are no text", PAIRS)
    return tuple((who, read_text(text)) for pair in value for who, text in zip((USER, ASSISTANT), pair, strict=True))


PAIRS = "write [['a question', 'its answer'], ...] as JSON"


@dataclass(frozen=True, slots=True)
class Exchange(Example):
    """One record: instruction, its input and the answer, after what was said before."""

    left_out: ClassVar[Mapping[str, str]] = {
        **LEFT_OUT,
        "input": "set data.text-pair to 'input', or remove the column",
        "history": "set data.context to 'history', or remove the column",
    }

    instruction: str
    output: str = ""
    input: str = ""
    system: str = ""
    history: tuple[Turn, ...] = ()

    @property
    def question(self) -> str:
        """Instruction and input on lines of their own."""
        return "\n".join(part for part in (self.instruction, self.input) if part)

    @property
    def spoken(self) -> tuple[Turn, ...]:
        """The system's turn, earlier exchanges, the user's turn and the assistant's, as far as they are there."""
        first = ((SYSTEM, self.system),) if self.system else ()
        last = ((ASSISTANT, self.output),) if self.output else ()
        return (*first, *self.history, (USER, self.question), *last)

    @property
    def given(self) -> int:
        """How many turns come before those that are learnt: none, for answers of the history are learnt as well."""
        return 0

    def canonical(self, label: str | None) -> str:
        """Return the turns as JSON, as those of a conversation."""
        return json.dumps({"turns": self.spoken, "label": label})

    def likeness(self) -> str:
        """Return the last question, but for case and blanks."""
        return " ".join(self.question.split()).casefold()

    def texts(self) -> list[str]:
        """Return the words of every turn, instruction and input apart."""
        said = (self.instruction, self.output, self.input, self.system, *(text for _, text in self.history))
        return [text for text in said if text]


class Instruction(Chat):
    """Instruction, input and output, and what was said before.

    The loss is the mean negative log-likelihood of the output's tokens, and of the answers' in the history.
    """

    name: ClassVar[str] = "instruction"
    roles: ClassVar[tuple[Role, ...]] = (
        Role("prompt", "instruction", "the instruction"),
        Role("text-pair", "input", "what the instruction is about", optional=True, read=read_optional),
        Role("completion", "output", "the answer", in_question=False),
        SYSTEM_ROLE,
        Role("context", "history", "earlier exchanges", optional=True, in_question=False, read=read_history),
    )
    example: ClassVar[type[Example]] = Exchange
    questions: ClassVar[Questions | None] = Questions(
        lambda words: Exchange(instruction=words[0], input="".join(words[1:])),
        partial(complete, prompt_of=prompt_tokens),
    )
