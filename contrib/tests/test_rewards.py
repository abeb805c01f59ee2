"""Verifiable rewards: each is a pure function of one completion and its record's answer."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from fedveil.common.errors import ConfigError
from fedveil.contrib import rewards
from fedveil.contrib.rewards import REWARDS, Completion, weights_of

PURE = {"re", "collections.abc", "dataclasses", "decimal", "typing", "__future__"}


def worth(name: str, text: str, answer: str, tokens: int = 4, most: int = 16, ended: bool = True) -> float:
    return REWARDS[name](Completion(text, answer, tokens, most, ended))


@pytest.mark.parametrize(
    ("name", "text", "answer", "expected"),
    [
        ("exact", " 9  Apples\n", "9 apples", 1),
        ("exact", "9", "9 apples", 0),
        ("number", "3 + 6 = 9", "9 apples", 1),
        ("number", "9, or 10", "9 apples", 0),
        ("number", "1,200.0", "1200", 1),
        ("number", "-9", "9", 0),
        ("number", "nine", "9", 0),
        ("number", "9", "nine", 0),
        ("option-letter", " (B) no", "B. no", 1),
        ("option-letter", "B", "B. no", 1),
        ("option-letter", "Because", "B. no", 0),
        ("option-letter", "A. yes", "B. no", 0),
        ("format", " 12\n", "9 apples", 1),
        ("format", "12 apples", "9 apples", 0),
        ("format", "C.", "B. no", 1),
        ("format", "B. no", "B. no", 0),
        ("format", "any words", "other words", 1),
        ("format", "two\nlines", "other words", 0),
        ("format", " ", "other words", 0),
    ],
)
def test_a_reward_reads_the_words(name: str, text: str, answer: str, expected: float) -> None:
    assert worth(name, text, answer) == expected


def test_rewards_of_end_and_length_read_the_tokens() -> None:
    assert [worth("end", "9", "9", ended=ended) for ended in (True, False)] == [1, 0]
    assert worth("end", " ", "9") == 0, "an end mark alone is the easiest way to an end"
    assert [worth("length", "9", "9", tokens=tokens) for tokens in (4, 16)] == [0.75, 0]


@pytest.mark.parametrize("name", REWARDS)
def test_every_reward_is_a_share_and_the_same_again(name: str) -> None:
    texts = ["", "9", "-", "-,9", "(B)", "9" * 5000, "9," * 5000, "(" * 5000, "é١\n\x00", "NaN", "1e999"]
    once = [[worth(name, text, answer) for text in texts] for answer in ("", "9 apples", "B. no", "words")]
    assert all(0 <= value <= 1 for row in once for value in row)
    assert once == [[worth(name, text, answer) for text in texts] for answer in ("", "9 apples", "B. no", "words")]


def test_the_file_imports_nothing_that_reads_a_clock_a_file_or_a_generator() -> None:
    tree = ast.parse(Path(rewards.__file__).read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert imported - PURE == {"fedveil.common.check", "fedveil.common.errors"}
    assert not any(isinstance(node, ast.Global | ast.Nonlocal) for node in ast.walk(tree))


def test_weights_are_read_by_name() -> None:
    assert weights_of("number:1, format:0.5,end:.25") == {"number": 1.0, "format": 0.5, "end": 0.25}


@pytest.mark.parametrize("rewards", ["", "number", "number:", "number:0", "number:-1", "number:nan", "number:inf"])
def test_a_reward_without_a_weight_above_zero_is_refused(rewards: str) -> None:
    with pytest.raises(ConfigError, match=r"rollout\.rewards"):
        weights_of(rewards)


@pytest.mark.parametrize("rewards", ["regex [0-9]+:1", "number:1,number:2", "http://reward.example:1"])
def test_what_is_no_reward_of_ours_is_refused(rewards: str) -> None:
    with pytest.raises(ConfigError, match="write each of exact, number"):
        weights_of(rewards)
