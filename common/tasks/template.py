"""A public text around a record's columns (``data.template``), of which a language model learns every token."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fedveil.common.errors import ConfigError

PROMPT, COMPLETION = "{prompt}", "{completion}"
WHOLE = COMPLETION
"""The template of records that are a completion and nothing else."""
LONGEST = 1000
"""Characters of a template, so that filling one in takes no time that counts."""


@dataclass(frozen=True)
class Template:
    """A record's text: ``before``, the prompt's value, ``between``, the completion's value, ``after``."""

    before: str
    between: str
    after: str
    prompted: bool
    """Whether the text holds the prompt's value."""

    def filled(self, prompt: str, completion: str) -> str:
        """Return the text of a record."""
        return f"{self.before}{prompt}{self.between}{completion}{self.after}"

    def opening(self, prompt: str) -> str:
        """Return the text up to the completion, without the blanks before it: tokens have those in front of a word."""
        return f"{self.before}{prompt}{self.between}".rstrip(" ")

    @property
    def end(self) -> str:
        """Where a text is over without the model's end mark: what follows the completion, if that begins a new line."""
        return self.after if "\n" in self.after else ""

    def completion_in(self, continued: str) -> str | None:
        """Return the completion of a text that goes on after ``opening``; None: the template does not say which it is.

        Words of the template inside it would begin another record, or another column.
        """
        text, after = continued.strip(), self.after.strip()
        if not text.endswith(after):
            return None
        text = text.removesuffix(after).strip()
        marks = {part.strip() for part in (self.before, self.between, self.after)} - {""}
        words = [mark for mark in marks if re.search(r"\w", mark)]
        return text if text and not any(mark in text for mark in words) else None


def template_of(text: str) -> Template:
    """Return what a setting ``data.template`` says.

    Raises:
        ConfigError: it is too long, or has not one place for the completion and at most one, before it, for the prompt.
    """
    opening, _, after = text.partition(COMPLETION)
    before, prompted, between = opening.partition(PROMPT)
    if text.count(COMPLETION) != 1 or text.count(PROMPT) != bool(prompted) or len(text) > LONGEST:
        raise ConfigError(
            f"data.template is {text[:80]!r}: write {COMPLETION} once, at most one {PROMPT} before it, and at most "
            f"{LONGEST} characters, such as 'Sentiment: {PROMPT}. Review: {COMPLETION}'"
        )
    if not prompted:
        before, between = opening, ""
    return Template(before, between, after, bool(prompted))


def check_template(text: str, prompt: str) -> None:
    """Raise ConfigError unless a template reads the prompt's column where one is named, and no other."""
    if text and template_of(text).prompted != bool(prompt):
        what = f"which reads no prompt: put {PROMPT} into it, or set data.prompt to ''"
        raise ConfigError(f"data.template is {text!r}, {what if prompt else 'so name a column in data.prompt'}")
