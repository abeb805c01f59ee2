"""Transfer: another base model learns a run's own answers on public texts, and no record is opened for it."""

from __future__ import annotations

import json
import math
import random
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from merged_runs import fedveil, logits_of
from torch import nn

from audits.tiny_models import BAD, FILLER, GOOD, save_tiny_model
from fedveil.common.data.sources import train_and_test
from fedveil.common.derived import IN_MODEL, DerivedFile, EarlierFile, Source, derived, marks_of, sources_in, together
from fedveil.common.errors import DataError
from fedveil.common.run_lines import read_file
from fedveil.common.strict_json import to_json
from fedveil.common.tasks import TASKS
from fedveil.contrib.transfer import transfer as room
from fedveil.contrib.transfer.student import Lesson, apart, fit_head
from fedveil.contrib.transfer.texts import public_texts
from fedveil.experiments.evaluate import about_of, data_of, evaluate_run, load_result
from fedveil.experiments.in_process import run_in_process
from fedveil.reports import report_of

pytestmark = [pytest.mark.rough_prices, pytest.mark.one_length]

OPENED: list[str] | None = None


def _hear(event: str, given: tuple[Any, ...]) -> None:
    if OPENED is not None and event in ("open", "sqlite3.connect", "os.scandir", "os.listdir"):
        OPENED.append(str(given[0]))


sys.addaudithook(_hear)


@contextmanager
def opened() -> Iterator[list[str]]:
    """Yield what is opened meanwhile, by this process."""
    global OPENED
    found = OPENED = list[str]()
    try:
        yield found
    finally:
        OPENED = None


def write_texts(path: Path, count: int = 200, columns: int = 1) -> Path:
    """Write made-up public texts, one a line, that say something or nothing."""
    draw = random.Random(5)
    lines = (
        "\t".join(" ".join(draw.choices(FILLER, k=4) + draw.choices(GOOD + BAD, k=2)) for _ in range(columns))
        for _ in range(count)
    )
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def run(toy_settings: dict[str, Any]) -> Path:
    own = {"rounds": 4, "training.learning-rate": 0.05, "privacy.epsilon": 200.0}
    return run_in_process({**toy_settings, **own}, 2)


@pytest.fixture
def wider(tmp_path: Path) -> str:
    return save_tiny_model("bert", tmp_path / "wider", hidden=24)


def test_another_base_model_answers_as_the_run_does_and_carries_its_claim(
    run: Path, wider: str, tmp_path: Path
) -> None:
    texts, new = write_texts(tmp_path / "texts.txt", 400), tmp_path / "new"
    code, said = fedveil("transfer", run, "--to", wider, "--texts", texts, "--out", new, "--passes", 4)
    assert code == 0, said
    claim = report_of(run).claim.sentence
    assert claim in said
    assert "No record of a site was read" in said
    made, about = read_file(DerivedFile, new), about_of(new / "adapter")
    assert (made.epsilon, made.delta) == (report_of(run).headline.epsilon, 1e-3)
    agreement, _, control = made.figures
    assert [figure.name for figure in made.figures] == [room.AGREEMENT, room.HEAD_ALONE, room.MOST_FREQUENT]
    assert agreement.value > max(control.value, 0.85), "the new model learnt nothing"
    fedveil("transfer", run, "--to", wider, "--texts", texts, "--out", tmp_path / "head", "--passes", 0)
    assert len({figure.value for figure in read_file(DerivedFile, tmp_path / "head").figures[:2]}) == 1
    assert about.base_model == wider, "a folder of this machine is not found again"
    assert json.loads((new / "adapter" / "fedveil.json").read_text())["base_model"] == "./wider"
    card = (new / "adapter" / "README.md").read_text()
    assert claim in card
    assert claim in (new / "report.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["differential_privacy"]["epsilon"] == pytest.approx(
        made.epsilon, abs=2e-3
    )
    assert evaluate_run(new).accuracy > 0.5
    assert fedveil("ask", new, "a warm film")[0] == 0
    code, said = fedveil("report", new)
    assert code != 0
    assert "its report is report.md there" in said
    code, said = fedveil("merge", new, tmp_path / "merged")
    assert code == 0, said
    assert claim in (tmp_path / "merged" / "README.md").read_text()
    words = [text.split("\t")[0] for text in texts.read_text().splitlines()[:50]]
    same = logits_of(new, words).argmax(1) == logits_of(run, words).argmax(1)
    assert same.double().mean() > 0.8, "what was saved is not what was measured"
    code, said = fedveil("transfer", new, "--to", wider, "--texts", texts, "--out", tmp_path / "again")
    assert code == 0, said
    assert read_file(DerivedFile, tmp_path / "again").sources == made.sources, "a chain forgets where it began"


def test_the_same_base_model_begins_at_the_teachers_adapter_and_stays(run: Path, tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "texts.txt")
    made = room.transfer(run, tmp_path / "new", wanted(about_of(run / "adapter").base_model, texts))
    assert made.figures[0].value >= 0.99
    words = texts.read_text().splitlines()[:50]
    assert (logits_of(tmp_path / "new", words) - logits_of(run, words)).abs().max() < 0.05


def wanted(to: str, texts: Path, **others: Any) -> room.Wanted:
    return room.Wanted(to, str(texts), **others)


@pytest.mark.parametrize("fault", [False, True])
def test_no_record_is_opened_and_a_planted_read_is_found(
    run: Path, wider: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: bool
) -> None:
    texts = write_texts(tmp_path / "texts.txt", 40)
    train_and_test.cache_clear()
    if fault:
        honest = room.public_texts

        def peeking(source: str, data: Any, *others: Any) -> Any:
            train_and_test(data, "classification")
            return honest(source, data, *others)

        monkeypatch.setattr(room, "public_texts", peeking)
    with opened() as places:
        room.transfer(run, tmp_path / "new", wanted(wider, texts))
    assert any("texts.txt" in place for place in places), "nothing was heard"
    private = [place for place in places if "reviews" in place or "ledger" in place or "sqlite" in place]
    assert bool(private) == fault, private
    if not fault:
        (tmp_path / "reviews.csv").unlink()
        shutil.rmtree(run / "ledgers")
        room.transfer(run, tmp_path / "other", wanted(wider, texts))


def test_several_labels_pairs_and_completions_are_transferred(
    toy_settings: dict[str, Any], toy_generation: dict[str, Any], wider: str, tmp_path: Path
) -> None:
    several = {"model.task": "multi-label", "data.labels": "bad,good", "strategy": "fedavg-lora"}
    kinds: list[tuple[dict[str, Any], int, str]] = [
        ({**toy_settings, **several, "head.policy": "trained"}, 1, wider),
        ({**toy_settings, "data.text-pair": "author"}, 2, wider),
        (toy_generation, 1, toy_generation["model.name"]),
    ]
    for number, (settings, columns, to) in enumerate(kinds):
        run = run_in_process({**settings, "rounds": 1, "privacy.mode": "none"}, 2)
        texts = write_texts(tmp_path / f"texts-{number}", 60, columns)
        made = room.transfer(run, tmp_path / f"new-{number}", wanted(to, texts))
        assert made.epsilon is None
        assert made.figures[0].name == (room.TOKENS if settings is toy_generation else room.AGREEMENT)
        assert load_result(tmp_path / f"new-{number}" / "adapter").about.task == settings.get(
            "model.task", "classification"
        )
        assert "Privacy was OFF" in (tmp_path / f"new-{number}" / "adapter" / "README.md").read_text()


def test_what_cannot_be_transferred_is_refused_in_one_line(run: Path, wider: str, tmp_path: Path) -> None:
    data, one = data_of(about_of(run / "adapter")), write_texts(tmp_path / "few.txt", 5)
    for texts, why in (
        (tmp_path / "reviews.csv", "is the run's data.name"),
        (one, "has 5 texts, and 20 are the least"),
        (tmp_path / "none.txt", "cannot be read as UTF-8 text"),
    ):
        code, said = fedveil("transfer", run, "--to", wider, "--texts", texts, "--out", tmp_path / "new")
        assert (code, why in said) == (1, True), said
    named = replace(data, name="rotten-tomatoes", test="")
    with pytest.raises(Exception, match="shares sentences with it"):
        public_texts("sst2", named, ["text"])
    with pytest.raises(Exception, match="a tab between"):
        public_texts(str(write_texts(tmp_path / "single.txt", 30)), data, ["text", "text-pair"])
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "mine").touch()
    code, said = fedveil("transfer", run, "--to", wider, "--texts", one, "--out", tmp_path / "new")
    assert "nothing is written over" in said


@pytest.mark.parametrize("name", ["classification", "multi-label"])
def test_the_distance_is_the_papers_and_a_fitted_head_is_its_least(
    run: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = torch.Generator().manual_seed(3)
    logits, own = (torch.randn(7, 3, generator=draw, dtype=torch.float64) for _ in range(2))
    task = TASKS[name]
    q = (own.sigmoid() if task.scored.several else own.softmax(1)).numpy()
    zipped = [list(zip(*rows, strict=True)) for rows in zip(logits.tolist(), q.tolist(), strict=True)]
    if task.scored.several:
        slow = [[p * np.log1p(np.exp(-z)) + (1 - p) * np.log1p(np.exp(z)) for z, p in pairs] for pairs in zipped]
        slow = [np.mean(row) for row in slow]
    else:
        slow = [-sum(p * (z - np.log(sum(np.exp(other) for other, _ in pairs))) for z, p in pairs) for pairs in zipped]
    assert (apart(task, logits, torch.tensor(q)) - torch.tensor(slow)).abs().max() < 1e-12
    # A teacher that is linear in the features is found again.
    student = load_result(run / "adapter")
    features = torch.randn(300, 4, generator=draw)
    teacher = torch.randn(3, 4, generator=draw)
    answers = features @ teacher.T
    answers = answers.sigmoid() if task.scored.several else answers.softmax(1)
    student.module.head = nn.Linear(4, 3)
    monkeypatch.setattr("fedveil.contrib.transfer.student.over", lambda *others: features)
    fit_head(replace(student, task=task), Lesson([{}] * 300, answers), torch.device("cpu"))
    made = student.module.head(features)
    made = made.sigmoid() if task.scored.several else made.softmax(1)
    assert (made - answers).abs().max() < 1e-2


def test_a_record_in_several_runs_has_the_sum_and_one_run_counts_once() -> None:
    one = Source("1", "ffa-lora", "ab", {}, "a claim", 3.0, 1e-5, "record", "terms", 0.25)
    other = replace(one, run="2", epsilon=2.5, delta=1e-6)
    made = derived("compose linear", "base", [one, other, one])
    assert (made.epsilon, made.delta) == (5.5, pytest.approx(1.1e-5))
    assert [source.weight for source in made.sources] == [0.5, 0.25]
    assert together([one, replace(other, epsilon=None)]) == (None, None)
    assert together([one, replace(other, unit="person")]) == (None, None)


@pytest.mark.parametrize("known", [3.0, math.inf, None])
@pytest.mark.parametrize("turned", [False, True])
def test_a_copy_of_a_run_lowers_no_claim_and_another_run_under_its_id_stands_beside_it(
    known: float | None, turned: bool
) -> None:
    one = Source("1", "ffa-lora", "ab", {"head": "cd"}, "a claim", known, 1e-5 if known else None, "record", "terms")
    for copy in (replace(one, epsilon=1.0, delta=1e-9), replace(one, epsilon=1.0, delta=1e-9, unit="record: its rows")):
        made = derived("compose linear", "base", [copy, one] if turned else [one, copy])
        assert (made.epsilon, made.delta) == (known, one.delta)
        assert [source.weight for source in made.sources] == [2.0]
    for changed in ({"files": {"head": "ef"}}, {"base": "other"}):
        both = derived("compose linear", "base", [one, replace(one, epsilon=1.0, delta=0.0, **changed)])
        assert len(both.sources) == 2
        assert both.epsilon == (known + 1.0 if known else None)
    assert derived("x", "base", [one, replace(one, epsilon=9.0, unit="person")]).epsilon is None, "of a larger unit"


def test_a_run_that_comes_by_its_folder_and_by_a_models_marks_counts_once() -> None:
    one = Source("1", "ffa-lora", "ab", {"head": "cd"}, "a claim", 3.0, 1e-5, "record", "terms")
    marked = sources_in({IN_MODEL: marks_of([one])})
    assert derived("transfer", "base", [one, *marked]).epsilon == 3.0
    assert derived("transfer", "base", [*marked, one]).sources[0].run == "1"


@pytest.mark.parametrize(
    ("field", "value"),
    [("epsilon", -0.1), ("epsilon", math.nan), ("delta", -1e-5), ("delta", 1.0), ("weight", math.inf)],
)
def test_figures_that_would_lower_a_sum_are_refused_by_file_and_field(field: str, value: float, tmp_path: Path) -> None:
    one = to_json(Source("1", "ffa-lora", "ab", {}, "a claim", 3.0, 1e-5, "record", "terms")) | {field: value}
    with pytest.raises(DataError, match=f"{IN_MODEL} of the model's configuration has no usable field '{field}'"):
        sources_in({IN_MODEL: [one]})
    for kind, own in (
        (EarlierFile, {}),
        (DerivedFile, {"operation": "x", "base_model": "b", "epsilon": 1, "delta": 0}),
    ):
        (tmp_path / kind.NAME).write_text(json.dumps({"sources": [one], **own}), encoding="utf-8")
        with pytest.raises(DataError, match=f"{kind.NAME} has no usable field '{field}'"):
            read_file(kind, tmp_path)
