"""The list of a run's phases: what it may say, what it means, and what a run needs for it."""

from __future__ import annotations

from typing import Any

import pytest

from fedveil.common.config.phases import ADAPTER, HEAD, KINDS, Phase, Schedule, parse_phases, phases_text
from fedveil.common.errors import ConfigError
from fedveil.strategies.job import configure

DEFAULT = "12 head on features, 20 adapter on jacobians, 5 head on features"


@pytest.mark.parametrize("text", [DEFAULT, "3 adapter on jacobians every 2", *(f"4 {kind}" for kind in KINDS)])
def test_a_list_is_read_as_it_is_written(text: str) -> None:
    assert phases_text(parse_phases(text)) == text
    assert parse_phases(f"  {text.replace(' ', '   ')} ") == parse_phases(text), "blanks count"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("head", "phases has 'head': write how many rounds, what they train and on what"),
        ("0 head on features", "write how many rounds"),
        ("-1 head on features", "write how many rounds"),
        ("1.5 head on features", "write how many rounds"),
        ("2 head on features,", "phases has ''"),
        ("2 head on features; 1 adapter on jacobians", "phases has '2 head on features; 1 adapter on jacobians'"),
        ("2 heads on features", "there is no 'heads on features' (did you mean 'head on features'?)"),
        ("2 head on jacobians", "there is no 'head on jacobians'"),
        ("2 head on features every 1", "'every' is for fewer rounds than the phase has, and for jacobians alone"),
        ("2 adapter on jacobians every 2", "'every' is for fewer rounds"),
        ("2 adapter on jacobians every 0", "write how many rounds"),
    ],
)
def test_anything_else_is_an_error_in_one_line(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        configure({"recipe": "metric", "phases": text})
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_schedule_says_of_every_round_what_it_trains_on_what_and_how_long_that_serves() -> None:
    run = Schedule(parse_phases("2 head on features, 5 adapter on jacobians every 2, 1 head on features"))
    rounds = range(1, run.rounds + 1)
    assert [run.trains_head(n) for n in rounds] == [True] * 2 + [False] * 5 + [True]
    assert [run.trains_adapter(n) for n in rounds] == [False] * 2 + [True] * 5 + [False]
    assert [run.computation(n) for n in rounds] == [(0, 0)] * 2 + [(1, 0)] * 2 + [(1, 1)] * 2 + [(1, 2)] + [(2, 0)]
    assert [run.ends_computation(n) for n in rounds] == [False, True, False, True, False, True, True, True]
    assert (run.adapter_waits, run.computes_ahead) == (2, True)
    assert [phase.computations() for phase in run.phases] == [1, 3, 1]
    for number in (0, 9):
        with pytest.raises(ConfigError, match=f"no round {number} in a run of 8"):
            run.at(number)


def test_each_phase_has_the_whole_course_of_the_rate() -> None:
    run = Schedule((Phase(2, (HEAD,), "features"), Phase(4, (ADAPTER, HEAD))))
    assert [run.rate("linear", 1.0, n) for n in range(1, 7)] == [1.0, 0.5, 1.0, 0.75, 0.5, 0.25]
    assert [run.rate("linear", 1.0, 6, step, 2) for step in (0, 1)] == [0.25, 0.125]


@pytest.mark.parametrize(
    ("settings", "phases"),
    [
        ({}, (Phase(6, (ADAPTER, HEAD)),)),
        ({"model.task": "causal-lm", "head.policy": "frozen"}, (Phase(6, (ADAPTER,)),)),
        ({"adapter.name": "none"}, (Phase(6, (HEAD,), "features"),)),
    ],
)
def test_an_empty_list_is_one_phase_of_all_that_is_trained(settings: dict[str, Any], phases: tuple[Phase, ...]) -> None:
    assert configure({"recipe": "plain", **settings}).config.timeline.phases == phases


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rounds": 7}, "phases has 6 rounds, and rounds is 7: set rounds to 6"),
        ({"phases": "6 head on features"}, "phases never trains the adapter"),
        ({"phases": "6 adapter on examples"}, "write 'adapter\\+head on examples'"),
        ({"head.policy": "frozen", "phases": "6 adapter+head on examples"}, "sends none"),
        ({"adapter.name": "none"}, "trains the head alone: leave phases empty"),
        ({"training.weight-decay": 0.1}, "weight-decay would draw"),
        ({"strategy": "fed-svd"}, "write 'every 1' behind them in phases"),
    ],
)
def test_phases_that_a_run_cannot_have_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        configure({"recipe": "plain", "phases": "6 adapter on jacobians", **settings})
    assert configure({"recipe": "plain", "phases": "6 adapter on jacobians"}).config.rounds == 6
