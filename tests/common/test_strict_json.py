"""Frozen dataclasses as JSON: what was written is read, and nothing else is."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from fedveil.common.errors import DataError
from fedveil.common.strict_json import BESIDE, Epsilon, called, from_json, to_json


@dataclass(frozen=True)
class Cost:
    epsilon: Epsilon
    steps: int


@dataclass(frozen=True)
class Part:
    site: str
    value: float | None


@dataclass(frozen=True)
class Line:
    round_number: int = field(metadata=called("round"))
    good: bool
    kind: Literal["a", "b"]
    cost: Cost | None = field(metadata=BESIDE)
    parts: list[Part]
    figures: dict[str, int | float | str] = field(default_factory=dict)


WRITTEN = {
    "round": 3,
    "good": True,
    "kind": "a",
    "epsilon": 0.5,
    "steps": 4,
    "parts": [{"site": "north", "value": 1.5}, {"site": "south", "value": None}],
    "figures": {"n": 1, "x": 0.25, "s": "t"},
}
LINE = Line(3, True, "a", Cost(0.5, 4), [Part("north", 1.5), Part("south", None)], {"n": 1, "x": 0.25, "s": "t"})


def test_a_line_is_written_by_its_names_and_read_as_it_was() -> None:
    assert to_json(LINE) == WRITTEN
    assert list(to_json(LINE)) == list(WRITTEN), "the order of the fields is not that of the line"
    assert from_json(Line, json.loads(json.dumps(WRITTEN)), "it") == LINE


def test_a_part_that_is_not_there_is_null_in_each_of_its_fields() -> None:
    nothing = {**WRITTEN, "epsilon": None, "steps": None}
    line = from_json(Line, nothing, "it")
    assert line.cost is None
    assert to_json(line) == nothing
    for half in ({**nothing, "steps": 4}, {**nothing, "epsilon": 0.5}):
        with pytest.raises(DataError, match="no usable field"):
            from_json(Line, half, "it")


def test_a_default_may_be_missing_and_nothing_else_may() -> None:
    for name in WRITTEN:
        left = {key: value for key, value in WRITTEN.items() if key != name}
        if name == "figures":
            assert from_json(Line, left, "it").figures == {}
            continue
        with pytest.raises(DataError, match=f"^line 7 lacks the field '{name}'$"):
            from_json(Line, left, "line 7")


def test_an_unknown_field_is_an_error_that_names_it() -> None:
    with pytest.raises(DataError, match=r"^line 7 has the unknown field 'sites'$"):
        from_json(Line, {**WRITTEN, "sites": 3}, "line 7")
    with pytest.raises(DataError, match="unknown field 'why'"):
        from_json(Line, {**WRITTEN, "parts": [{"site": "north", "value": 1.5, "why": ""}]}, "it")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("round", wrong) for wrong in (True, 1.0, "1", None, [1])),
        *(("good", wrong) for wrong in (1, 0, "true", None)),
        *(("kind", wrong) for wrong in ("c", 1, None)),
        *(("epsilon", wrong) for wrong in ("1", True, math.nan, -math.inf, "-inf", "nan", [0.5])),
        *(("steps", wrong) for wrong in (math.inf, "inf", 4.0)),
        *(("parts", wrong) for wrong in ({}, "x", [1], None)),
        *(("figures", wrong) for wrong in ([], {"n": None}, {"n": True})),
    ],
)
def test_a_value_of_another_type_is_an_error_that_names_the_field(name: str, value: Any) -> None:
    with pytest.raises(DataError, match=f"^it has no usable field '{name}'$"):
        from_json(Line, {**WRITTEN, name: value}, "it")


@pytest.mark.parametrize("wrong", [math.inf, math.nan, 10**400, "inf", True])
def test_a_figure_is_finite(wrong: Any) -> None:
    with pytest.raises(DataError, match="'value'"):
        from_json(Part, {"site": "north", "value": wrong}, "it")
    assert from_json(Part, {"site": "north", "value": 2}, "it") == Part("north", 2.0)


@pytest.mark.parametrize("endless", [math.inf, "inf"])
def test_only_a_field_that_says_so_may_be_infinite(endless: Any) -> None:
    assert from_json(Cost, {"epsilon": endless, "steps": 1}, "it") == Cost(math.inf, 1)


@pytest.mark.parametrize("wrong", [[], "x", 3, None])
def test_what_is_no_object_is_an_error(wrong: Any) -> None:
    with pytest.raises(DataError, match=r"^it is not an object$"):
        from_json(Line, wrong, "it")
