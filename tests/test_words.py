"""Words: each of the glossary is in the code, and modules say what they are."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from strategies.options import known_settings

ROOT = Path(__file__).resolve().parent.parent
GLOSSARY = ROOT / "docs" / "reference" / "glossary.md"
QUESTIONS = ("What", "Which", "How", "Where", "Who", "Whose", "Why", "When", "Whether", "Among", "If", "Everything")


def files(*kinds: str) -> list[Path]:
    """Return the project's own files of these kinds, tests included."""
    named = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    if not named:  # not a clone: a copy of the files alone
        found: Iterable[Path] = (path for kind in kinds for path in ROOT.rglob(f"*{kind}"))
        return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(ROOT).parts))
    return sorted(path for name in named.split("\0") if name.endswith(kinds) and (path := ROOT / name).is_file())


def tables() -> list[list[list[str]]]:
    """Return the tables of the glossary: rows of cells, without the header."""
    found = re.findall(r"(?:^\|.*\n)+", GLOSSARY.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [[[c.strip() for c in line.split("|")[1:-1]] for line in table.splitlines()[2:]] for table in found]


WORDS = {word: (meaning, name.strip("`")) for word, meaning, name in tables()[0]}


# The glossary


def is_there(name: str) -> bool:
    """Return whether a dotted name is a setting, a module, or something in one: a field of a dataclass counts."""
    if name in known_settings():
        return True
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            if part in getattr(found, "__dataclass_fields__", {}):
                return True
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


@pytest.mark.parametrize("word", WORDS)
def test_a_word_is_one_sentence_and_its_name_is_in_the_code(word: str) -> None:
    meaning, name = WORDS[word]
    assert re.fullmatch(r"[A-Z][^.]*\.", meaning), f"{word}: not one sentence: {meaning}"
    assert is_there(name), f"{word} is called {name} in the glossary, and nothing in the code is"


@pytest.mark.parametrize(
    ("name", "there"),
    [
        ("client.site.Site.public_size", True),
        ("client.site.Site.private_size", False),
        ("client.sites.Site", False),
        ("strategies.base.Strategy.basis", True),
        ("strategies.base.Strategy.bases", False),
        ("server.adam-tau", True),
        ("server.adam-epsilon", False),
    ],
)
def test_a_name_that_the_code_lacks_is_found(name: str, there: bool) -> None:
    assert is_there(name) is there


def test_every_word_is_listed_once() -> None:
    words = [row[0] for row in tables()[0]]
    assert len(words) == len(set(words)) >= 25


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


@pytest.mark.parametrize("path", files(".py"), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_opens_with_what_it_is_or_what_it_does(path: Path) -> None:
    line = opening(path.read_text(encoding="utf-8"))
    if path.is_relative_to(ROOT / "tests"):
        assert line, f"{path.relative_to(ROOT)} has no docstring"
        return
    assert not wrong_opening(line), f"{path.relative_to(ROOT)}: {wrong_opening(line)}: {line}"


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
