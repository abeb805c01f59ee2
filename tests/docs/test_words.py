"""Words: the glossary has each once, and modules say what they are."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GLOSSARY = ROOT / "docs" / "reference" / "glossary.md"
QUESTIONS = ("What", "Which", "How", "Where", "Who", "Whose", "Why", "When", "Whether", "Among", "If", "Everything")


def files(*kinds: str) -> list[Path]:
    """Return the project's own files of these kinds, tests included."""
    named = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    if not named:  # not a clone: a copy of the files alone
        found: Iterable[Path] = (path for kind in kinds for path in ROOT.rglob(f"*{kind}"))
        return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(ROOT).parts))
    return sorted(path for name in named.split("\0") if name.endswith(kinds) and (path := ROOT / name).is_file())


# The glossary


def test_every_word_of_the_glossary_is_listed_once_with_one_sentence() -> None:
    lines = [line for line in GLOSSARY.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[1:] if not line.startswith("|---")]
    words = [word for word, _, _ in rows]
    assert len(words) == len(set(words)) >= 25
    for word, _, meaning in rows:
        assert re.fullmatch(r"[A-Z][^.]*\.", meaning), f"{word}: not one sentence: {meaning}"


# Modules


def opening(source: str) -> str:
    """Return the first line of a module's docstring; empty if it has none."""
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


def wrong_opening(line: str) -> str:
    """Return what is wrong with the first line of a module; empty: nothing."""
    if not line:
        return "there is no docstring"
    if line.split(maxsplit=1)[0].strip(":,") in QUESTIONS:
        return "it answers a question: open with a noun phrase or an imperative"
    return "" if line.endswith((".", ":")) or "." in line else "it is no sentence"


def test_modules_open_with_what_they_are_or_what_they_do() -> None:
    openings = {path.relative_to(ROOT): opening(path.read_text(encoding="utf-8")) for path in files(".py")}
    assert len(openings) > 500
    tests = {path for path in openings if path.parts[0] == "tests"}  # theirs may answer a question
    assert [path for path in tests if not openings[path]] == []
    assert [(path, said) for path in openings.keys() - tests if (said := wrong_opening(openings[path]))] == []


@pytest.mark.parametrize(
    "line", ["What a site owns.", "How a command speaks to people", "", "Which results count: one."]
)
def test_an_opening_that_is_none_is_found(line: str) -> None:
    assert wrong_opening(line)


# Citations


ELSEWHERE = re.compile(r"\([A-Z]{4,}(?:: \w| \d+\.\d)[^)]*\)|\b[A-Z]{4,}\.md\b")
"""A document called by a word in capitals, with a section: "(PRIVACY: 4.1)", "STYLE.md"."""
OURS = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")


def cited_elsewhere(text: str) -> Iterator[str]:
    """Yield citations of documents that are not in the repository."""
    for match in ELSEWHERE.finditer(text):
        if match[0] not in OURS:
            yield match[0]


def test_no_document_is_cited_that_is_not_in_the_repository() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {citation}"
        for path in files(".py", ".md", ".toml")
        if path != Path(__file__).resolve()
        for citation in cited_elsewhere(path.read_text(encoding="utf-8"))
    ]
    assert not found, found


@pytest.mark.parametrize("text", ["(PRIVACY: 4.1)", "see STYLE.md", "(DATA: speed on 2 cores)", "(ALGORITHMS 1.1; A1)"])
def test_a_citation_of_another_document_is_found(text: str) -> None:
    assert list(cited_elsewhere(text))
