"""Records by person for tests of the unit person."""

from __future__ import annotations

from collections.abc import Callable

from fedveil.common.tasks.examples import Dataset
from fedveil.common.tasks.text import TextExample

BY_PERSON = {"privacy.unit": "person", "data.person": "author"}


Folder = Callable[[str], str]


# --- the records of a person ------------------------------------------------------------------------------------------
def example(text: str, person: str, row: bytes = b"") -> TextExample:
    return TextExample(text=text, label=0, person=person, row=row)


def persons_of(data: Dataset) -> set[str]:
    return {e.person for e in data.examples}
