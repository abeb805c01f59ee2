"""The public metric of pairs and of language models: both segments, completions, and what it falls back to."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from probes import metric_run
from torch import Tensor

from audits.tiny_models import BAD, FILLER, GOOD, TARGETS, write_reviews
from fedveil.common.adapters.layers import base_weight, layers_of
from fedveil.common.config.flat import Columns
from fedveil.common.config.sections import DataConfig
from fedveil.common.data.sources import is_paired
from fedveil.common.messages.state import AdapterState
from fedveil.common.model.federated import FederatedModel
from fedveil.common.run_lines import RoundLine, read_lines
from fedveil.common.starts.from_text import FromText
from fedveil.common.starts.gradient import open_weights
from fedveil.common.tasks import Record, wording_of
from fedveil.common.tasks.text import TOKENS
from fedveil.experiments.evaluate import evaluate_run
from fedveil.experiments.in_process import run_in_process
from fedveil.server.model import ServerModel
from fedveil.strategies.job import configure

pytestmark = [pytest.mark.slow, pytest.mark.rough_prices]

Folder = Callable[[str], str]
SEPARATOR = 3
"""Token of ``[SEP]``, which ends each of a pair's segments."""
LINES = [
    f"the {good} {a} was {bad} and the {b} quite {good}"
    for good, bad in zip(GOOD, BAD, strict=True)
    for a, b in pairwise(FILLER)
]


def metric(toy: dict[str, Any], **more: Any) -> dict[str, Any]:
    return metric_run(toy, **{"start__records": 24, **more})


@pytest.fixture
def text(tmp_path: Path) -> dict[str, Any]:
    """Settings of a start from a public file of text."""
    path = tmp_path / "public.txt"
    path.write_text("".join(f"{line}\n" for line in LINES))
    return {"start.text": str(path), "start.text-sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


@pytest.fixture
def pairs(toy_settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Settings of a run whose records are pairs."""
    path = tmp_path / "pairs.csv"
    lines = write_reviews(tmp_path / "single.csv", 200).read_text().splitlines()[1:]
    cells = [line.split(",") for line in lines]
    rows = [f"{a[0]},{b[0]},{a[1]}" for a, b in pairwise(cells)]
    path.write_text("\n".join(["text,other,label", *rows]))
    return {**toy_settings, "data.name": str(path), "data.text-pair": "other"}


def output_energy(model: FederatedModel, records: list[Record], state: AdapterState) -> dict[str, tuple[float, float]]:
    """Return by layer what share of the records' gradients, each of length 1, B's columns hold; and the largest share.

    Slowly, in float64: the singular values of all of them side by side.
    """
    layers, held = layers_of(model.peft_model), {}
    stacks: dict[str, list[Tensor]] = {name: [] for name in layers}
    model.module.eval()
    with open_weights(model) as weights:
        for record in records:
            model.module.zero_grad()
            for weight in weights.values():
                weight.grad = None
            model.losses(model.batch([record])).sum().backward()
            for name, weight in weights.items():
                assert weight.grad is not None
                G = weight.grad.double()
                G = G if G.shape == base_weight(layers[name]).shape else G.T
                stacks[name].append(G / G.norm())
    for name, stack in stacks.items():
        wide = torch.cat(stack, dim=1)
        B = state[name]["B"].double()
        B = B / B.norm(dim=0)
        values = torch.linalg.svdvals(wide)
        held[name] = (float((B.T @ wide).square().sum()), float(values[: B.shape[1]].square().sum()))
    return held


def test_a_run_is_paired_where_its_columns_or_its_named_set_say_so() -> None:
    columns = Columns({"text-pair": "other"})
    assert is_paired(DataConfig(name="a.csv", columns=columns), "classification")
    assert not is_paired(DataConfig(name="a.csv"), "classification")
    assert not is_paired(DataConfig(name="a.csv", columns=columns), "causal-lm")
    assert is_paired(DataConfig(name="snli-dev"), "classification")
    assert not is_paired(DataConfig(name="rotten-tomatoes", columns=columns), "classification")


@pytest.mark.parametrize("from_file", [True, False], ids=["a file", "made up"])
def test_public_pairs_have_two_segments_of_text(from_file: bool, pairs: dict[str, Any], text: dict[str, Any]) -> None:
    job = configure(metric({**pairs, **(text if from_file else {})}))
    model, start = ServerModel(job).model, job.origin
    assert isinstance(start, FromText)
    labels = [i % 2 for i in range(24)]
    records = start.pairs(model, labels)
    assert [record["labels"][0] for record in records] == labels
    assert all(record[TOKENS].count(SEPARATOR) == 2 for record in records), "a segment is missing"
    assert all(len(record[TOKENS]) <= 24 for record in records)
    assert len({tuple(record[TOKENS]) for record in records}) > 12
    if from_file:
        own = model.prepare([wording_of(model.task).pair(LINES[0], LINES[1])])
        assert records[0][TOKENS] == own[0][TOKENS]


@pytest.mark.parametrize("more", [{}, {"head__metric": "public"}, {"adapter__name": "none", "head__metric": "public"}])
def test_the_metric_of_pairs_is_made_of_pairs_and_trains(
    more: dict[str, Any], pairs: dict[str, Any], text: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = metric({**pairs, **text}, rounds=1, **more)
    monkeypatch.setattr(FromText, "texts", lambda *_: pytest.fail("the metric of pairs is made of single texts"))
    folder = run_in_process(settings, 2)
    (score,) = [line for line in read_lines(RoundLine, folder) if line.round_number == 1]
    assert evaluate_run(folder).accuracy == pytest.approx(score.accuracy)
    told = "no phrase about a label is a pair" in (folder / "run.log").read_text()
    assert told == ("adapter__name" not in more)


def test_b_of_pairs_holds_the_most_of_what_pairs_say(pairs: dict[str, Any], text: dict[str, Any]) -> None:
    job = configure(metric({**pairs, **text}))
    server = ServerModel(job)
    state = server.public_statistic()
    start: Any = job.origin
    records = start.pairs(server.model, start.drawn_labels(2, job.config.seed))
    for held, largest in output_energy(server.model, records, state).values():
        assert held == pytest.approx(largest, rel=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_b_of_a_language_model_holds_the_most_of_what_public_completions_say(
    family: str, model_folder: Folder, toy_generation: dict[str, Any], text: dict[str, Any]
) -> None:
    own = {"model.name": model_folder(family), "adapter.targets": TARGETS[family]}
    job = configure(metric({**toy_generation, **text, **own}))
    server = ServerModel(job)
    state = server.public_statistic()
    first, *_ = records = job.origin.completions(server.model)  # type: ignore[attr-defined]
    words = LINES[0].split()
    half = len(words) // 2
    assert len([label for label in first["labels"] if label >= 0]) == len(words) - half + 1, (
        "not half of it, and an end"
    )
    for held, largest in output_energy(server.model, records, state).values():
        assert held == pytest.approx(largest, rel=1e-6)
    for layer, factors in server.start.items():
        began = {layer: {"B": factors["B"]}}
        held, largest = output_energy(server.model, records, {**state, **began})[layer]
        assert held < 0.9 * largest, "random columns would have passed"


@pytest.mark.parametrize("mode", ["dp-sgd", "none"])
def test_a_language_model_trains_in_the_metric_and_evaluates_as_it_scored(
    mode: str, toy_generation: dict[str, Any], text: dict[str, Any]
) -> None:
    folder = run_in_process(metric({**toy_generation, **text}, privacy__mode=mode), 2)
    lines = list(read_lines(RoundLine, folder))
    assert evaluate_run(folder).loss == pytest.approx(lines[-1].loss, rel=1e-4)
    assert "random" not in (folder / "run.log").read_text()


def test_without_a_public_text_a_language_model_falls_back_to_random_columns_and_says_so(
    toy_generation: dict[str, Any],
) -> None:
    settings = metric(toy_generation, rounds=1)
    server = ServerModel(configure(settings))
    for layer, factors in server.public_statistic().items():
        B, began = (t.double() / t.double().norm(dim=0) for t in (factors["B"], server.start[layer]["B"]))
        assert (B - began).abs().max() < 1e-6
    log = (run_in_process(settings, 2) / "run.log").read_text()
    assert "so B's columns are random, from the seed: name a text in start.text" in log
