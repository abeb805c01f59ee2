"""The end of a test session says where its time went, and in CI more time than the limit fails it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import conftest
import pytest
from seconds import LONGEST, MOST, own, summary, too_many


def ended(spent: list[float], monkeypatch: pytest.MonkeyPatch) -> int:
    """Return the exit status of a session that passed, whose processes took so many seconds."""
    monkeypatch.setattr(conftest, "SPENT", spent)
    session: Any = SimpleNamespace(config=SimpleNamespace(), exitstatus=0)
    conftest.pytest_sessionfinish(session)
    return int(session.exitstatus)


def test_more_time_than_the_limit_fails_the_session_in_ci_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDVEIL_CI", "1")
    assert ended([MOST / 2, MOST / 2], monkeypatch) == 0
    assert ended([MOST / 2, MOST / 2 + 1], monkeypatch) == 1
    monkeypatch.delenv("FEDVEIL_CI")
    assert ended([MOST, 1.0], monkeypatch) == 0


def test_a_worker_tells_what_it_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conftest, "SPENT", list[float]())
    told: dict[str, float] = {}
    conftest.pytest_sessionfinish(SimpleNamespace(config=SimpleNamespace(workeroutput=told), exitstatus=0))  # type: ignore[arg-type]
    conftest.pytest_testnodedown(SimpleNamespace(workeroutput=told))
    assert [own()] == pytest.approx(conftest.SPENT, abs=1.0)


def test_the_longest_files_are_named_with_all_that_their_tests_took() -> None:
    tests = [(f"tests/test_{i}.py", float(i)) for i in range(1, 20) for _ in range(2)]
    head, files = summary(1234.4, tests)
    assert head.startswith("1,234 s of processor time")
    assert files.startswith("tests/test_19.py 38 s, tests/test_18.py 36 s")
    assert files.count(",") == LONGEST - 1


def test_what_is_said_of_too_many_seconds_names_both() -> None:
    assert not too_many(MOST)
    said = too_many(2 * MOST)
    assert f"{2 * MOST:,.0f} s" in said
    assert f"the {MOST:,.0f} of" in said
