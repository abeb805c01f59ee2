"""The fitted head: the exact minimum, a penalty that no test record has a part in, a line in tables and pictures."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from digits import PROCESSOR, SIDE, TOKENS, digits, tiny_vit, write_folder
from swept_rows import OPEN, SEEDS, row

from audits.tiny_models import write_reviews
from fedveil.common.config.text import to_toml
from fedveil.common.errors import ConfigError
from fedveil.common.tasks.examples import Dataset
from fedveil.common.tasks.text import TextExample
from fedveil.experiments.sweep import conduct, fitted_head
from fedveil.experiments.sweep.arms import ARMS
from fedveil.experiments.sweep.conduct import run_sweep
from fedveil.experiments.sweep.file import read_sweep
from fedveil.experiments.sweep.fitted_head import PENALTIES, Array, Labels, choose_penalty, fit, fitted, folds_of, judge
from fedveil.experiments.sweep.groups import groups
from fedveil.experiments.sweep.pictures import epsilon_figure
from fedveil.experiments.sweep.rows import read_rows
from fedveil.experiments.sweep.summary import markdown_of
from fedveil.server.model import ServerModel
from fedveil.strategies.job import configure


def made(records: int, width: int, labels: int, seed: int = 0) -> tuple[Array, Labels]:
    """Return features that tell their labels in part."""
    draw = np.random.default_rng(seed)
    y = draw.integers(0, labels, records)
    return draw.normal(size=(labels, width))[y] + 1.5 * draw.normal(size=(records, width)), y


def slow(x: Array, y: Labels, labels: int, penalty: float) -> Array:
    """Return the same minimum by Newton's method with the whole Hessian, record by record.

    Of the offsets, which the loss knows up to a number that all have in common, the mean is held at 0.
    """
    width = x.shape[1]
    weights = np.zeros((width + 1, labels))
    for _ in range(20):
        gradient, hessian = np.zeros_like(weights), np.zeros((weights.size, weights.size))
        gradient[:-1] += penalty * weights[:-1]
        hessian += penalty * np.diag(np.repeat([1.0] * width + [0.0], labels))
        for features, label in zip(x, y, strict=True):
            one = np.append(features, 1.0)
            chances = np.exp(one @ weights) / np.exp(one @ weights).sum()
            gradient += np.outer(one, chances - np.eye(labels)[label]) / len(y)
            hessian += np.kron(np.outer(one, one), np.diag(chances) - np.outer(chances, chances)) / len(y)
        tie = np.zeros_like(weights)
        tie[-1] = 1.0
        weights -= np.linalg.solve(
            hessian + np.outer(tie, tie), gradient.ravel() + weights[-1].sum() * tie.ravel()
        ).reshape(weights.shape)
    return weights


@pytest.mark.parametrize(("labels", "penalty"), [(2, 1.0), (2, 1e-3), (3, 0.1), (5, 1e-4)])
def test_a_fit_is_the_slow_minimum(labels: int, penalty: float) -> None:
    x, y = made(60, 4, labels)
    wanted = slow(x, y, labels, penalty)
    found = fit(x, y, np.zeros((5, labels)), penalty)
    again = fit(x, y, 3 * np.random.default_rng(1).normal(size=(5, labels)), penalty)
    for weights in (found, again):
        assert np.allclose(weights[:-1], wanted[:-1], atol=1e-4)
        assert np.allclose(weights[-1] - weights[-1].mean(), wanted[-1], atol=1e-4)
    other = fit(x, y, np.zeros((5, labels)), 10 * penalty)
    assert np.abs(other[:-1] - wanted[:-1]).max() > 1e-3, "another penalty does not show"


def test_the_penalty_is_that_of_the_slow_cross_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitted_head, "PENALTIES", penalties := (1.0, 0.1, 1e-2))
    seen = set()
    for seed in (0, 2):
        x, y = made(40, 6, 2, seed)
        folds = [i % 4 for i in range(40)]
        scores = []
        for penalty in penalties:
            right, loss = 0, 0.0
            for fold in range(4):
                inside = [i for i in range(40) if folds[i] != fold]
                weights = slow(x[inside], y[inside], 2, penalty)
                for i in set(range(40)) - set(inside):
                    logits = np.append(x[i], 1.0) @ weights
                    right += int(logits.argmax() == y[i])
                    loss += np.log(np.exp(logits).sum()) - logits[y[i]]
            scores.append((-right, loss, penalty))
        assert choose_penalty(x, y, 2, folds) == min(scores)[2]
        seen.add(min(scores)[2])
    assert len(seen) > 1, "a choice that is always the same shows nothing"


def test_records_that_are_alike_are_in_one_fold_and_a_seed_deals_them_anew() -> None:
    texts = [f"review {i // 2}" for i in range(60)]
    data = Dataset("made", tuple(TextExample(text=text, label=0) for text in texts), ("bad", "good"))
    folds = folds_of(data, 1)
    assert all(folds[i] == folds[i + 1] for i in range(0, 60, 2))
    assert sorted(folds.count(fold) for fold in range(5)) == [12] * 5
    assert folds_of(data, 2) != folds


# --- a job ------------------------------------------------------------------------------------------------------------


def of(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a run's fitted head."""
    return {**ARMS["fitted-head"].settings(settings), "min-sites": 1, "output": settings["output"]}


def flipped(source: Path, target: Path) -> Path:
    """Write the same reviews with their labels changed."""
    with source.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    with target.open("w", encoding="utf-8", newline="") as file:
        others = [[text, {"bad": "good", "good": "bad"}[label], *rest] for text, label, *rest in rows[1:]]
        csv.writer(file).writerows([rows[0], *others])
    return target


def check_that_the_test_part_decides_nothing(settings: dict[str, Any], folder: Path) -> None:
    """Of two labels a head is right on exactly those records that it is wrong on under the other label."""
    test = write_reviews(folder / "test.csv", 60, seed=5)
    plain = fitted(configure({**of(settings), "data.test": str(test)}))
    turned = fitted(configure({**of(settings), "data.test": str(flipped(test, folder / "turned.csv"))}))
    assert plain.penalty == turned.penalty
    assert plain.after.accuracy == pytest.approx(1 - turned.after.accuracy)
    assert plain.after.accuracy > 0.55
    assert plain.test_records == 60


def test_the_test_part_decides_nothing(toy_settings: dict[str, Any], tmp_path: Path) -> None:
    check_that_the_test_part_decides_nothing(toy_settings, tmp_path)


def test_a_penalty_that_is_chosen_on_the_test_part_is_found(
    toy_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[ServerModel] = []
    honest = ServerModel.__init__

    def remember(self: ServerModel, *words: Any) -> None:
        honest(self, *words)
        held.append(self)

    def peek(x: Array, y: Labels, classes: int, folds: Any) -> float:
        del folds
        test = np.stack([record["features"].double().numpy() for record in held[-1].records])
        right = np.array([record["labels"] for record in held[-1].records])
        heads = zip(fitted_head.path(x, y, classes, PENALTIES), PENALTIES, strict=True)
        return max(heads, key=lambda head: judge(head[0], test, right).accuracy)[1]

    monkeypatch.setattr(ServerModel, "__init__", remember)
    monkeypatch.setattr(fitted_head, "choose_penalty", peek)
    with pytest.raises(AssertionError):
        check_that_the_test_part_decides_nothing(toy_settings, tmp_path)


def test_pairs_and_images_have_fitted_heads_too(toy_settings: dict[str, Any], tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.csv"
    with pairs.open("w", newline="", encoding="utf-8") as file:
        texts = [("the film", "is good" if i % 2 else "was dull and long", i % 2) for i in range(80)]
        csv.writer(file).writerows(
            [("text", "other", "label"), *((f"{a} {i}", b, n) for i, (a, b, n) in enumerate(texts))]
        )
    found = fitted(configure(of({**toy_settings, "data.name": str(pairs), "data.text-pair": "other"})))
    assert found.after.accuracy > 0.9
    assert found.after.loss < found.before.loss
    with torch.random.fork_rng():
        torch.manual_seed(7)
        tiny_vit().save_pretrained(tmp_path / "vit")
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(PROCESSOR), encoding="utf-8")
    folder = write_folder(tmp_path / "digits", digits(count=120))
    images = {"model.task": "image-classification", "model.name": str(tmp_path / "vit"), "model.max-length": TOKENS}
    own = {**toy_settings, **images, "data.name": str(folder), "data.test-size": 30, "head.start": "zeros"}
    assert SIDE == 8
    assert fitted(configure(of(own))).after.accuracy > 0.8


def test_a_task_without_a_head_has_none(toy_generation: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"needs head\.policy 'trained'"):
        fitted(configure(of(toy_generation)))


# --- a sweep ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a sweep's runs be run in this process."""

    def each(function: Any, works: list[Any], *_: Any) -> Iterator[tuple[Any, Any]]:
        for work in works:
            work.folder.mkdir(parents=True)
            yield work, function(work)

    monkeypatch.setattr(conduct, "each_in_a_process", each)


@pytest.mark.usefixtures("here")
def test_a_sweep_has_one_row_a_seed_and_keeps_it(toy_settings: dict[str, Any], tmp_path: Path) -> None:
    base = {key: value for key, value in toy_settings.items() if key != "output"}
    (tmp_path / "base.toml").write_text(to_toml(base), encoding="utf-8")
    file = tmp_path / "mine.toml"
    file.write_text(
        'base = "base.toml"\nsites = 2\nseeds = [1, 2]\nepsilons = [3.0, 8.0]\n'
        'variants.plain.baselines = ["fitted-head"]\nvariants.wide.settings.adapter.rank = 4\n',
        encoding="utf-8",
    )
    cells = [cell for cell in read_sweep(file).cells if cell.arm == "fitted-head"]
    assert [cell.name for cell in cells] == [f"plain-eps-none-seed-{seed}-fitted-head" for seed in (1, 2)]
    said: list[str] = []
    ended = run_sweep(read_sweep(file), tmp_path / "runs", tmp_path, said.append, only="*-fitted-head", flower=True)
    assert not ended.failed
    rows = read_rows(tmp_path / "mine.jsonl")
    assert [(r.arm, r.epsilon_asked, r.epsilon, r.rounds, r.seed) for r in rows] == [
        ("fitted-head", None, None, 0, seed) for seed in (1, 2)
    ]
    assert all(r.penalty in PENALTIES and r.bytes_up is None and r.through == "one process" for r in rows)
    wanted = fitted(cells[0].job(tmp_path))
    assert (rows[0].accuracy, rows[0].penalty) == (wanted.after.accuracy, wanted.penalty)
    run_sweep(read_sweep(file), tmp_path / "runs", tmp_path, said.append, only="*-fitted-head", flower=True)
    assert read_rows(tmp_path / "mine.jsonl") == rows


FITTED = row(0.78, arm="fitted-head", epsilon_asked=None, epsilon=None, delta=None, bytes_down=None, penalty=1e-3)


def test_a_fitted_head_is_a_row_and_a_line_over_every_epsilon() -> None:
    rows = [*SEEDS, *OPEN, FITTED, replace(FITTED, seed=2, accuracy=0.8)]
    text = markdown_of(rows)
    assert "| `wide` | – | fitted-head | none | 2 | **79.0** ± 12.7 (78.0, 80.0) |" in text
    assert "λ of the fitted heads: 0.001." in text
    (axes,) = epsilon_figure(groups(rows), []).axes
    (line,) = [line for line in axes.lines if line.get_label() == "wide, fitted-head"]
    assert list(line.get_ydata()) == [pytest.approx(79.0)] * 2
    assert list(line.get_xdata()) == [0, 1], "not from one edge to the other"
