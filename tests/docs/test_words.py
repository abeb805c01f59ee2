"""The glossary has each word once."""

from __future__ import annotations

import re
from pathlib import Path

GLOSSARY = Path(__file__).resolve().parents[2] / "docs" / "reference" / "glossary.md"


def test_every_word_of_the_glossary_is_listed_once_with_one_sentence() -> None:
    lines = [line for line in GLOSSARY.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[1:] if not line.startswith("|---")]
    words = [word for word, _, _ in rows]
    assert len(words) == len(set(words)) >= 25
    for word, _, meaning in rows:
        assert re.fullmatch(r"[A-Z][^.]*\.", meaning), f"{word}: not one sentence: {meaning}"
