"""The task of conversations, with loss on the assistant's turns alone, averaged inside each record.

The base model's own chat template makes text of turns. It renders the turns before an answer, with
the words that begin one, and the turns up to and with the answer: what the second has more is the answer. Each part
becomes tokens by itself, as it does for a question to the model, so no token is half a question.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from fedveil.common.errors import ConfigError, DataError
from fedveil.common.tasks.base import IGNORED, Record, Wording
from fedveil.common.tasks.causal_lm import CausalLM, complete, halves
from fedveil.common.tasks.cells import CELL_CHARACTERS, Misfit, is_missing, read_optional, read_text
from fedveil.common.tasks.examples import Example
from fedveil.common.tasks.finished import Questions
from fedveil.common.tasks.roles import Role
from fedveil.common.tasks.text import TOKENS

if TYPE_CHECKING:
    from fedveil.common.model.base import BaseModel

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
SPEAKERS: Mapping[tuple[str, str], Mapping[str, str]] = {
    ("role", "content"): {role: role for role in (SYSTEM, USER, ASSISTANT)},
    ("from", "value"): {"system": SYSTEM, "human": USER, "gpt": ASSISTANT},
}
"""How a turn is written: as TRL has it, and as LLaMA-Factory's sharegpt layout does; and whose it is."""
MOST_TURNS = 256
"""The template renders all turns again for each answer, so a record's time grows with the square of its turns."""

Turn = tuple[str, str]
"""Who speaks, and the words."""
LEFT_OUT = {
    "system": "set data.system to 'system', or remove the column",
    "tools": "tools are not read: remove the rows that have any, or the column",
}


@dataclass(frozen=True, slots=True)
class Conversation(Example):
    """One record: turns up to the assistant's last one."""

    left_out: ClassVar[Mapping[str, str]] = LEFT_OUT

    turns: tuple[Turn, ...]
    system: str = ""
    """What the system says first, from a column of its own; empty: nothing."""
    before: tuple[Turn, ...] = ()
    """What was said before the turns, from a column of its own; nothing of it is learnt."""

    @property
    def spoken(self) -> tuple[Turn, ...]:
        """All turns. A system's turn among them goes before the column, as in LLaMA-Factory."""
        turns = (*self.before, *self.turns)
        own = self.system and not (turns and turns[0][0] == SYSTEM)
        return ((SYSTEM, self.system), *turns) if own else turns

    @property
    def given(self) -> int:
        """How many of all turns come before those that are learnt."""
        return len(self.spoken) - len(self.turns)

    def canonical(self, label: str | None) -> str:
        """Return the turns as JSON, however the source writes them."""
        return json.dumps({"turns": self.spoken, "label": label})

    def likeness(self) -> str:
        """Return what the user says, but for case and blanks."""
        return " ".join(words for who, text in self.spoken if who == USER for words in text.split()).casefold()

    def lacks(self) -> tuple[str, str]:
        """Return that no user asks: all such records would be near-duplicates."""
        if any(who == USER for who, _ in self.spoken):
            return "", ""
        return "has no turn of the user", "if it stands in a column of its own, name that in data.context"

    def texts(self) -> list[str]:
        """Return the words of every turn."""
        return [text for _, text in self.spoken]


def read_turns(value: object, folder: Path | None = None) -> tuple[Turn, ...]:
    """Return a cell's turns up to the assistant's last one; a system's turn without words is left out.

    Args:
        value: a list of objects, or its JSON, of one of the forms of ``SPEAKERS``.
        folder: of the file; no cell names another.

    Raises:
        Misfit: as ``read_before``, or no turn is the assistant's.
    """
    turns = list(read_before(value))
    while turns and turns[-1][0] != ASSISTANT:
        turns.pop()
    if not turns:
        raise Misfit("has no turn of the assistant", "there is nothing to learn from it: remove the row")
    return tuple(turns)


def read_before(value: object, folder: Path | None = None) -> tuple[Turn, ...]:
    """Return a cell's turns, whose last one may be anyone's; a system's turn without words is left out.

    Raises:
        Misfit: it is no such list, has too many turns or characters, or a turn has no words or holds more than words.
    """
    if isinstance(value, str):
        if len(value) > CELL_CHARACTERS:
            raise Misfit(f"has more than {CELL_CHARACTERS} characters")
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise Misfit("has no list of turns", "write [{'role': 'user', 'content': '...'}, ...] as JSON") from None
    if not isinstance(value, list) or not value:
        raise Misfit("has no list of turns", "give each record one")
    if len(value) > MOST_TURNS:
        raise Misfit(f"has more than {MOST_TURNS} turns")
    turns = [turn for item in value for turn in _turn(item)]
    if sum(len(text) for _, text in turns) > CELL_CHARACTERS:
        raise Misfit(f"has more than {CELL_CHARACTERS} characters")
    return tuple(turns)


def _turn(item: object) -> list[Turn]:
    fields = {key: value for key, value in item.items() if value is not None} if isinstance(item, dict) else {}
    form = next((form for form in SPEAKERS if set(fields) == set(form)), None)
    if form is None:
        raise Misfit("has a turn that is not who speaks and what is said", "tools, images and other parts are not read")
    who = SPEAKERS[form].get(str(fields[form[0]]))
    if who is None:
        raise Misfit("has a turn of somebody else than system, user and assistant", "remove the row")
    if not isinstance(fields[form[1]], str):
        raise Misfit("has a turn whose words are no text", "tools, images and other parts are not read")
    return [] if who == SYSTEM and is_missing(fields[form[1]]) else [(who, read_text(fields[form[1]]))]


SYSTEM_ROLE = Role(
    "system", "system", "what the system says first", optional=True, in_question=False, read=read_optional
)


def exchange(question: str, answer: str) -> Example:
    """Return a conversation of one question and its answer."""
    return Conversation(turns=((USER, question), (ASSISTANT, answer)))


def prompt_tokens(tokenizer: Any, example: Example) -> list[int]:
    """Return the tokens of a conversation, up to where the assistant's next answer begins."""
    text = _text(tokenizer, cast(Conversation, example).spoken, asking=True)
    tokens: list[int] = tokenizer(text, add_special_tokens=False)[TOKENS]
    return tokens


class Chat(CausalLM):
    """A conversation; the loss is the mean negative log-likelihood of the tokens of the assistant's turns."""

    name: ClassVar[str] = "chat"
    roles: ClassVar[tuple[Role, ...]] = (
        Role("messages", "turns", "the conversation", read=read_turns),
        Role("context", "before", "what was said before", optional=True, read=read_before),
        SYSTEM_ROLE,
    )
    example: ClassVar[type[Example]] = Conversation
    wording: ClassVar[Wording | None] = Wording(
        phrase=lambda phrase: exchange("", phrase.strip()), text=lambda text: exchange(*halves(text))
    )
    questions: ClassVar[Questions | None] = Questions(
        lambda words: Conversation(turns=((USER, words[0]),)),
        partial(complete, prompt_of=prompt_tokens),
    )

    def processor_parts(self, processor: Any) -> Mapping[str, Any]:
        """Return what of the tokenizer counts, its chat template among it."""
        return {**super().processor_parts(processor), "chat_template": _template(processor)}

    def limit(self, base: BaseModel, max_length: int) -> int:
        """Return the tokens that records are cut to; ConfigError also if the model has no chat template.

        Nothing asks the template yet: a site checks the model's fingerprint first.
        """
        if not _template(base.processor):
            raise ConfigError(
                f"the tokenizer of {base.name!r} has no chat template, by which model.task {self.name!r} makes text "
                "of turns: take an instruction-tuned base model, or put a chat_template.jinja into a copy of its folder"
            )
        return super().limit(base, max_length)

    def tokenise(self, tokenizer: Any, examples: Sequence[Example], max_length: int) -> list[Record]:
        """Return ``input_ids`` of the whole conversation, and ``labels`` that ignore all but the assistant's turns.

        A conversation that is too long loses its beginning, never the beginning of its last answer.

        Raises:
            ConfigError: the chat template cannot be trained on.
            DataError: it does not take a conversation.
        """
        _check_template(tokenizer)
        records: list[Record] = []
        for i, example in enumerate(examples):
            try:
                talk = cast(Conversation, example)
                parts = _parts(tokenizer, talk.spoken, talk.given)
            except Exception as error:  # whatever a template raises
                raise DataError(
                    f"record {i + 1} is none for the base model's chat template: {_reason(error)}"
                ) from error
            tokens, labels, last = list[int](), list[int](), 0
            for text, own in parts:
                last = len(tokens) if own else last
                tokens += tokenizer(text, add_special_tokens=False)[TOKENS]
                labels += tokens[len(labels) :] if own else [IGNORED] * (len(tokens) - len(labels))
            end = min(len(tokens), last + max(1, max_length - 1))
            part = slice(max(0, end - max_length), end)
            records.append({TOKENS: tokens[part], "attention_mask": [1] * len(tokens[part]), "labels": labels[part]})
        return records


def _check_template(tokenizer: Any) -> None:
    """Raise ConfigError unless a template takes turns one after another and keeps what it wrote."""
    try:
        _parts(tokenizer, ((USER, "one"), (ASSISTANT, "two"), (USER, "three"), (ASSISTANT, "four")))
    except Exception as error:  # whatever a template raises
        raise ConfigError(
            f"the base model's chat template cannot be trained on ({_reason(error)}): take another base model, or put "
            "another chat_template.jinja into a copy of its folder"
        ) from error


def _parts(tokenizer: Any, turns: Sequence[Turn], given: int = 0) -> list[tuple[str, bool]]:
    """Return the text of a conversation in parts, and of each whether it is learnt: the assistant's, after those given.

    Raises:
        DataError: the template rewrites earlier turns when later ones come, so that no part is one speaker's.
    """
    parts, done = list[tuple[str, bool]](), ""
    for i, (who, _) in enumerate(turns):
        if who == ASSISTANT:
            asked, answered = _text(tokenizer, turns[:i], asking=True), _text(tokenizer, turns[: i + 1])
            if not (asked.startswith(done) and answered.startswith(asked) and len(answered) > len(asked)):
                raise DataError("it writes earlier turns anew when later ones come")
            parts += [(asked[len(done) :], False), (answered[len(asked) :], i >= given)]
            done = answered
    return parts


def _text(tokenizer: Any, turns: Sequence[Turn], *, asking: bool = False) -> str:
    messages = [{"role": who, "content": text} for who, text in turns]
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asking)
    return text


def _template(tokenizer: Any) -> str:
    """Return a tokenizer's default chat template; empty: it has none."""
    try:
        template: str = tokenizer.get_chat_template()
    except (ValueError, AttributeError):  # as transformers says that there is none
        return ""
    return template


def _reason(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
