"""Settings: one list of them, every one typed and ranged, and a mistake is answered by name."""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil.common.config import sections as choices
from fedveil.common.config.flat import Scalar, defaults, to_mapping
from fedveil.common.config.run import RunConfig
from fedveil.common.config.text import flatten, parse_settings, read_settings_file, to_toml
from fedveil.common.errors import ConfigError
from fedveil.common.starts import STARTS, Start
from fedveil.privacy import MECHANISMS
from fedveil.strategies import CONTROLS, ROWS, STRATEGIES
from fedveil.strategies.job import configure
from fedveil.strategies.options import OPTIONS, declared_settings, known_settings
from fedveil.strategies.resolve import config_of, resolve
from fedveil.strategies.rules import RULES

fast = settings(max_examples=25, deadline=None)
ROOT = Path(__file__).parents[2]
KNOWN = known_settings()
BESIDE = {
    key: value
    for naming, table in (("adapter.start", STARTS), ("strategy", ROWS), ("server.rule", RULES))
    for name in table
    for key, value in declared_settings({naming: name}).items()
    if key not in KNOWN
}
"""Options of the rows of ``contrib``."""
PLAIN = to_mapping(resolve({"recipe": "plain", "strategy": "ffa-lora"}).config)
DECLARED = {key: PLAIN[key] if value is None else value for key, value in {**declared_settings(), **BESIDE}.items()}
"""Defaults as the fields have them, and of an open one what a plain run makes of it."""
each_key = pytest.mark.parametrize("key", DECLARED)


def job_with(key: str, value: Scalar) -> Any:
    """Configure a run with one setting changed, and the strategy whose setting it is."""
    owner = key.split(".", maxsplit=1)[0]
    strategy = owner if owner in ROWS else "fedavg-lora" if owner == "lora-pro" else "ffa-lora"
    rule = {"server.rule": owner} if owner in RULES else {}
    words = {"model.task": "causal-lm", "head.policy": "frozen"} if owner == "align-guard" else {}
    words |= {"server.optimizer": "momentum", "server.momentum": 0.0} if owner == "soft-threshold" else {}
    words |= {"privacy.mode": "none"} if owner in CONTROLS else {}
    return configure({"strategy": strategy, **with_owner(key), **rule, **words, key: value})


def with_owner(key: str) -> dict[str, Scalar]:
    """Return the settings of a run in which ``key`` says something, such as the start whose option it is."""
    owners = [name for name, start in STARTS.items() if key in options(start) and start().asked != "sites"]
    owners += [name for name, start in STARTS.items() if key in options(start) and start.needs == "paid release"]
    if key == "start.text-sha256":
        return {"adapter.start": "eva"}
    if key == "server.most-noise":
        return {"server.optimizer": "momentum"}
    if key in ("privacy.site-rate", "privacy.ledger"):
        return {"privacy.mode": "client-level", "privacy.unit": "site", "privacy.cohort": 20}
    if not owners:
        return {}
    # The strategy of ``job_with`` trains B; what gives B alone is for another.
    fits = {} if "A" in STARTS[owners[0]].gives else {"strategy": "fedavg-lora", "adapter.name": "lora-frozen-b"}
    data = {"start.data": "a.csv"} if owners[0] == "public-gradient" else {}
    if "start.library" in options(STARTS[owners[0]]):
        data |= {key: value for key, value in OF_LIBRARY.items() if key in options(STARTS[owners[0]])}
    return {"adapter.start": owners[0], **fits, **data}


OF_LIBRARY = {"start.library": "shelf", "start.adapters": f"letters={'0' * 16}", "start.about": "letters"}
"""What a start at adapters of a library cannot be without."""


def options(start: type[Start]) -> set[str]:
    return {f"start.{key}" for key in defaults(start)}


# One list of settings


OPEN = ("start.text", "start.text-sha256", "start.noise-multiplier")
"""Options of an initialisation that it fills in when they are left at ``auto``, 0 or empty."""


def decided(values: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Return the settings without those that were left open."""
    return {key: value for key, value in values.items() if key not in OPEN or value not in ("auto", 0, "")}


def test_defaults_alone_are_a_valid_run() -> None:
    others = {*ROWS, *RULES, "start"} - {"ffa-lora"}
    own = {k: v for k, v in KNOWN.items() if k.split(".")[0] not in others and k != OPTIONS}
    settings = configure({"recipe": "plain"}).settings()
    assert settings.keys() == own.keys()
    own = {key: value for key, value in own.items() if value != "auto"} | {"recipe": "plain"}
    assert {key: settings[key] for key in decided(own)} == decided(own)
    assert decided(settings) == settings, "a setting was left open"
    assert configure(KNOWN) == configure({})


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_jobs_settings_make_the_same_job_again(name: str) -> None:
    job = configure({"strategy": name, "adapter.rank": 5, "rounds": 9})
    assert configure(job.settings()) == job
    assert job.strategy.name == name
    assert job.adapter.rank == 5


# Mistakes


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("adapter.rnk", "adapter.rank"),
        ("privacy.epsilom", "privacy.epsilon"),
        ("training.local_steps", "training.local-steps"),
        ("round", "rounds"),
        *((f"{name}.{key}x", f"{name}.{key}") for name, s in STRATEGIES.core.items() for key in defaults(s)),
    ],
)
def test_an_unknown_setting_is_answered_with_the_nearest_known_one(typo: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"unknown setting {typo!r} (did you mean {meant!r}?)")):
        configure({typo: 1})


def test_a_setting_that_resembles_none_is_refused_without_a_guess() -> None:
    with pytest.raises(ConfigError) as refusal:
        configure({"zzzzqqqq": 1})
    assert "did you mean" not in str(refusal.value)


def test_what_was_chosen_is_what_is_written_out_and_not_what_a_run_fills_in() -> None:
    job = configure({"training.local-steps": 1, "rounds": 6, "adapter.start": "kaiming", "server.momentum": 0.5})
    assert job.chosen() == ["rounds", "adapter.start", "training.local-steps", "server.momentum"]
    assert job.asked["training.sample-rate"] == "auto"
    assert configure({}).chosen() == []


WRONG: dict[type, tuple[Any, ...]] = {
    int: ("1", 1.0, 1.5, True, None, [1]),
    float: ("1.0", True, None, [1.0]),
    str: (1, 1.0, True, None, ["x"]),
    bool: ("true", 1, 0.0, None),
}


@each_key
def test_a_value_of_another_type_is_refused_by_the_settings_name(key: str) -> None:
    for wrong in WRONG[type(DECLARED[key])]:
        with pytest.raises(ConfigError, match=rf"^{re.escape(key)} must be"):
            job_with(key, wrong)


@each_key
def test_a_value_of_its_own_type_is_kept_and_a_whole_number_serves_as_a_number(key: str) -> None:
    if key == "start.data":
        assert job_with(key, "a.csv").settings()["start.data"] == "a.csv"
        return
    value = OF_LIBRARY.get(key, DECLARED[key])
    kept = job_with(key, value).settings()[key]
    assert (kept == value) == (key not in OPEN)
    if isinstance(value, float):
        most = value if key in UP_TO_ONE else 1
        whole = job_with(key, most)
        value = whole.settings()[key]
        assert type(value) is float, f"{key} stays a whole number in the records of the run"


UP_TO_ONE = ("privacy.delta", "server.momentum")
"""Settings of which 1 is too much."""
RANGES = [
    *((key, value) for key in ("min-sites", "training.sample-rate") for value in (0, -1)),
    ("rounds", -1),
    *((f"privacy.{key}", value) for key in ("epsilon", "delta", "clip-norm") for value in (0, -1, math.nan, math.inf)),
    *(("privacy.noise-multiplier", value) for value in (-1, math.nan, math.inf)),
    ("training.sample-rate", 1.5),
    ("privacy.delta", 0.5),
    ("privacy.delta", 1.0),
]
"""Of settings whose range a promise rests on; ``test_settings`` holds each rule to its words."""


@pytest.mark.parametrize(("key", "value"), RANGES)
def test_a_value_out_of_range_is_refused_by_the_settings_name(key: str, value: float) -> None:
    said = rf"^{re.escape(key)} must be (above 0|at least 0|from 0 to|from 1e-06)"
    with pytest.raises(ConfigError, match=said):
        job_with(key, value)


@pytest.mark.parametrize(("key", "value"), [("training.sample-rate", 1.0), ("privacy.noise-multiplier", 0.0)])
def test_the_ends_of_a_range_that_make_sense_are_allowed(key: str, value: float) -> None:
    assert job_with(key, value).settings()[key] == value


@pytest.mark.parametrize("key", ["rounds", "privacy.epsilon"])
def test_a_number_too_large_for_a_computer_is_refused_and_not_a_crash(key: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(key)):
        job_with(key, 10**400)


CHOICES = {
    "model.task": tuple(choices.TASKS),
    "data.partition": choices.PARTITIONS,
    "head.policy": choices.HEAD_POLICIES,
    "head.start": choices.HEAD_STARTS,
    "training.optimizer": choices.OPTIMIZERS,
    "server.optimizer": choices.SERVER_OPTIMIZERS,
    "schedule": choices.SCHEDULES,
    "privacy.mode": tuple(MECHANISMS),
    "precision": ("auto", "float32", "bfloat16"),
    "adapter.start": ("kaiming", "orthonormal", "svd-of-weights", "dp-gradient"),
}


@pytest.mark.parametrize("key", CHOICES)
def test_a_choice_is_one_of_its_list_and_the_nearest_is_named(key: str) -> None:
    for choice in CHOICES[key]:
        context = {"head.policy": "frozen", "data.key": "author"} if key in ("model.task", "data.partition") else {}
        if key == "model.task" and not choices.TASKS[choice].wording:
            context["head.start"] = "random"
        if key == "privacy.mode" and MECHANISMS[choice].needs:
            context |= {MECHANISMS[choice].needs: 2, "privacy.unit": MECHANISMS[choice].unit.name}
        assert configure({**context, key: choice}).settings()[key] == choice
    with pytest.raises(ConfigError, match=rf"^{re.escape(key)} is '{CHOICES[key][-1]}x'.*did you mean"):
        configure({key: CHOICES[key][-1] + "x"})


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"model.task": "causal-lm", "head.policy": "trained"}, "set head.policy to 'frozen'"),
        ({"data.partition": "natural"}, "data.key"),
        ({"adapter.targets": " , "}, "adapter.targets"),
        ({"adapter.name": "lora", "strategy": "ffa-lora"}, "at 'auto', which is 'lora-frozen-a' here"),
        ({"adapter.name": "lora", "strategy": "fed-svd"}, "that trains B and freezes A, not on 'lora', which trains A"),
        ({"adapter.name": "lora-frozen-a", "strategy": "fed-sb"}, "freezes A and B, not on 'lora-frozen-a'"),
        ({"adapter.name": "lora-sb", "adapter.start": "kaiming"}, "adapter.start 'kaiming' gives no B"),
        ({"adapter.name": "loro"}, "adapter.name"),
        ({"head.policy": "frozen", "head.start": "zeros"}, "set head.start to 'label-words' or 'random'"),
        ({"strategy": "fed-sb", "adapter.start": "kaiming"}, "gives no B, which the adapter 'lora-sb' begins with"),
        (
            {"start.outputs": "random"},
            "start.outputs has no effect on adapter.start 'orthonormal': it is an option",
        ),
        (
            {"strategy": "ffa-lora", "adapter.start": "text-votes", "start.text": "imdb", "start.sample-rate": 0.5},
            "start.sample-rate has no effect on adapter.start 'text-votes'",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused_by_name(values: dict[str, Scalar], named: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(named)) as refusal:
        configure(values)
    assert "\n" not in str(refusal.value)


def test_an_adapter_keeps_the_name_that_it_had_and_is_called_by_its_own() -> None:
    for strategy in ("ffa-lora", "fed-svd", "fedavg-lora"):
        job = configure({"strategy": strategy, "adapter.name": "ffa-lora"})
        assert job == configure({"strategy": strategy, "adapter.name": "lora-frozen-a"})
        assert (job.adapter.name, job.settings()["adapter.name"]) == ("lora-frozen-a", "lora-frozen-a")
    assert configure({"strategy": "ffa-lora"}).adapter.name == "lora-frozen-a"


def test_a_language_model_has_no_head_that_could_be_zero() -> None:
    configure({"model.task": "causal-lm", "head.policy": "frozen", "head.start": "zeros"})


# There and back

numbers = st.floats(1e-6, 0.49)
texts = st.text(max_size=10)
kinds = {
    "rounds": st.integers(1, 99),
    "seed": st.integers(-(2**40), 2**40),
    "min-sites": st.integers(1, 9),
    "output": texts,
    "model.name": texts,
    "model.feature-scale": st.floats(0, 9),
    "data.labels": st.sampled_from(("a,b", "no,yes,maybe")),
    "adapter.rank": st.integers(1, 64),
    "adapter.alpha": st.floats(0.1, 64),
    "head.phrases": texts,
    "training.sample-rate": numbers,
    "training.optimizer": st.sampled_from(choices.OPTIMIZERS),
    "training.weight-decay": st.floats(0, 1),
    "privacy.mode": st.sampled_from(tuple(MECHANISMS)),
    "privacy.epsilon": st.floats(0.01, 100),
    "privacy.delta": numbers,
}


@fast
@given(st.fixed_dictionaries({}, optional=kinds))
def test_a_configuration_survives_its_flat_form(values: dict[str, Scalar]) -> None:
    if "privacy.mode" in values:
        values["privacy.unit"] = MECHANISMS[str(values["privacy.mode"])].unit.name
    assert to_mapping(config_of(values)) == {**defaults(RunConfig), **values}, (
        "a setting was lost or changed on the way"
    )
    config = resolve(values).config
    flat = to_mapping(config)
    assert flat.keys() == defaults(RunConfig).keys()
    assert {key: flat[key] for key in values} == values, "a setting was lost when the rest was filled in"
    assert None not in flat.values(), "something is left open"
    assert resolve(flat).config == config, "what is written beside the results must make the same run"


# Settings as people write them


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (["rounds=2"], {"rounds": 2}),
        (["adapter.rank=4 privacy.epsilon=3.5"], {"adapter.rank": 4, "privacy.epsilon": 3.5}),
        (['strategy="fed-sb"'], {"strategy": "fed-sb"}),
        (["strategy='fed-sb'"], {"strategy": "fed-sb"}),
        (
            ['head.phrases="good film|fine; bad film" rounds=2'],
            {"head.phrases": "good film|fine; bad film", "rounds": 2},
        ),
        (['data.name="a=b c=d"'], {"data.name": "a=b c=d"}),
        (['data.test=""'], {"data.test": ""}),
        (["strategy=ffa-lora rounds=2"], {"strategy": "ffa-lora", "rounds": 2}),
        (["data.name=../2024.csv data.labels=good,bad"], {"data.name": "../2024.csv", "data.labels": "good,bad"}),
        (["x=true y=false z=1e-5"], {"x": True, "y": False, "z": 1e-5}),
        (["rounds=2", "rounds=3"], {"rounds": 3}),
        (["rounds=2 rounds=4"], {"rounds": 4}),
        (["  rounds=2  ", ""], {"rounds": 2}),
        ([], {}),
        (['data.name="x.toml"'], {"data.name": "x.toml"}),
    ],
)
def test_pairs_are_read_as_toml_and_later_ones_win(written: list[str], meant: dict[str, Scalar]) -> None:
    got = parse_settings(written)
    assert got == meant
    assert [type(value) for value in got.values()] == [type(value) for value in meant.values()]


@pytest.mark.parametrize(
    "nonsense",
    [
        "rounds",
        "rounds=",
        "=2",
        "rounds = 2",
        "strategy=fed-sb, rounds=2",
        "privacy.epsilon=2,5",
        "strategy=fed=sb",
        "rounds=2, seed=3",
        "rounds=[1]",
        "day=2024-01-01",
        'text="never closed',
        "rounds=2 and more",
        "--rounds=2 x",
        "a b=2",
        "rounds=1\nseed=",
    ],
)
def test_nonsense_is_a_config_error_of_one_line(nonsense: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        parse_settings([nonsense])
    assert "\n" not in str(refusal.value)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text("ab.=\"' 1#\\[{\n-", max_size=15), max_size=3))
def test_any_text_is_either_read_or_a_config_error(written: list[str]) -> None:
    try:
        got = parse_settings(written)
    except ConfigError:
        return
    assert all(isinstance(value, str | int | float | bool) for value in got.values())


def test_a_word_without_quotes_is_text_and_no_number_is() -> None:
    assert configure(parse_settings(["strategy=ffa-lora"])) == configure(parse_settings(['strategy="ffa-lora"']))
    for wrong, said in (("strategy=3", "must be text in quotes, not 3"), ("rounds=3O", "must be a whole number")):
        with pytest.raises(ConfigError, match=said):
            configure(parse_settings([wrong]))


def test_a_file_of_settings_is_read_where_it_stands_among_the_pairs(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('strategy = "fed-sb"\nrounds = 3\n[adapter]\nrank = 4\n[fed-svd]\nperiod = 2\n')
    flat = {"strategy": "fed-sb", "rounds": 3, "adapter.rank": 4, "fed-svd.period": 2}
    assert parse_settings([str(file)]) == flat
    assert parse_settings([str(file), "rounds=9"]) == {**flat, "rounds": 9}
    assert parse_settings(["rounds=9", str(file)]) == flat


@pytest.mark.parametrize(
    "content",
    [b"rounds = ", b"rounds = [1]", b"day = 2024-01-01", b"x = '\xff'"],
)
def test_a_file_that_holds_no_settings_is_a_config_error(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "broken.toml"
    file.write_bytes(content)
    with pytest.raises(ConfigError):
        parse_settings([str(file)])


def test_a_file_that_is_not_there_is_a_config_error_with_its_name(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.toml", tmp_path):
        with pytest.raises(ConfigError, match=re.escape(str(path))):
            read_settings_file(path)


def test_a_job_written_as_toml_is_the_same_job_when_read(tmp_path: Path) -> None:
    job = configure({"strategy": "fed-sb", "privacy.delta": 1e-6, "head.phrases": 'good "film"|\\fine; bad\tone\n'})
    file = tmp_path / "saved.toml"
    file.write_text(to_toml(job.settings()), encoding="utf-8")
    assert configure(parse_settings([str(file)])) == job


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[privcy]\n", "privcy is a section without settings: write some below it, or leave it out"),
        ("[start.calibration]\n", "start.calibration is a section without settings"),
        ('"adapter.rank" = 8\n[adapter]\nrank = 4\n', "adapter.rank is given twice: leave one out"),
        ("[adapter]\nrank = 4\n['adapter.x']\ny = 1\n[adapter.x]\ny = 1\n", "adapter.x.y is given twice"),
        (f"rounds = 1{'0' * 400}", "is not TOML: a whole number has more than 64 bits"),
        (f"rounds = 1{'0' * 5000}", "is not TOML: a whole number has more than 64 bits"),
        (f"rounds = {'[' * 5000}", "is not TOML: brackets or keys are nested too deeply"),
        (f"{'a.' * 5000}b = 1", "is not TOML: brackets or keys are nested too deeply"),
    ],
)
def test_a_file_of_settings_that_is_none_is_one_line(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        parse_settings([str(tmp_path / "mine.toml")])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("privcy={}", "privcy is a section without settings"),
        ('adapter={rank=4,"rank"=8}', "cannot read the value of 'adapter'"),
        (f"rounds=1{'0' * 400}", "0… (a whole number has more than 64 bits)"),
        (f"rounds=1{'0' * 5000}", "0… (a whole number has more than 64 bits)"),
        (f"rounds={'[' * 5000}", "[… (brackets or keys are nested too deeply)"),
    ],
)
def test_a_pair_that_is_none_is_one_short_line(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_settings([text])
    assert said in str(caught.value)
    assert len(str(caught.value)) < 200


paths = st.lists(st.text("abc-_09", min_size=1, max_size=6), min_size=1, max_size=3).map(".".join)
values = (
    st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from("\n\t"), max_size=20)
)


def _no_key_is_a_table_of_another(flat: Mapping[str, Scalar]) -> bool:
    return not any(other.startswith(f"{key}.") for key in flat for other in flat)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(paths, values, max_size=6).filter(_no_key_is_a_table_of_another))
def test_settings_survive_toml(flat: dict[str, Scalar]) -> None:
    got = flatten(tomllib.loads(to_toml(flat)))
    assert got == flat
    assert {k: type(v) for k, v in got.items()} == {k: type(v) for k, v in flat.items()}


@pytest.mark.parametrize("character", ["\r", "\x08", "\x1b", "\x7f"])
def test_a_control_character_survives_toml(character: str) -> None:
    flat = {"head.phrases": f"good{character}film"}
    assert flatten(tomllib.loads(to_toml(flat))) == flat


@pytest.mark.parametrize(
    ("mode", "steps", "rate", "server", "site"),
    [
        ("dp-sgd", 1, 0.33, "adam", "sgd"),
        ("none", 16, 0.018, "none", "adam"),
    ],
)
def test_what_is_left_open_suits_the_privacy_mode(mode: str, steps: int, rate: float, server: str, site: str) -> None:
    config = resolve({"privacy.mode": mode, "recipe": "plain"}).config
    training = config.training
    assert (training.local_steps, training.sample_rate) == (steps, rate)
    assert (config.server.optimizer, training.optimizer) == (server, site)
    assert training.learning_rate > 0
    assert resolve(to_mapping(config)).config == config, "what is written beside the results must make the same run"


def test_one_adam_is_somewhere_unless_said_otherwise() -> None:
    at_sites = resolve({"server.optimizer": "none"}).config
    assert (at_sites.server.optimizer, at_sites.training.optimizer) == ("none", "adam")
    at_server = resolve({"server.optimizer": "adam", "privacy.mode": "none"}).config
    assert (at_server.server.optimizer, at_server.training.optimizer) == ("adam", "sgd")
    momentum: dict[str, Scalar] = {"training.optimizer": "momentum", "training.local-steps": 3}
    own = resolve({**momentum, "training.learning-rate": 0.5}).config
    assert (own.training.optimizer, own.training.local_steps, own.training.learning_rate) == ("momentum", 3, 0.5)
