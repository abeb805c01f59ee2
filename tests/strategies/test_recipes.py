"""Recipes: which one a run has, what it fills in, and that what people set stands."""

from __future__ import annotations

import json
import math
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from audits.tiny_models import VOCABULARY, tiny_tokenizer
from fedveil.client import linearised
from fedveil.client.ledger.ledger import Ledger
from fedveil.common.config.flat import typed
from fedveil.common.config.run import RunConfig
from fedveil.common.config.sections import PrivacyConfig
from fedveil.common.config.text import flatten
from fedveil.common.errors import ConfigError, ModelError, RunFailed
from fedveil.common.run_lines import ConfigFile, RoundLine, read_file, read_lines
from fedveil.experiments.in_process import run_in_process
from fedveil.privacy import MECHANISMS
from fedveil.strategies import ROWS
from fedveil.strategies.base import is_exact
from fedveil.strategies.job import configure, with_recipe
from fedveil.strategies.options import declared_settings, known_settings
from fedveil.strategies.recipes import AUTO, RECIPES, filled_keys, recipe_settings
from fedveil.strategies.resolve import resolve

MANY = "a,b,c,d,e"
TEXTS = 60
"""Public texts of a run: of 600 each is a pass of its own."""
IMAGES = {"model.task": "image-classification", "model.name": "dinov2-small", "data.name": "textile-images"}

WORDS = {"model.task": "causal-lm", "data.name": "asdiv"}
PAIRS = {"model.task": "preference", "data.name": "asdiv-pairs", "privacy.delta": 1e-4}
TRUSTED = {"privacy.mode": "client-level", "privacy.unit": "site", "privacy.cohort": 20, "privacy.delta": 0.01}


@pytest.mark.parametrize(
    ("settings", "recipe", "note"),
    [
        ({}, "metric", ""),
        ({"privacy.epsilon": 5.0, "privacy.clip-norm": 2.0, "min-sites": 3}, "metric", ""),
        ({"privacy.epsilon": 1.0}, "metric", ""),
        (
            {"privacy.epsilon": 0.5},
            "head-only",
            "with privacy.epsilon = 0.5 the noise costs the LoRA recipe ('metric') more than it gains: more",
        ),
        (
            {"data.name": "reviews.csv", "data.labels": "a,b", "privacy.epsilon": 0.5},
            "head-only",
            "with privacy.epsilon = 0.5 the noise costs",
        ),
        ({"data.records": 20000, "privacy.epsilon": 0.5}, "metric", ""),
        ({"data.records": 500}, "head-only", "with privacy.epsilon = 8 and 500 records the noise"),
        ({"data.records": 67000, "privacy.epsilon": 0.2}, "metric", ""),
        ({"min-sites": 9, "privacy.epsilon": 1.5}, "metric", ""),
        ({"min-sites": 9, "privacy.epsilon": 1.4}, "head-only", "with privacy.epsilon = 1.4 and 9 sites the noise"),
        (
            {"data.records": 67000, "privacy.epsilon": 0.1},
            "head-only",
            "with privacy.epsilon = 0.1 and 67000 records the",
        ),
        (
            {"data.records": 1, "privacy.epsilon": 500.0},
            "head-only",
            "with privacy.epsilon = 500 and 1 record the noise",
        ),
        (
            {"data.records": 67000, "data.person": "reader", "privacy.unit": "person", "privacy.epsilon": 0.5},
            "head-only",
            "with privacy.epsilon = 0.5 the noise costs the LoRA recipe ('metric') more than it gains: more",
        ),
        ({"privacy.epsilon": 0.5, "privacy.noise-multiplier": 0.5}, "metric", ""),
        ({"adapter.rank": 8, "adapter.targets": "query", "start.text": "phrases"}, "metric", ""),
        ({"rounds": 50}, "metric", ""),
        ({"data.name": "snli-dev", "privacy.delta": 1e-4}, "metric", ""),
        ({"privacy.mode": "secure-sum", "privacy.honest-sites": 3}, "metric", ""),
        ({"privacy.mode": "secure-sum", "privacy.honest-sites": 3, "privacy.epsilon": 3.0}, "metric", ""),
        (
            {"privacy.mode": "secure-sum", "privacy.honest-sites": 3, "privacy.epsilon": 0.5},
            "head-only",
            "(recipe 'head-only'): with privacy.epsilon = 0.5 the noise costs",
        ),
        (
            {"privacy.mode": "secure-sum", "privacy.honest-sites": 1, "privacy.colluders": 2, "privacy.epsilon": 0.6},
            "head-only",
            "with privacy.epsilon = 0.6 and 3 sites the noise costs",
        ),
        ({"data.name": "reviews.csv", "data.labels": "good,bad"}, "metric", ""),
        (
            {"data.name": "reviews.csv"},
            "head-only",
            "nothing here says how many labels there are: name a file that can be read, or data.labels",
        ),
        ({"data.name": "reuters"}, "head-only", "there are 52 labels, and the LoRA recipe ('metric') handles up to 3"),
        (
            {"data.name": "reviews.csv", "data.labels": MANY},
            "head-only",
            "Training the classification head only, no LoRA adapter (recipe 'head-only'): there are 5 labels",
        ),
        ({"rounds": 6}, "head-only", "rounds is 6, and the LoRA recipe ('metric') needs 10 or more"),
        ({"privacy.mode": "none"}, "open", ""),
        # What is written out counts, also where it is what a run without it has.
        ({"strategy": "fedavg-lora"}, "plain", ""),
        ({"strategy": "fedavg-lora", "privacy.mode": "none"}, "plain", ""),
        ({**IMAGES, "strategy": "fedavg-lora"}, "plain", ""),
        ({**WORDS, "strategy": "fedavg-lora"}, "plain", ""),
        ({**WORDS, "recipe": "long-steps", "strategy": "fedavg-lora"}, "long-steps", ""),
        ({"adapter.alpha": 8.0}, "plain", ": adapter.alpha is set: write recipe = 'metric' to keep that"),
        ({"head.pool": "mean"}, "plain", ": head.pool is set"),
        ({"training.weight-decay": 0.1}, "plain", ": training.weight-decay is set"),
        ({"schedule": "linear"}, "plain", ": schedule is set"),
        ({"data.partition": "dirichlet", "privacy.epsilon": 8.0, "model.feature-scale": 1.0}, "metric", ""),
        ({"schedule": "cosine"}, "plain", ": schedule is set"),
        ({"server.adam-tau": 0.01}, "plain", ": server.adam-tau is set"),
        ({"privacy.mode": "none", "rounds": 24, "adapter.rank": 4, "data.name": "reuters"}, "open", ""),
        (
            {"privacy.mode": "none", "rounds": 23},
            "plain",
            "recipe 'plain', not 'open': rounds is 23, and 'open' needs 24 or more",
        ),
        (
            {"privacy.mode": "none", "training.local-steps": 4},
            "plain",
            "recipe 'plain', not 'open': training.local-steps is set: write recipe = 'open' to keep that",
        ),
        ({"privacy.mode": "none", **WORDS}, "plain", "recipe 'plain', not 'long-steps': privacy.mode is"),
        ({"privacy.mode": "none", "strategy": "fed-svd"}, "plain", ""),
        ({"strategy": "fed-sb"}, "plain", ""),
        ({"rounds": 6, "adapter.rank": 4}, "plain", ": rounds is 6"),
        ({"adapter.name": "lora"}, "plain", ""),
        ({"adapter.name": "lora", "server.optimizer": "adam"}, "plain", ""),
        ({"adapter.start": "kaiming"}, "plain", ""),
        ({"head.policy": "frozen"}, "plain", ": head.policy is set: write recipe = 'metric' to keep that"),
        ({"server.optimizer": "adam"}, "plain", ": server.optimizer is set: write recipe = 'metric'"),
        ({"training.sample-rate": 0.5}, "plain", ": training.sample-rate is set: write"),
        ({"model.quantise": "8bit"}, "plain", ": model.quantise or model.checkpointing is set"),
        (WORDS, "long-steps", ""),
        (
            {"model.task": "speech-to-text", "model.name": "whisper-tiny.en", "data.name": "spoken-sentences"},
            "plain",
            "recipe 'plain', not 'long-steps': model.task is 'speech-to-text', and 'long-steps' is for language",
        ),
        (PAIRS, "long-steps", ""),
        ({**PAIRS, "strategy": "ffa-lora", "preference.loss": "dpo"}, "long-steps", ""),
        (
            {**PAIRS, "strategy": "ffa-lora", "preference.loss": "text"},
            "plain",
            "recipe 'plain', not 'long-steps': model.task is 'preference', and a judge in text learns one letter",
        ),
        ({**PAIRS, "preference.loss": "text", "recipe": "long-steps"}, "long-steps", ""),
        ({**PAIRS, "model.task": "grpo"}, "plain", "model.task is 'grpo', and rewards were learnt by shorter steps"),
        ({**WORDS, "strategy": "ffa-lora", "training.local-steps": 4, "adapter.start": "kaiming"}, "long-steps", ""),
        ({**WORDS, "adapter.name": "lora-frozen-a", "adapter.rank": 4, "rounds": 2}, "long-steps", ""),
        ({**WORDS, "privacy.mode": "secure-sum", "privacy.honest-sites": 3}, "long-steps", ""),
        ({**WORDS, "strategy": "fed-svd"}, "long-steps", ""),
        ({**WORDS, "strategy": "fed-sb"}, "plain", ""),
        ({**WORDS, "adapter.name": "lora"}, "plain", ""),
        (
            {**WORDS, "strategy": "ffa-lora", "server.learning-rate": 0.005},
            "plain",
            "recipe 'plain', not 'long-steps': server.learning-rate is set: write recipe = 'long-steps'",
        ),
        ({**WORDS, **TRUSTED}, "plain", "recipe 'plain', not 'long-steps': privacy.mode is"),
        (IMAGES, "head-only", "starts from words, and model.task is 'image-classification'"),
        ({**IMAGES, "head.start": "zeros"}, "head-only", "model.task is 'image-classification'"),
        ({**IMAGES, "head.start": "random"}, "plain", ": head.start is set"),
        (
            {**IMAGES, "privacy.mode": "none"},
            "plain",
            "recipe 'plain', not 'open': model.task is 'image-classification'",
        ),
        ({**IMAGES, "privacy.mode": "secure-sum", "privacy.honest-sites": 3}, "head-only", "model.task is"),
        ({**IMAGES, "strategy": "fed-sb"}, "plain", ""),
        ({"recipe": "plain"}, "plain", ""),
        ({"recipe": "head-only"}, "head-only", ""),
    ],
    ids=str,
)
def test_a_run_has_the_recipe_that_suits_it_and_the_reason(settings: dict[str, Any], recipe: str, note: str) -> None:
    job, choice = configure(settings), resolve(settings).choice
    assert job.config.recipe == choice.recipe == recipe
    assert note in choice.note
    assert bool(choice.instead) is bool(note)
    assert bool(choice.note) is ("recipe" not in settings), "a choice without a reason"
    assert configure(job.settings()) == job, "what a run stores does not make it again"


@pytest.mark.parametrize(
    ("honest", "colluders", "least"), [(3, 1, math.sqrt(1 / 3)), (1, 2, math.sqrt(3 / 4)), (2, 1, math.sqrt(3 / 8))]
)
def test_noise_decides_between_adapter_and_head_and_nobody_is_told_to_raise_epsilon(
    honest: int, colluders: int, least: float
) -> None:
    summed = {"privacy.mode": "secure-sum", "privacy.honest-sites": honest, "privacy.colluders": colluders}
    enough, less = (configure({**summed, "privacy.epsilon": least + more}) for more in (0.001, -0.001))
    assert (enough.config.recipe, less.config.recipe) == ("metric", "head-only")
    note = resolve({**summed, "privacy.epsilon": least - 0.001}).choice.note
    assert note.endswith("more than it gains: more records would help")
    assert re.findall(r"\d[.\d]*", note) == [
        f"{least - 0.001:g}",
        *([str(honest + colluders)] if honest + colluders != 4 else []),
    ]


def test_a_file_tells_its_labels_where_a_job_is_made_and_none_is_looked_at_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "notes.csv"
    for count, recipe in ((2, "metric"), (5, "head-only"), (3, "metric")):
        path.write_text("text,label\n" + "".join(f"note {i},kind {i % count}\n" for i in range(40 + count)), "utf-8")
        settings, note = with_recipe({"data.name": str(path)})
        assert settings["recipe"] == recipe == configure(settings).config.recipe
        assert ("there are 5 labels" in note) == (count == 5)
    many = {"data.name": str(path), "privacy.epsilon": 0.6, "data.test-size": 30}
    path.write_text("text,label\n" + "".join(f"note {i},kind {i % 2}\n" for i in range(15_000)), "utf-8")
    settings, note = with_recipe(many)
    assert (settings["recipe"], settings["data.records"]) == ("metric", 14_000)
    assert note == "Settings left open follow recipe 'metric': it suits 2 labels and privacy.mode 'dp-sgd'"
    apart, note = with_recipe(many, divided=False)
    assert (apart["recipe"], "data.records" in apart) == ("head-only", False), "real sites hold records of their own"
    chosen = {sites: with_recipe(many, sites=sites)[0]["recipe"] for sites in (1, 4, 5, 20)}
    assert chosen == {1: "metric", 4: "metric", 5: "metric", 20: "head-only"}, "each site has noise of its own"
    assert "with privacy.epsilon = 0.6 and 14000 records and 20 sites the noise costs" in with_recipe(many, sites=20)[1]
    for own in ({"recipe": "head-only"}, {"recipe": "plain"}, {"strategy": "ffa-lora"}, {"privacy.mode": "none"}):
        assert "data.records" not in with_recipe({**many, **own})[0], "its recipe goes by no number"
    assert with_recipe({**many, "data.records": 5000})[0]["recipe"] == "head-only", "what is said stands"
    path.write_text("text\nno label\n", encoding="utf-8")
    for name in (str(path), str(tmp_path / "nowhere.csv"), "~nobody-of-that-name/x.csv", "x" * 300, "hub:someones/set"):
        assert with_recipe({"data.name": name})[0]["recipe"] == "head-only", "whoever reads it says what is wrong"
    # A site configures what a server sends: that it opened a file of the server's choice would tell of the file.
    monkeypatch.setattr("fedveil.strategies.job.count_labels", None)
    monkeypatch.setattr("fedveil.strategies.job.count_records", None)
    assert configure({"data.name": str(path)}).config.recipe == "head-only"


def test_what_is_set_stands_and_the_rest_is_the_recipes() -> None:
    job = configure({"rounds": 50, "adapter.rank": 8, "start.text": "phrases"})
    phases = "16 head on features, 27 adapter on jacobians, 7 head on features"
    assert (job.config.rounds, job.config.phases) == (50, phases)
    assert (job.config.adapter.rank, job.settings()["start.text"]) == (8, "phrases")
    assert (job.config.adapter.name, job.config.adapter.start) == ("lora-metric", "public-metric")
    assert sorted(job.chosen()) == ["adapter.rank", "rounds", "start.text"]
    plain = configure({"recipe": "plain", "rounds": 25})
    assert (plain.config.rounds, plain.config.phases) == (25, "")
    # A value that happens to be a field's own default is one all the same.
    assert configure({"recipe": "metric", "server.momentum": 0.5}).config.server.momentum == 0.5


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("mode", sorted(MECHANISMS))
def test_a_recipe_fills_in_settings_that_exist_in_their_kind(name: str, mode: str) -> None:
    declared = {**declared_settings(), **resolve({"recipe": "plain"}).settings}
    run = RunConfig(privacy=PrivacyConfig(mode=mode, unit=MECHANISMS[mode].units[0].name))
    for key, value in recipe_settings(name, run).items():
        assert key in filled_keys()
        assert typed(key, value, type(declared[key])) == value
        assert known_settings()[key] == AUTO, "people could not leave it open"


@pytest.mark.parametrize(("rounds", "phases"), [(None, (12, 20, 5)), (50, (16, 27, 7)), (10, (3, 6, 1))])
def test_the_head_is_fitted_in_the_first_rounds_and_in_the_last(rounds: int | None, phases: tuple[int, ...]) -> None:
    asked = {"recipe": "metric", **({"rounds": rounds} if rounds else {})}
    for own in ({}, {"privacy.mode": "secure-sum", "privacy.honest-sites": 3}):
        config = configure({**asked, **own}).config
        assert tuple(phase.rounds for phase in config.timeline.phases) == phases
        assert sum(phases) == config.rounds == (rounds or 37)
    without = configure({**asked, "privacy.mode": "none"}).config
    assert without.timeline.adapter_waits == 0, "without a clip its steps are other ones"


def test_a_run_without_privacy_trains_every_linear_layer_by_plain_steps_and_the_servers_adam() -> None:
    config = configure({"privacy.mode": "none"}).config
    training, server = config.training, config.server
    assert (config.rounds, config.adapter.targets) == (48, "all-linear")
    assert (training.optimizer, training.local_steps, training.learning_rate) == ("sgd", 1, 1.0)
    assert (server.optimizer, server.learning_rate, server.adam_tau) == ("adam", 0.006, 1e-6)
    assert (config.schedule, config.moved_at_sites) == ("slanted", False), "the server follows it"
    said = configure({"recipe": "open", "privacy.mode": "none", "schedule": "linear"}).config
    assert (said.recipe, said.schedule) == ("open", "linear"), "who says a value has it"
    noised = configure({"recipe": "open"}).config
    assert (noised.rounds, noised.server.learning_rate, noised.server.adam_tau) == (48, 0.025, 1e-3)
    assert noised.schedule == "linear", "a τ so small makes full steps of noise"
    own = configure({"recipe": "open", "privacy.mode": "none", "training.optimizer": "adam"}).config.training
    assert (own.optimizer, own.learning_rate) == ("adam", 0.01), "a rate of plain steps would send Adam astray"


def test_what_is_left_open_may_be_said() -> None:
    assert configure(dict.fromkeys(filled_keys(), AUTO)) == configure({}) == configure(known_settings())


def test_strategies_that_are_written_out_have_one_recipe_and_one_optimizer_and_their_own_adapters() -> None:
    found = {name: configure({"strategy": name}) for name in ("fedavg-lora", "ffa-lora", "fed-sb", "fed-svd")}
    assert {job.config.recipe for job in found.values()} == {"plain"}
    assert len({(job.config.server, job.config.training) for job in found.values()}) == 1
    assert {name: job.adapter.name for name, job in found.items()} == {
        name: ROWS[name].adapters.default for name in found
    }, "a strategy has another's adapter"


@pytest.mark.parametrize("settings", [{}, {"strategy": "fedavg-lora"}, {"adapter.alpha": 8.0}, WORDS, IMAGES], ids=str)
def test_flowers_table_of_defaults_under_a_job_changes_nothing(settings: dict[str, Any]) -> None:
    """``flwr run`` lays what is written over the table of ``pyproject.toml`` and sends both as one."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    table = flatten(project["tool"]["flwr"]["app"]["config"])
    assert configure({**table, **settings}) == configure(settings)
    sent = with_recipe(settings)[0]
    assert configure({**table, **sent}) == configure(sent)
    whole = configure(sent).settings()
    assert configure({**table, **whole}).settings() == whole, "a full file makes another job"
    assert with_recipe(whole)[0] == whole


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"recipe": "metrics"}, "recipe is 'metrics'; choose one of metric, head-only, long-steps, open, plain"),
        ({"rounds": "many"}, "rounds must be a whole number, not 'many'"),
        ({"seed": "auto"}, "seed must be a whole number, not 'auto'"),
        ({"start.records": "few"}, "start.records must be a whole number"),
        (
            {"recipe": "metric", "privacy.mode": "none", "adapter.start": "probe"},
            "'probe' is a release",
        ),
        ({"recipe": "metric", "strategy": "fed-sb"}, "adapter"),
        ({"start.clip-share": 0.5}, ": start.clip-share is set: write recipe = 'metric' to keep that"),
        ({"recipe": "metric", "rounds": 1}, "which leaves a phase without a round"),
    ],
    ids=str,
)
def test_a_recipe_that_cannot_be_is_an_error_in_one_line(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        configure(settings)
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


KEPT = (
    "model.name",
    "model.max-length",
    "data.name",
    "data.test-size",
    "privacy.delta",
    "precision",
    "device",
    "output",
)


@pytest.fixture
def few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a recipe's start read few public texts: a map of a tiny model's features needs no more."""
    whole = recipe_settings
    monkeypatch.setattr(
        "fedveil.strategies.resolve.recipe_settings", lambda *of: {**whole(*of), "start.records": TEXTS}
    )
    monkeypatch.setattr("fedveil.common.starts.public_metric.MADE", TEXTS)


@pytest.mark.usefixtures("few_texts")
@pytest.mark.parametrize("labels", [2, 5])
def test_a_run_that_says_nothing_of_its_method_is_the_one_that_says_it_all(
    labels: int, toy_settings: dict[str, Any], tmp_path: Path
) -> None:
    data = tmp_path / "notes.csv"
    words = ["red", "green", "blue", "grey", "pink"]
    lines = [f"a {words[i % labels]} note of number {i},{words[i % labels]}\n" for i in range(160)]
    data.write_text("text,label\n" + "".join(lines), encoding="utf-8")
    settings = {key: toy_settings[key] for key in KEPT} | {"data.name": str(data), "privacy.noise-multiplier": 30.0}
    settings |= {"privacy.epsilon": 50.0}
    if labels == 2:
        settings["rounds"] = 10  # of 37: a toy's time
    folder = run_in_process(settings, 2)
    rounds = [line.round_number for line in read_lines(RoundLine, folder)]
    assert rounds[-1] == (10 if labels == 2 else 30)
    said = configure(with_recipe(settings)[0]).settings()
    assert said["recipe"] == ("metric" if labels == 2 else "head-only")
    assert read_file(ConfigFile, folder).settings == said
    assert configure(said).config.recipe == said["recipe"]


def test_a_task_without_labels_divides_by_none_and_keeps_the_models_own_head() -> None:
    for own in ({}, {"privacy.mode": "none"}, {"strategy": "fed-sb"}, {"model.task": "chat"}):
        config = configure({**WORDS, **own}).config
        assert (config.head.policy, config.data.partition) == ("frozen", "iid")
    assert configure({**WORDS, "data.partition": "natural", "data.key": "author"}).config.data.partition == "natural"
    for recipe in ("plain", "long-steps"):
        labelled = configure({"recipe": recipe}).config
        assert (labelled.head.policy, labelled.data.partition) == ("trained", "dirichlet")


@pytest.mark.parametrize("strategy", ["auto", "ffa-lora", "fed-svd"])
def test_a_language_model_has_long_plain_steps_and_an_average_that_is_exact(
    strategy: str, toy_generation: dict[str, Any]
) -> None:
    settings = {key: toy_generation[key] for key in (*KEPT, "model.task", "adapter.targets")}
    settings |= {"strategy": strategy, "privacy.noise-multiplier": 1.0, "privacy.epsilon": 50.0, "rounds": 2}
    folder = run_in_process(settings, 2)
    lines = [line for line in read_lines(RoundLine, folder) if line.round_number]
    assert [line.complete for line in lines] == [True, True]
    said = configure(with_recipe(settings)[0])
    assert (said.config.recipe, said.settings()) == ("long-steps", read_file(ConfigFile, folder).settings)
    assert is_exact(type(said.strategy), type(said.adapter)), "the mean of products is not the product of means"
    kept = load_file(folder / "adapter" / "adapter_model.safetensors")
    rows = [tensor for name, tensor in kept.items() if "lora_A" in name]
    assert rows
    assert all(torch.allclose(row @ row.T, torch.eye(len(row)), atol=1e-4) for row in rows), "A was trained"


def test_a_text_that_says_nothing_is_refused_before_a_site_pays_though_the_head_says_the_same_of_all_labels(
    toy_settings: dict[str, Any], tmp_path: Path
) -> None:
    settings = mpnet_settings(toy_settings, tmp_path / "mpnet")
    one = {"head.start": "zeros", "recipe": "metric", "start.text": "made-up", "start.records": 1}
    with pytest.raises(ModelError, match=r"lie in the directions that are shrunk alone: set start\.records to more"):
        run_in_process({**settings, **one}, 2)
    for path in Path(str(settings["output"])).rglob("*.sqlite"):
        with Ledger(path) as ledger:
            assert not ledger.spent(path.stem)


def mpnet_settings(toy: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return settings of a run that says nothing of its method, on an MPNet of 3 layers and width 24."""
    sizes: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3}
    sizes |= {"vocab_size": len(VOCABULARY), "max_position_embeddings": 40, "intermediate_size": 32}
    config = transformers.MPNetConfig(**sizes)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        transformers.MPNetModel(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    own = {"model.name": str(folder), "data.labels": "bad,good", "data.partition": "iid", "rounds": 10}
    noise = {"privacy.noise-multiplier": 30.0, "privacy.epsilon": 50.0}
    return {key: toy[key] for key in KEPT} | own | noise


@pytest.mark.usefixtures("few_texts")
def test_the_default_recipe_trains_an_encoder_of_other_sizes_whose_layers_have_other_names(
    toy_settings: dict[str, Any], tmp_path: Path
) -> None:
    folder = run_in_process(mpnet_settings(toy_settings, tmp_path / "mpnet"), 2)
    assert read_file(ConfigFile, folder).settings["recipe"] == "metric"
    lines = read_lines(RoundLine, folder)
    assert lines[-1].round_number == 10
    assert not any(line.refusals or line.failures for line in lines)
    named = json.loads((folder / "adapter" / "adapter_config.json").read_text())["target_modules"]
    assert named == ["v"]


@pytest.mark.usefixtures("few_texts")
def test_derivatives_that_no_site_should_hold_are_refused_before_a_charge_and_the_refusal_names_the_recipe(
    toy_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linearised, "MOST_BYTES", 20_000)  # 100 records × 144 numbers × 2 bytes are more
    settings = mpnet_settings(toy_settings, tmp_path / "mpnet")
    with pytest.raises(RunFailed, match=r"round 1: .*GiB, above .* or set recipe to 'head-only'"):
        run_in_process(settings, 2)
    for path in Path(str(settings["output"])).rglob("*.sqlite"):
        with Ledger(path) as ledger:
            assert not ledger.spent(path.stem), "it paid for a round that it could not take"


@pytest.mark.parametrize("recipe", ["metric", "head-only"])
def test_a_recipe_of_long_steps_takes_shorter_ones_where_nothing_is_clipped(recipe: str) -> None:
    """Else it diverges: on endings of IMDB reviews metric ended at 50 %, the head alone with a loss of 11."""
    rates = {
        mode: configure({"recipe": recipe, "privacy.mode": mode, **own}).config.server.learning_rate
        for mode, own in {"dp-sgd": {}, "secure-sum": {"privacy.honest-sites": 3}, "none": {}}.items()
    }
    assert rates["dp-sgd"] == rates["secure-sum"] > 10 * rates["none"]
    own = {"recipe": recipe, "privacy.mode": "none", "server.learning-rate": 5.0}
    assert configure(own).config.server.learning_rate == 5.0


def test_steps_of_a_language_model_are_shorter_without_a_clip_and_on_whole_records() -> None:
    said = {**WORDS, "recipe": "long-steps"}
    rates = [configure({**said, "privacy.mode": mode}).config.server.learning_rate for mode in ("dp-sgd", "none")]
    assert rates == [24.0, 6.0]
    said |= {"data.template": "{prompt}: {completion}"}
    rates = [configure({**said, "privacy.mode": mode}).config.server.learning_rate for mode in ("dp-sgd", "none")]
    assert rates == [3.0, 3.0]


@pytest.mark.parametrize("recipe", ["metric", "head-only", "long-steps"])
def test_a_recipe_that_is_named_fits_whoever_adds_the_noise(recipe: str) -> None:
    """Where that is the trusted server no site says how much it is, and ``server.most-noise`` would be refused."""
    assert configure({"recipe": recipe, **TRUSTED}).config.server.most_noise == 0.0
    assert configure({"recipe": recipe}).config.server.most_noise > 0.0
    with pytest.raises(ConfigError, match=r"'client-level' needs server\.most-noise 0"):
        configure({"recipe": recipe, "server.most-noise": 0.3, **TRUSTED})
